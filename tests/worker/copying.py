"""A small Llama that looks far in a few of its layers: rows whose second half says the first once more.

The first half is a random walk, which the last token alone predicts in part; the second half is the same walk. Nothing within a window that
is shorter than half a row tells how it goes on.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import cached

__all__ = ["HALF", "LAYERS", "WINDOW", "copying_model", "copying_rows"]

HALF, VOCABULARY, LAYERS, WINDOW = 24, 32, 6, 8
STEPS, BATCH, BRANCHES, RATE = 240, 16, 8, 5e-3
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
VERSION = 1
"""Part of the cache's key: raise it when the code below changes what comes out."""


def copying_model(seed: int = 0) -> Path:
    """Folder of the trained checkpoint, fp32, in the cache. Not to be written to."""
    recipe = [SHAPE, STEPS, BATCH, HALF, BRANCHES, RATE, seed, VERSION, version("transformers")]
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    return cached("models", f"copying-{digest}", lambda folder: _train(folder, seed))


def copying_rows(rows: int, seed: int) -> Tensor:
    """int64 [rows, 2 * HALF]"""
    chance = torch.Generator().manual_seed(seed)
    following = torch.randint(3, VOCABULARY, (VOCABULARY, BRANCHES), generator=torch.Generator().manual_seed(99))
    walk = [torch.randint(3, VOCABULARY, (rows,), generator=chance)]
    for _ in range(HALF - 1):
        branch = torch.randint(0, BRANCHES, (rows,), generator=chance)
        walk.append(following[walk[-1], branch])
    once = torch.stack(walk, dim=1)
    return torch.cat([once, once], dim=1)


def _train(folder: Path, seed: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=1, eos_token_id=2, pad_token_id=0))
        rows = copying_rows(STEPS * BATCH, 1000 + seed)
        optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=STEPS, pct_start=0.1)
        for batch in rows.split(BATCH):
            model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
    model.save_pretrained(folder)
