"""Which plan: every candidate is assigned to the model as a job would, weighed, and the safest or the fastest that fits is chosen.

A pure function of spec and headers, so that the preflight, the worker and each of its restarts come to the same plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kompressor_api.hardware import ENGINES, Hardware
from kompressor_api.names import Reason
from kompressor_api.target import TargetSpec, passes_as_text
from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker.architectures import text_config
from kompressor_worker.assignment import Assignment
from kompressor_worker.errors import UserError
from kompressor_worker.layout import ModelLayout
from kompressor_worker.report_sections import size
from kompressor_worker.target.candidates import Candidate, candidates
from kompressor_worker.target.reductions import reductions
from kompressor_worker.target.serving import RESERVE, Need, Served, Speed

TRIES = 3
"""Plans that one job carries out at most."""


@dataclass(frozen=True)
class Row:
    """A candidate on this model and this GPU."""

    candidate: Candidate
    passes: tuple[Mapping[str, Any], ...] = ()
    refused: str = ""
    """Why it is not to be had here; empty: it is."""
    served: Served | None = None
    need: Need | None = None
    speed: Speed | None = None
    fits: bool = False

    @property
    def name(self) -> str:
        return self.candidate.name

    @property
    def loss(self) -> float:
        return self.candidate.loss

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"plan": self.name, "expectedIncrease": self.loss, "fits": self.fits}
        if self.need is None or self.speed is None:
            return {**found, "refused": self.refused}
        return {
            **found,
            "passes": [dict(entry) for entry in self.passes],
            **need_as_json(self.need),
            "bytesPerToken": self.speed.bytes_per_token,
            "tokensPerSecond": rounded(self.speed.tokens_per_second),
        }


@dataclass(frozen=True)
class Fit:
    """All rows, safest first, and what follows from them."""

    target: TargetSpec
    rows: tuple[Row, ...]
    longest: int | None
    """Tokens that the model was made for."""

    @property
    def on(self) -> Hardware:
        return self.target.on

    @cached_property
    def ladder(self) -> tuple[Row, ...]:
        """The chosen plan, then what is tried after a miss, each safer than the one before; empty: nothing fits."""
        fitting = [row for row in self.rows if row.fits]
        if not fitting:
            return ()
        chosen = fitting[0]
        if not self.target.quality_first:
            within = [row for row in fitting if row.loss <= self.target.gate.limit] or fitting[:1]
            chosen = max(within, key=lambda row: (_speed(row), -row.loss))
        safer = [row for row in reversed(fitting) if row.loss < chosen.loss]
        return (chosen, *safer[: TRIES - 1])

    @property
    def original(self) -> Row:
        return next(row for row in self.rows if row.candidate.weights.scheme is None and not row.candidate.calibrated)

    def refuse_if_nothing_fits(self) -> None:
        if not self.ladder:
            raise UserError(self.nearest(), Reason.DOES_NOT_FIT)

    def nearest(self) -> str:
        """What nothing fitting means: the smallest plan, what it takes, and what would have to change for it to fit."""
        smallest = min((row for row in self.rows if row.need), key=lambda row: row.need.total if row.need else 0)
        assert smallest.need is not None and smallest.served is not None
        need, on, served, target = smallest.need, self.on, smallest.served, self.target
        parts = f"weights {size(need.weights)}, KV cache {size(need.kv)}, activations {size(need.activations)}"
        asked = f"context {target.context:,}, concurrency {target.requests}"
        changes = []
        if context := served.longest(on, target.requests, target.context):
            changes.append(f"with context {context:,}")
        if target.requests > 1 and (requests := served.most_requests(on, target.context, target.requests)):
            changes.append(f"with concurrency {requests}")
        changes.append(f"on a GPU with {size(memory_for(need))}")
        return (
            f"spec.target: nothing fits {on.name} ({size(on.memory)}) at {asked}: the smallest plan, {smallest.name}, takes "
            f"{size(need.total)} ({parts}, overhead {size(need.overhead)}, reserve {size(need.reserve)}); it would fit {', or '.join(changes)}"
        )

    def status(self) -> dict[str, Any]:
        """As `status.plan.target` has it."""
        chosen, *others = self.ladder
        assert chosen.need is not None and chosen.speed is not None
        return {
            "name": chosen.name,
            "passes": passes_as_text([dict(entry) for entry in chosen.passes]),
            **need_as_json(chosen.need),
            "memoryBytes": self.on.memory,
            "tokensPerSecond": f"{chosen.speed.tokens_per_second:.4g}",
            **({"fallbacks": [row.name for row in others]} if others else {}),
        }

    def as_json(self) -> dict[str, Any]:
        """What `kompressor fit --json` says, and the report."""
        return {
            "gpu": self.on.name,
            "memoryBytes": self.on.memory,
            "bandwidth": round(self.on.bandwidth),
            "context": self.target.context,
            "concurrency": self.target.requests,
            "maxPerplexityIncrease": self.target.gate.limit,
            "prefer": "quality" if self.target.quality_first else "latency",
            **({"pricePerHour": price} if (price := self.target.price_per_hour) is not None else {}),
            "ladder": [row.name for row in self.ladder],
            "plans": [row.as_json() for row in self.rows],
        }


def fit(spec: CompressionJobSpec, source: ModelLayout) -> Fit:
    """Raises UserError where the model cannot be planned for at all; that nothing fits is in the answer."""
    target = spec.target
    assert target is not None
    longest = longest_context(source)
    if longest is not None and target.context > longest:
        raise UserError(f"spec.target.context: {target.context:,} is longer than the {longest:,} tokens that the model was made for; ask for less")
    plain = Assignment.of(spec.model_copy(update={"passes": []}), source)  # what is wrong with the model itself
    data = spec.calibration is not None
    rows = [_row(each, spec, source, plain) for each in candidates(reductions(source, target.context), data)]
    return Fit(target, tuple(rows), longest)


def _row(candidate: Candidate, spec: CompressionJobSpec, source: ModelLayout, plain: Assignment) -> Row:
    target = spec.target
    assert target is not None
    on, scheme = target.on, candidate.weights.scheme
    engine = ENGINES[on.engine]
    if scheme is not None and not engine.schemes[scheme].on(on.capability):
        return Row(candidate, refused=engine.schemes[scheme].says(scheme, on))
    if candidate.kv and not engine.kv_fp8.on(on.capability):
        return Row(candidate, refused=engine.kv_fp8.says("a KV cache in FP8", on))
    if candidate.calibrated and spec.calibration is None:
        return Row(candidate, refused="needs calibration, which the job does not have")
    refused = ""
    for passes in candidate.variants(spec.calibration is not None):
        try:
            assigned = Assignment.of(spec.model_copy(update={"passes": passes}), source) if passes else plain
        except UserError as error:
            refused = refused or str(error)
            continue
        served = Served.of(assigned)
        need, speed = served.need(on, target.context, target.requests), served.speed(on, target.context, target.requests)
        return Row(candidate, tuple(passes), "", served, need, speed, need.total <= on.memory)
    return Row(candidate, refused=refused)


def longest_context(layout: ModelLayout) -> int | None:
    """As vLLM derives it: config.json's, stretched where positions are scaled and it says the length before."""
    config = text_config(layout.config)
    positions = config.get("max_position_embeddings")
    if type(positions) is not int:
        return None
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor")
    if kind == "yarn" and isinstance(factor, int | float):
        return round(factor * int(scaling.get("original_max_position_embeddings") or positions))
    if kind in ("linear", "dynamic") and isinstance(factor, int | float):
        return round(factor * positions)
    return positions


def memory_for(need: Need) -> int:
    """Of a GPU that this would fit, with its own reserve."""
    return round((need.total - need.reserve) / (1 - RESERVE)) + 1


def need_as_json(need: Need) -> dict[str, int]:
    return {
        "weightBytes": need.weights,
        "kvBytes": need.kv,
        "activationBytes": need.activations,
        "overheadBytes": need.overhead,
        "reserveBytes": need.reserve,
        "totalBytes": need.total,
    }


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _speed(row: Row) -> float:
    return row.speed.tokens_per_second if row.speed else 0.0
