"""A small Llama that looks far in a few of its layers: rows whose second half says the first once more.

The first half is a random walk, which the last token alone predicts in part; the second half is the same walk. Nothing within a window that
is shorter than half a row tells how it goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import smaller
import torch
from torch import Tensor
from windowed import FULL, SLIDING, variant

import jobs
from models import cached

__all__ = ["DEEP", "HALF", "LAYERS", "WINDOW", "Windows", "copying_model", "copying_rows"]

HALF, VOCABULARY, LAYERS, DEEP, WINDOW = 24, 32, 6, 12, 8
STEPS, BATCH, BRANCHES, RATE = 240, 16, 8, 5e-3
SLOWER = {"steps": 300, "rate": 3e-3}
"""With DEEP layers in place of LAYERS."""
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
ROWS = 48
"""That layers are chosen and judged by."""
VERSION = 1
"""Part of the cache's key: raise it when the code below changes what comes out."""


def copying_model(seed: int = 0, layers: int = LAYERS) -> Path:
    """Folder of the trained checkpoint, fp32, in the cache. Not to be written to."""
    shape = {**SHAPE, "num_hidden_layers": layers}
    how: dict[str, Any] = {"steps": STEPS, "rate": RATE} if layers == LAYERS else SLOWER
    recipe = [shape, how["steps"], BATCH, HALF, BRANCHES, how["rate"], seed, VERSION, version("transformers")]
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    return cached("models", f"copying-{digest}", lambda folder: _train(folder, seed, shape, **how))


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


@dataclass
class Windows:
    """A job that gives such a model a window in all but a few layers, and what these and other layers leave of it."""

    source: Path
    layers: int
    out: Path
    said: dict[str, Any]
    """kompressor.json."""
    known: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, seed: int, full: int, folder: Path, layers: int = LAYERS) -> Windows:
        from kompressor_worker.job import load_job
        from kompressor_worker.progress import Progress
        from kompressor_worker.run import run

        source = copying_model(seed, layers)
        passes = [{"hybridAttention": {"window": WINDOW, "fullLayers": full, "samples": ROWS}}]
        body = jobs.manifest(source.as_uri(), (folder / "out").as_uri(), passes)
        for section, drawn in (("calibration", 1), ("evaluation", 2)):
            path = folder / f"{section}.jsonl"
            path.write_text("".join(json.dumps({"ids": row}) + "\n" for row in copying_rows(ROWS, drawn).tolist()))
            body["spec"][section] = {"dataset": {"uri": path.as_uri(), "tokens": "ids"}, "samples": ROWS, "sequenceLength": 2 * HALF}
        run(load_job(jobs.write(folder / "job.json", body), {}), {}, Progress(), threading.Event())
        return cls(source, layers, folder / "out", json.loads((folder / "out" / "kompressor.json").read_text()))

    @cached_property
    def _original(self) -> Tensor:
        return smaller.log_probabilities(self.source, copying_rows(ROWS, 2))

    @property
    def chosen(self) -> tuple[int, ...]:
        return tuple(self.said["attention"]["windows"]["fullLayers"])

    @property
    def alone(self) -> tuple[int, ...]:
        """Those that lose most by a window in them alone."""
        scores = self.said["attention"]["windows"]["scores"]["divergence"]
        return tuple(sorted(sorted(range(self.layers), key=lambda layer: -scores[layer])[: len(self.chosen)]))

    def even(self) -> list[tuple[int, ...]]:
        """Every k-th layer, from each of the first k on."""
        step = self.layers // len(self.chosen)
        return [tuple(range(first, self.layers, step)) for first in range(step)]

    def divergence(self, full: tuple[int, ...]) -> Tensor:
        """fp64 [rows], of the held-out rows, by transformers: with full attention in these layers."""
        if full not in self.known:
            made = variant(self.out, f"full-{full}", [FULL if layer in full else SLIDING for layer in range(self.layers)])
            p, q = self._original, smaller.log_probabilities(made, copying_rows(ROWS, 2))
            self.known[full] = (p.exp() * (p - q)).sum(-1).mean(-1)
            shutil.rmtree(made)
        return self.known[full]


def _train(folder: Path, seed: int, shape: Mapping[str, Any], steps: int, rate: float) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=0))
        rows = copying_rows(steps * BATCH, 1000 + seed)
        optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
        for batch in rows.split(BATCH):
            model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
    model.save_pretrained(folder)
