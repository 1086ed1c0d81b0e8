"""Mixtures with fewer experts, by real jobs and cut by hand at random, judged by their KL on held-out rows."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mixtures
import smaller
import torch
from torch import Tensor

import jobs
from independent import tensors_of
from kompressor_worker.job import load_job
from kompressor_worker.progress import Progress
from kompressor_worker.run import run

__all__ = ["LENGTH", "METHODS", "Bench"]

LENGTH, DRAWS = 128, 10
METHODS: dict[str, dict[str, Any]] = {
    "reap": {"pruneExperts": {}},
    "frequency": {"pruneExperts": {"importance": "frequency"}},
    "merge": {"mergeExperts": {}},
}


@dataclass
class Bench:
    """A model, data of its kind, and what has been measured of it."""

    source: Path
    calibration: Tensor
    held_out: Tensor
    folder: Path
    seen: dict[str, Tensor] = field(default_factory=dict)

    def original(self) -> Tensor:
        if "source" not in self.seen:
            self.seen["source"] = smaller.log_probabilities(self.source, self.held_out)
        return self.seen["source"]

    def divergence(self, result: Path) -> Tensor:
        """fp64 [rows]: mean KL of each held-out row, by transformers."""
        p, q = self.original(), smaller.log_probabilities(result, self.held_out)
        return (p.exp() * (p - q)).sum(-1).mean(-1)

    def of(self, method: str, ratio: float) -> Tensor:
        """Of a job, kept."""
        key = f"{method} {ratio}"
        if key not in self.seen:
            ((name, params),) = METHODS[method].items()
            self.seen[key] = self.divergence(self.compress([{name: {"ratio": ratio, **params}}], key))
        return self.seen[key]

    def compress(self, passes: list[dict[str, Any]], key: str) -> Path:
        place = self.folder / key.replace(" ", "-")
        place.mkdir()
        data = place / "rows.jsonl"
        data.write_text("".join(json.dumps({"ids": row}) + "\n" for row in self.calibration.tolist()))
        body = jobs.manifest(self.source.as_uri(), (place / "out").as_uri(), passes)
        drawn = {"dataset": {"uri": data.as_uri(), "tokens": "ids"}, "samples": len(self.calibration), "sequenceLength": LENGTH}
        body["spec"]["calibration"] = drawn
        run(load_job(jobs.write(place / "job.json", body), {}), {}, Progress(), threading.Event())
        return place / "out"

    def drawn(self, ratio: float) -> Tensor:
        """fp64 [draws, rows]: of models with random experts, each layer its own."""
        key = f"random {ratio}"
        if key not in self.seen:
            state, number = tensors_of(self.source), mixtures.expert_count(self.source)
            layers, found = sorted({int(m[2]) for name in state if (m := mixtures.EXPERT.fullmatch(name))}), []
            for seed in range(DRAWS):
                chance = torch.Generator().manual_seed(seed)
                kept = {n: torch.randperm(number, generator=chance)[: round(number * (1 - ratio))].sort().values.tolist() for n in layers}
                cut = mixtures.write(self.source, self.folder / f"{key}-{seed}", mixtures.cut_experts(state, kept))
                found.append(self.divergence(cut))
            self.seen[key] = torch.stack(found)
        return self.seen[key]
