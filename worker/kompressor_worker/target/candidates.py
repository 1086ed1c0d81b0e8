"""The plans that there are to choose from, as data: what each does to weights, cache, windows and experts, and what it is expected to cost.

The expected loss is a class, by how much perplexity usually rises in models of some billions of parameters: good for an order and for
leaving out what is hopeless, not for a promise. What is measured after the run decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Passes = tuple[Mapping[str, Any], ...]
GROUPS = (128, 64, 32)
"""Columns that share a scale at 4 bits: the first that divides the model's shapes."""


@dataclass(frozen=True)
class Weights:
    """One way to store the linears."""

    name: str
    scheme: str | None
    """What an engine has to run; None: nothing but 16 bits."""
    loss: float
    loss_without_data: float
    """The same rounded to nearest, where there is nothing to calibrate with."""
    calibrated: bool = False
    """Whether it cannot be done without calibration."""

    def variants(self, data: bool) -> tuple[Passes, ...]:
        """Passes that make it, the first that a model takes is meant."""
        if self.scheme is None:
            return ((),)
        by = "gptq" if data and self.scheme in ("W4A16", "W8A8") else "rtn"
        if self.scheme == "W4A16":
            return tuple(({by: {"scheme": self.scheme, "groupSize": size}},) for size in GROUPS)
        return (({by: {"scheme": self.scheme}},),)


WEIGHTS = (
    Weights("16 bits", None, 0.0, 0.0),
    Weights("W8A16", "W8A16", 0.001, 0.001),
    Weights("FP8", "FP8_DYNAMIC", 0.003, 0.003),
    Weights("W8A8", "W8A8", 0.005, 0.007),
    Weights("W4A16", "W4A16", 0.018, 0.04),
    Weights("NVFP4", "NVFP4", 0.03, 0.03, calibrated=True),
    Weights("MXFP4", "MXFP4", 0.05, 0.05),
)
EIGHT = ("W8A16", "FP8")
SMALL, LARGE = "W4A16", "W8A16"
KV: Passes = ({"kvCache": {"scheme": "FP8"}},)
KV_LOSS = 0.001


@dataclass(frozen=True)
class Reduction:
    """What comes before the weights are quantised: fewer experts, shorter looks back."""

    name: str
    passes: Passes
    loss: float


@dataclass(frozen=True)
class Candidate:
    name: str
    weights: Weights
    kv: bool
    """Whether the cache is in FP8."""
    reduction: Reduction | None
    loss: float
    calibrated: bool

    def variants(self, data: bool) -> Iterator[Passes]:
        before = self.reduction.passes if self.reduction else ()
        for passes in self.weights.variants(data):
            yield (*before, *passes, *(KV if self.kv else ()))


def candidates(reductions: Sequence[Reduction], data: bool) -> list[Candidate]:
    """All of them, from the safest to the boldest. `data`: whether there is calibration."""
    made = [_candidate(weights, kv, None, data) for weights in WEIGHTS for kv in (False, True)]
    made += [_candidate(w, kv, r, data) for r in reductions for w in WEIGHTS if w.name in (*EIGHT, SMALL) for kv in (False, True)]
    return sorted(made, key=lambda c: c.loss)


def adaptive(kv: bool, share: float) -> Candidate:
    """4 bits in as few linears as a budget allows, `share` of them: those come first that lose least, so loss grows with its square."""
    small, large = (next(w for w in WEIGHTS if w.name == name) for name in (SMALL, LARGE))
    loss = large.loss + (small.loss - large.loss) * min(1.0, max(0.0, share)) ** 2
    return _candidate(Weights("W4A16 and W8A16 by sensitivity", SMALL, round(loss, 5), 0.0, calibrated=True), kv, None, True)


def _candidate(weights: Weights, kv: bool, reduction: Reduction | None, data: bool) -> Candidate:
    parts = [*([reduction.name] if reduction else []), weights.name, *(["KV FP8"] if kv else [])]
    loss = (weights.loss if data else weights.loss_without_data) + (KV_LOSS if kv else 0.0) + (reduction.loss if reduction else 0.0)
    return Candidate(", ".join(parts), weights, kv, reduction, round(loss, 6), weights.calibrated or kv or reduction is not None)
