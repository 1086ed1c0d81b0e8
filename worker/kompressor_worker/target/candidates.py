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

    fed: bool = False
    """Whether GPTQ makes it where there is data."""
    grouped: bool = False

    def variants(self, data: bool) -> tuple[Passes, ...]:
        """Passes that make it, the first that a model takes is meant."""
        if self.scheme is None:
            return ((),)
        ways = ("gptq", "rtn") if data and self.fed else ("rtn",)
        if self.grouped:
            return tuple(({ways[0]: {"scheme": self.scheme, "groupSize": size}},) for size in GROUPS)
        return tuple(({way: {"scheme": self.scheme}},) for way in ways)


@dataclass(frozen=True)
class Pair:
    """What is mixed by measured sensitivity."""

    small: Weights
    large: Weights
    candidates: tuple[str, ...]
    """As autoScheme has them."""

    def schemes(self, group: int | None) -> list[str]:
        return [name.format(group=group) for name in self.candidates]


@dataclass(frozen=True)
class Palette:
    """What there is to choose from for an engine."""

    weights: tuple[Weights, ...]
    reduced: tuple[str, ...]
    """Those that are tried with windows and with fewer experts."""
    kv: bool
    """Whether a cache in FP8 is."""
    adaptive: Pair | None


W8A16 = Weights("W8A16", "W8A16", 0.001, 0.001)
W4A16 = Weights("W4A16", "W4A16", 0.018, 0.04, fed=True, grouped=True)
PALETTES: Mapping[str, Palette] = {
    "vllm": Palette(
        weights=(
            Weights("16 bits", None, 0.0, 0.0),
            W8A16,
            Weights("FP8", "FP8_DYNAMIC", 0.003, 0.003),
            Weights("W8A8", "W8A8", 0.005, 0.007, fed=True),
            W4A16,
            Weights("NVFP4", "NVFP4", 0.03, 0.03, calibrated=True),
            Weights("MXFP4", "MXFP4", 0.05, 0.05),
        ),
        reduced=("W8A16", "FP8", "W4A16"),
        kv=True,
        adaptive=Pair(W4A16, W8A16, ("W4A16:{group}", "W8A16")),
    ),
    # llama.cpp's mixes, most bits first; without data about what its own tables say of models of 7 and 8 billion parameters
    "llama.cpp": Palette(
        weights=(
            Weights("16 bits", None, 0.0, 0.0),
            Weights("Q8_0", "Q8_0", 0.0005, 0.0005),
            Weights("Q6_K", "Q6_K", 0.002, 0.003),
            Weights("Q5_K_M", "Q5_K_M", 0.005, 0.008, fed=True),
            Weights("Q4_K_M", "Q4_K_M", 0.015, 0.025, fed=True),
            Weights("Q4_K_S", "Q4_K_S", 0.02, 0.033, fed=True),
            Weights("Q3_K_M", "Q3_K_M", 0.045, 0.08, fed=True),
            Weights("Q3_K_S", "Q3_K_S", 0.08, 0.15, fed=True),
            Weights("Q2_K", "Q2_K", 0.15, 0.35, fed=True),
        ),
        reduced=("Q8_0", "Q4_K_M"),
        kv=False,
        adaptive=None,
    ),
}
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


def candidates(reductions: Sequence[Reduction], data: bool, engine: str) -> list[Candidate]:
    """All of them, from the safest to the boldest. `data`: whether there is calibration."""
    palette = PALETTES[engine]
    caches = (False, True) if palette.kv else (False,)
    made = [_candidate(weights, kv, None, data) for weights in palette.weights for kv in caches]
    made += [_candidate(w, kv, r, data) for r in reductions for w in palette.weights if w.name in palette.reduced for kv in caches]
    return sorted(made, key=lambda c: c.loss)


def adaptive(pair: Pair, kv: bool, share: float) -> Candidate:
    """Few bits in as few linears as a budget allows, `share` of them: those come first that lose least, so loss grows with its square."""
    loss = pair.large.loss + (pair.small.loss - pair.large.loss) * min(1.0, max(0.0, share)) ** 2
    name = f"{pair.small.name} and {pair.large.name} by sensitivity"
    return _candidate(Weights(name, pair.small.scheme, round(loss, 5), 0.0, calibrated=True), kv, None, True)


def _candidate(weights: Weights, kv: bool, reduction: Reduction | None, data: bool) -> Candidate:
    parts = [*([reduction.name] if reduction else []), weights.name, *(["KV FP8"] if kv else [])]
    loss = (weights.loss if data else weights.loss_without_data) + (KV_LOSS if kv else 0.0) + (reduction.loss if reduction else 0.0)
    return Candidate(", ".join(parts), weights, kv, reduction, round(loss, 6), weights.calibrated or kv or reduction is not None)
