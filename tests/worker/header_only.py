"""Checkpoints of real sizes without a weight: config.json and headers, the files behind them sparse, so that they take no room on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

Shapes = Iterator[tuple[str, tuple[int, ...]]]

LLAMA_3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
LLAMA_3_70B: dict[str, Any] = {
    **LLAMA_3_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}


def write(folder: Path, config: dict[str, Any], dtype: str = "BF16", shards: int = 4) -> Path:
    """A checkpoint that any reader of headers takes for whole; what it reads of weights is zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    bits = {"BF16": "bfloat16", "F32": "float32"}[dtype]
    (folder / "config.json").write_text(json.dumps({**config, "dtype": bits, "torch_dtype": bits}))
    tensors, size, index = list(shapes(config)), {"BF16": 2, "F32": 4}[dtype], {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for tensor, shape in tensors[number * len(tensors) // shards : (number + 1) * len(tensors) // shards]:
            entries[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + prod(shape) * size]}
            at += prod(shape) * size
            index[tensor] = name
        header = json.dumps(entries).encode()
        with (folder / name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def shapes(config: dict[str, Any]) -> Shapes:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        yield from ((f"{block}{norm}.weight", (hidden,)) for norm in ("input_layernorm", "post_attention_layernorm"))
        yield from attention(f"{block}self_attn.", config)
        yield from feed_forward(block, config)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)


def attention(at: str, config: dict[str, Any]) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    yield f"{at}q_proj.weight", (heads * size, hidden)
    for name in ("k_proj", "v_proj"):
        yield f"{at}{name}.weight", (config["num_key_value_heads"] * size, hidden)
    yield f"{at}o_proj.weight", (hidden, heads * size)
    if config["model_type"].startswith("qwen3"):
        yield from ((f"{at}{norm}.weight", (size,)) for norm in ("q_norm", "k_norm"))


def feed_forward(block: str, config: dict[str, Any]) -> Shapes:
    hidden = config["hidden_size"]
    if experts := config.get("num_experts") or config.get("num_local_experts"):
        mixtral = config["model_type"] == "mixtral"
        place, names = ("block_sparse_moe", ("w1", "w3", "w2")) if mixtral else ("mlp", ("gate_proj", "up_proj", "down_proj"))
        width = config.get("moe_intermediate_size") or config["intermediate_size"]
        yield f"{block}{place}.gate.weight", (experts, hidden)
        for expert in range(experts):
            for name in names:
                shape = (hidden, width) if name in ("w2", "down_proj") else (width, hidden)
                yield f"{block}{place}.experts.{expert}.{name}.weight", shape
        return
    for name in ("gate_proj", "up_proj"):
        yield f"{block}mlp.{name}.weight", (config["intermediate_size"], hidden)
    yield f"{block}mlp.down_proj.weight", (hidden, config["intermediate_size"])
