"""Which plan: every candidate is assigned to the model as a job would, weighed, and the safest or the fastest that fits is chosen.

A pure function of spec and headers, so that the preflight, the worker and each of its restarts come to the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kompressor_api.hardware import ENGINES, Hardware
from kompressor_api.names import Reason
from kompressor_api.target import TargetSpec, passes_as_text
from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker.architectures import text_config
from kompressor_worker.errors import UserError
from kompressor_worker.layout import ModelLayout
from kompressor_worker.report_sections import size
from kompressor_worker.target.candidates import candidates
from kompressor_worker.target.reductions import reductions
from kompressor_worker.target.serving import Need
from kompressor_worker.target.weighing import Row, Weighing, need_as_json

HOPELESS = 4
"""Plans that are expected to lose so many times what is allowed are not tried."""
TRIES = 3
"""Plans that one job carries out at most."""


@dataclass(frozen=True)
class Fit:
    """All rows, safest first, and what follows from them."""

    target: TargetSpec
    rows: tuple[Row, ...]

    @property
    def on(self) -> Hardware:
        return self.target.on

    @cached_property
    def ladder(self) -> tuple[Row, ...]:
        """The chosen plan, then what is tried after a miss, each safer than the one before; empty: nothing fits."""
        fitting = [row for row in self.rows if row.fits and not self.hopeless(row)]
        if not fitting:
            return ()
        chosen = fitting[0]
        if not self.target.quality_first:
            within = [row for row in fitting if row.loss <= self.target.gate.limit] or fitting[:1]
            chosen = max(within, key=lambda row: (_speed(row), -row.loss))
        return (chosen, *self._steps(chosen, fitting))

    def _steps(self, chosen: Row, fitting: Sequence[Row]) -> list[Row]:
        """Each the boldest that is expected to lose at most half of what the one before was: a smaller step is hardly worth a run. Where
        there is none, the next safer one."""
        steps, last = list[Row](), chosen
        while len(steps) < TRIES - 1 and (safer := [row for row in fitting if row.loss < last.loss]):
            clearly = [row for row in safer if row.loss <= last.loss / 2]
            last = (clearly or safer)[-1]
            steps.append(last)
        return steps

    def hopeless(self, row: Row) -> bool:
        """Whether hours of work would most likely end in a miss."""
        return row.loss > HOPELESS * self.target.gate.limit

    @property
    def original(self) -> Row:
        return next(row for row in self.rows if row.candidate.weights.scheme is None and not row.candidate.calibrated)

    def refuse_if_nothing_fits(self) -> None:
        if not self.ladder:
            raise UserError(self.nearest(), Reason.DOES_NOT_FIT)

    def nearest(self) -> str:
        """What nothing to choose from means."""
        fitting = [row for row in self.rows if row.fits]
        if not fitting:
            return self._too_large()
        safest = fitting[0]
        expected, allowed = f"{100 * safest.loss:.3g}", f"{100 * self.target.gate.limit:.3g}"
        return (
            f"spec.target: what fits {self.on.name} ({size(self.on.memory)}) loses too much: the safest plan, {safest.name}, is expected "
            f"to cost about {expected} % perplexity, and maxPerplexityIncrease is {allowed} %; raise it to {expected}%, or ask for a "
            f"smaller context or concurrency, or a larger {self.on.kind}"
        )

    def _too_large(self) -> str:
        """What nothing fitting means: the smallest plan, what it takes, and what would have to change for it to fit."""
        smallest = min((row for row in self.rows if row.need), key=lambda row: row.need.total if row.need else 0)
        assert smallest.need is not None
        need, on, target = smallest.need, self.on, self.target
        served = [row.served for row in self.rows if row.served is not None]
        parts = (
            f"weights {size(need.weights)}, KV cache {size(need.kv)}, activations {size(need.activations)}, overhead "
            f"{size(need.overhead)}, reserve {size(need.reserve)}"
        )
        asked = f"context {target.context:,}, concurrency {target.requests}"
        changes = []
        if context := max(each.longest(on, target.requests, target.context) for each in served):
            changes.append(f"with context {context:,}")
        if target.requests > 1 and (requests := max(each.most_requests(on, target.context, target.requests) for each in served)):
            changes.append(f"with concurrency {requests}")
        changes.append(f"on a {on.kind} with {size(memory_for(need, on))}")
        return (
            f"spec.target: nothing fits {on.name} ({size(on.memory)}) at {asked}: the smallest plan, {smallest.name}, takes "
            f"{size(need.total)} ({parts}); it would fit {', or '.join(changes)}"
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
            "engine": self.on.engine,
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
        raise UserError(
            f"spec.target.context: {target.context:,} is above the {longest:,} tokens that the model was made for; ask for less"
        )
    rows = Weighing(spec, source).rows(candidates(reductions(source, spec), spec.calibration is not None, target.on.engine))
    found = Fit(target, rows)
    while unproved := next((row for row in found.ladder if not row.proved), None):
        found = Fit(target, tuple(Weighing(spec, source).proved(row) if row is unproved else row for row in found.rows))
    return found


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


def memory_for(need: Need, on: Hardware) -> int:
    """Of other hardware of its kind that this would fit, with its own reserve."""
    if on.kept is not None:
        return need.total
    return round((need.total - need.reserve) / (1 - ENGINES[on.engine].reserve)) + 1


def _speed(row: Row) -> float:
    """So that a hair's breadth decides nothing."""
    return float(f"{row.speed.tokens_per_second:.3g}") if row.speed else 0.0
