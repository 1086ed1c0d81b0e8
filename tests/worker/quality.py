"""How good published results are: real jobs, read by transformers with compressed-tensors, judged by their KL from the source on held-out
rows and a paired bootstrap over these (Efron and Tibshirani 1993)."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import jobs
from calibrated_jobs import samples
from independent import expand, tensors_of
from kompressor_worker.job import load_job
from kompressor_worker.progress import Progress
from kompressor_worker.run import run

__all__ = ["Laboratory", "Weighed", "interval", "require_ratio"]

Passes = Sequence[Mapping[str, Any]]
DRAWS = 2000


class Laboratory:
    """Compresses models and measures what came out; what many comparisons share is measured once."""

    def __init__(self, folder: Path, calibration: Path, held_out: Tensor) -> None:
        """`calibration`: JSON lines of text; `held_out` token ids [rows, length]."""
        self.folder, self.calibration, self.held_out = folder, calibration, held_out
        self._known: dict[str, Tensor] = {}

    def original(self, source: Path) -> Tensor:
        """Log-probabilities of the uncompressed model."""
        return self._once(f"{source}", lambda: self._log_probabilities(source))

    def baseline(self, source: Path, passes: Passes) -> Tensor:
        """`divergence`, kept: for what is never switched off."""
        return self._once(f"{source} {json.dumps(passes)}", lambda: self.divergence(source, passes))

    def divergence(self, source: Path, passes: Passes) -> Tensor:
        """fp64 [rows]: mean over the tokens of a held-out row of KL(source || result), nats, of a job with these passes."""
        published = self._compress(source, passes)
        p, q = self.original(source), self._log_probabilities(published)
        shutil.rmtree(published)
        return (p.exp() * (p - q)).sum(-1).double().mean(-1)

    def _once(self, key: str, measure: Callable[[], Tensor]) -> Tensor:
        if key not in self._known:
            self._known[key] = measure()
        return self._known[key]

    def _compress(self, source: Path, passes: Passes) -> Path:
        body = jobs.manifest(source.as_uri(), (self.folder / "out").as_uri(), passes)
        body["spec"] |= samples({"calibration": self.calibration.as_uri()})
        run(load_job(jobs.write(self.folder / "job.json", body), {}), {}, Progress(), threading.Event())
        return self.folder / "out"

    def _log_probabilities(self, folder: Path) -> Tensor:
        """fp32 [rows, length, vocabulary]."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            batches = [model(input_ids=rows, use_cache=False).logits.log_softmax(-1) for rows in self.held_out.split(32)]
        return torch.cat(batches)


class Weighed(Laboratory):
    """Knows what its results weigh, and what their reports say; mixtures are decompressed by the library, for transformers takes all
    experts for encoded alike."""

    def __init__(self, folder: Path, calibration: Path, held_out: Tensor) -> None:
        super().__init__(folder, calibration, held_out)
        self.weights: dict[str, int] = {}
        self.reports: dict[str, dict[str, Any]] = {}

    def divergence(self, source: Path, passes: Passes) -> Tensor:
        published = self._compress(source, passes)
        self.weights[json.dumps(passes)] = sum(t.numel() * t.element_size() for t in tensors_of(published).values())
        self.reports[json.dumps(passes)] = json.loads((published / "kompressor.json").read_text())
        plain = expand(published, self.folder / "plain")
        p, q = self.original(source), self._log_probabilities(plain)
        for folder in (published, plain):
            shutil.rmtree(folder)
        return (p.exp() * (p - q)).sum(-1).double().mean(-1)


def interval(kl: Tensor, baseline: Tensor) -> tuple[float, float, float]:
    """Both fp64 [rows], of the same rows: the mean of the one over that of the other, and the ends of its 95 % interval."""
    assert kl.shape == baseline.shape and bool(kl.isfinite().all()) and bool((baseline > 0).all())
    drawn = torch.randint(len(kl), (DRAWS, len(kl)), generator=torch.Generator().manual_seed(0))
    low, high = (kl[drawn].mean(1) / baseline[drawn].mean(1)).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(kl.mean() / baseline.mean()), low, high


def require_ratio(kl: Tensor, baseline: Tensor, below: float) -> None:
    """Raises AssertionError unless the upper end of the `interval` of these is below the bound."""
    share, low, high = interval(kl, baseline)
    said = f"KL {float(kl.mean()):.3g} is {share:.3f} [{low:.3f}, {high:.3f}] of {float(baseline.mean()):.3g}"
    assert high < below, f"{said}, allowed is less than {below}"
