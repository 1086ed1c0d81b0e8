"""Checkpoints of many thin blocks that nothing was taught: many commits, little work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["thin_llama", "thin_qwen3"]


def thin_llama(folder: Path, layers: int, hidden: int = 64, vocabulary: int = 512, **saving: Any) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**_sizes(layers, hidden), vocab_size=vocabulary, tie_word_embeddings=False)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, **saving)
    return folder


def thin_qwen3(folder: Path, layers: int) -> Path:
    """The embeddings tied to the head."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(**_sizes(layers, 64), head_dim=32, vocab_size=512, tie_word_embeddings=True, initializer_range=0.1)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def _sizes(layers: int, hidden: int) -> dict[str, int]:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers, **heads}
