"""What the passes that set single weights to zero are asked for alike, and how a layout tells what they will do. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from kompressor_api.fields import Number
from kompressor_worker.errors import UserError
from kompressor_worker.layout import LinearLayout, ModelLayout, StageLayout
from kompressor_worker.passes import Pass
from kompressor_worker.passes.allocation import KINDS, LARGEST, TRIED, allocate, trials
from kompressor_worker.passes.linear_params import TargetParams
from kompressor_worker.passes.selection import choose
from kompressor_worker.schemes import Scheme
from kompressor_worker.sparsity import Sparsity

if TYPE_CHECKING:
    import torch

    from kompressor_worker.passes.surveyor import Surveyor

MOST = 32
"""Neighbours of a pattern at most."""


class SparsityParams(TargetParams):
    """Base of the parameters of a pass that sets weights to zero."""

    sparsity: Number | None = Field(
        default=None,
        gt=0.0,
        le=LARGEST,
        description="Share of the targeted linears' weights that become zero. Either this or pattern.",
    )
    pattern: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,2}:[0-9]{1,2}$", max_length=5)] | None = Field(
        default=None,
        description="N:M, such as 2:4: of M neighbours in a row N are kept. M must divide the columns of every target.",
    )

    allocation: Literal["uniform", "error"] = Field(
        default="uniform",
        description=(
            "uniform: every target gets this sparsity. error: more zeros, 0 to 95%, where a survey of the source with calibration data "
            "finds that they cost less. Only with sparsity."
        ),
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError("give either sparsity, such as 0.5, or pattern, such as 2:4")
        if self.pattern is not None and self.allocation != "uniform":
            raise ValueError(f"pattern {self.pattern} is the same everywhere: leave allocation out, or give sparsity in its place")
        if self.pattern is not None:
            keep, of = map(int, self.pattern.split(":"))
            if not 1 <= keep < of <= MOST:
                raise ValueError(f"pattern {self.pattern}: N of every M weights are kept, with 1 <= N < M <= {MOST}; such as 2:4 or 4:8")
        return self

    def wanted(self) -> Sparsity:
        return Sparsity(self.sparsity) if self.sparsity is not None else Sparsity.of_pattern(self.pattern or "")


def marked(
    layout: ModelLayout, params: SparsityParams, by: str, zeros: Mapping[str, int] | None = None
) -> tuple[ModelLayout, list[LinearLayout]]:
    """The layout with what the pass `by` prunes marked in it, and those linears. What an earlier pass prunes is left out.
    `zeros`: of those linears that get another number than `params` says, by name.

    Raises UserError: targets that match nothing, a linear whose columns a pattern does not divide, a head."""
    sparsity = params.wanted()
    earlier = {linear.name for linear in layout.linears() if linear.pruned is not None}
    chosen = choose(layout, earlier, params.targets, params.ignore, "prune")
    for linear in chosen:
        if linear.kind == "head":
            raise UserError(f"{by}: {linear.name} is the head, which stays dense; take it out of targets")
        if sparsity.of and linear.shape[1] % sparsity.of:
            raise UserError(
                f"{by}: {linear.name}: {linear.shape[1]} columns not divisible by the {sparsity.of} of pattern {sparsity}; "
                "choose another pattern, or list it under ignore"
            )
    own = {x.name: Sparsity(zeros[x.name] / prod(x.shape)) for x in chosen if zeros and x.name in zeros}
    asked = {linear.name: replace(linear, pruned=own.get(linear.name, sparsity)) for linear in chosen}

    def stage(old: StageLayout) -> StageLayout:
        return replace(old, linears=tuple(asked.get(x.name, x) for x in old.linears))

    units = tuple(replace(unit, stages=tuple(map(stage, unit.stages))) for unit in layout.units)
    return replace(layout, units=units), list(asked.values())


class SparsityPass(Pass):
    """Base of a pass that sets weights to zero: what it speaks of headers."""

    name: ClassVar[str]
    prunes = True
    scored: ClassVar[bool] = True
    """Whether it looks at the norms of inputs, and goes row by row."""

    def __init__(self, params: SparsityParams) -> None:
        self.params = params
        self.surveys = 1 if params.allocation == "error" else 0
        self.surveys_whole_blocks = bool(self.surveys)
        self._asked: dict[str, Sparsity] = {}
        """By linear."""
        self._chosen: list[LinearLayout] = []
        self._zeros: dict[str, int] = {}

    def prepare(self, layout: ModelLayout) -> ModelLayout:
        """The share of each linear marked in it, before a survey the one that was asked for. Raises UserError."""
        if self.surveys:
            refuse_changed(layout, self.name)
        layout, self._chosen = marked(layout, self.params, self.name, self._zeros)
        self._asked = {linear.name: linear.pruned for linear in self._chosen if linear.pruned is not None}
        return layout

    def surveyor(self, source: ModelLayout) -> Surveyor:
        from kompressor_worker.passes.error_curves import ErrorCurves

        return ErrorCurves(self._asked, self.params.wanted(), self.scored)

    def survey_rows(self, layers: int) -> float:
        return float(KINDS * TRIED * len(trials(self.params.wanted().share)) * self.surveys)

    def decide(self, found: Mapping[str, torch.Tensor]) -> None:
        """As many zeros as before. A linear that no row has reached keeps its share."""
        measured = [linear for linear in self._chosen if linear.name in found]
        sparsity = self.params.wanted()
        curves = {linear.name: found[linear.name].tolist() for linear in measured}
        weights = {linear.name: prod(linear.shape) for linear in measured}
        self._zeros = allocate(curves, weights, sum(sparsity.zeros(linear.shape) for linear in measured))

    def assign(self, layout: ModelLayout, taken: Mapping[str, Scheme]) -> dict[str, Scheme]:
        """Nothing. Raises UserError where an earlier pass has quantised what this one prunes."""
        for linear in self._chosen:
            if linear.name in taken:
                raise UserError(
                    f"{self.name}: {linear.name} is {taken[linear.name].name} by an earlier pass; put {self.name} before the passes that "
                    "quantise, or list it under ignore"
                )
        return {}


def refuse_changed(layout: ModelLayout, by: str) -> None:
    """Raises UserError where what a survey of the source says of linears is not true of them any more."""
    shapes = {t.name: t.shape for stage in layout.stages() for t in stage.tensors}
    if layout.rotated:
        what = "an earlier rotate has turned the weights"
    elif any(unit.dropped for unit in layout.units):
        what = "an earlier pass has taken blocks out"
    elif any(stage.dropped for unit in layout.units for stage in unit.stages):
        what = "an earlier pass has left fewer experts"
    elif smaller := next((x.name for x in layout.linears() if x.kind == "linear" and shapes.get(x.weight, x.shape) != x.shape), None):
        what = f"an earlier pass has made {smaller} smaller"
    else:
        return
    raise UserError(
        f"{by}: allocation error goes by a survey of the source, and {what} since; use allocation: uniform, or publish what the earlier "
        "passes make and prune that in a job of its own"
    )
