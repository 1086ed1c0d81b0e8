"""Candidates on one model and one GPU: whether it takes them, what they take of it, how fast they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kompressor_api.hardware import ENGINES
from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker.assignment import Assignment
from kompressor_worker.errors import UserError
from kompressor_worker.layout import ModelLayout
from kompressor_worker.passes import REGISTRY
from kompressor_worker.target.candidates import KV, PALETTES, Candidate, Passes, adaptive
from kompressor_worker.target.serving import Need, Served, Speed

LEAST_ROOM = 0.03
"""By how much more than 4 bits everywhere there must be room for, so that a choice is worth its survey."""
NO_DATA = "needs calibration, which the job does not have"


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
    proved: bool = False
    """Whether its passes were assigned to the model as they are."""
    budget: int = 0
    """Bytes of tensors that its passes may come to; before a survey they are known no better."""

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


class Weighing:
    """Candidates on one model. To assign passes to tens of thousands of tensors takes seconds, so what an FP8 cache changes, which is the
    same for all, is found once and added; a plan that is to be carried out is assigned as it is."""

    def __init__(self, spec: CompressionJobSpec, source: ModelLayout) -> None:
        assert spec.target is not None
        self.spec, self.source, self.target = spec, source, spec.target
        self.on = spec.target.on
        self.data = spec.calibration is not None
        self.scales = 0
        """Bytes of those of an FP8 cache."""

    def rows(self, wanted: Sequence[Candidate]) -> tuple[Row, ...]:
        """Raises UserError for what is wrong with the model itself."""
        plain = self._assigned([])
        self.scales, no_kv = self._kv(plain)
        weighed: dict[tuple[str, str], Row] = {}
        found = []
        for candidate in sorted(wanted, key=lambda c: c.kv):
            place = (candidate.weights.name, candidate.reduction.name if candidate.reduction else "")
            if not candidate.kv:
                row = self._row(candidate, plain if place == ("16 bits", "") else None)
                weighed[place] = row
            elif no_kv:
                row = Row(candidate, refused=no_kv)
            else:
                before = weighed[place]
                served = before.served.with_small_cache(self.scales) if before.served else None
                row = self._weighed(Row(candidate, (*before.passes, *KV), before.refused, served))
            found.append(row)
        found += self._adaptive({(row.candidate.weights.name, row.candidate.kv): row for row in found if row.candidate.reduction is None})
        return tuple(sorted(found, key=lambda row: (row.loss, row.name)))

    def proved(self, row: Row) -> Row:
        try:
            served = Served.of(self._assigned(row.passes))
        except UserError as error:
            return Row(row.candidate, refused=str(error), proved=True)
        return self._weighed(replace(row, served=served, proved=True))

    def _row(self, candidate: Candidate, known: Assignment | None) -> Row:
        if known is not None:
            return self._weighed(Row(candidate, (), "", Served.of(known), proved=True))
        schemes, scheme = ENGINES[self.on.engine].schemes, candidate.weights.scheme
        if schemes is not None and scheme is not None and (scheme not in schemes or not schemes[scheme].on(self.on)):
            runs = schemes.get(scheme)
            return Row(candidate, refused=runs.says(scheme, self.on) if runs else f"{self.on.engine} does not run {scheme}")
        if candidate.calibrated and not self.data:
            return Row(candidate, refused=NO_DATA)
        refused = ""
        for passes in candidate.variants(self.data):
            try:
                return self._weighed(Row(candidate, passes, "", Served.of(self._assigned(passes)), proved=True))
            except UserError as error:
                refused = refused or str(error)
        return Row(candidate, refused=refused)

    def _adaptive(self, weighed: Mapping[tuple[str, bool], Row]) -> list[Row]:
        """4 bits and 8, by measured sensitivity, under the budget that the rest leaves: where 4 bits fit and 8 do not."""
        both = PALETTES[self.on.engine].adaptive
        if both is None or "autoScheme" not in REGISTRY or not self.data:
            return []
        found = []
        for kv in sorted({kv for _, kv in weighed}):
            small, large = weighed[both.small.name, kv], weighed[both.large.name, kv]
            if small.need is None or large.need is None or not (small.fits and not large.fits):
                continue
            budget = self.on.memory - (small.need.total - small.need.weights)
            low, high = small.need.weights, large.need.weights
            if budget < (1 + LEAST_ROOM) * low:
                continue
            params = next(iter(small.passes[0].values()))
            candidate = adaptive(both, kv, (high - budget) / (high - low))
            made = {"budget": {"bytes": budget - (self.scales if kv else 0)}, "candidates": both.schemes(params.get("groupSize"))}
            row = self.proved(Row(candidate, ({"autoScheme": made}, *(KV if kv else ())), budget=budget))
            found.append(row)
        return found

    def _kv(self, plain: Assignment) -> tuple[int, str]:
        """Bytes of the scales of an FP8 cache, or why there is none."""
        runs = ENGINES[self.on.engine].kv_fp8
        if runs is None:
            return 0, "files say nothing of the cache"
        if not runs.on(self.on):
            return 0, runs.says("a KV cache in FP8", self.on)
        if not self.data:
            return 0, NO_DATA
        try:
            return Served.of(self._assigned(KV)).weights - Served.of(plain).weights, ""
        except UserError as error:
            return 0, str(error)

    def _assigned(self, passes: Passes | Sequence[Mapping[str, Any]]) -> Assignment:
        return Assignment.of(self.spec.model_copy(update={"passes": [dict(entry) for entry in passes]}), self.source)

    def _weighed(self, row: Row) -> Row:
        if row.served is None:
            return row
        served = row.served.at_least(row.budget)
        asked = (self.on, self.target.context, self.target.requests)
        need = served.need(*asked)
        return replace(row, served=served, need=need, speed=served.speed(*asked), fits=need.total <= self.on.memory)


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
