"""What the passes that set single weights to zero are asked for alike, and how a layout tells what they will do. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Self

from pydantic import Field, StringConstraints, model_validator

from kompressor_api.fields import Number
from kompressor_worker.errors import UserError
from kompressor_worker.layout import LinearLayout, ModelLayout, StageLayout
from kompressor_worker.passes import Pass
from kompressor_worker.passes.linear_params import TargetParams
from kompressor_worker.passes.selection import choose
from kompressor_worker.schemes import Scheme
from kompressor_worker.sparsity import Sparsity

MOST = 32
"""Neighbours of a pattern at most."""


class SparsityParams(TargetParams):
    """Base of the parameters of a pass that sets weights to zero."""

    sparsity: Number | None = Field(
        default=None,
        gt=0.0,
        le=0.95,
        description="Share of the weights of every targeted linear that become zero. Either this or pattern.",
    )
    pattern: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,2}:[0-9]{1,2}$", max_length=5)] | None = Field(
        default=None,
        description="N:M, such as 2:4: of every M neighbouring weights of a row N are kept. M must divide the columns of every target.",
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError("give either sparsity, such as 0.5, or pattern, such as 2:4")
        if self.pattern is not None:
            keep, of = map(int, self.pattern.split(":"))
            if not 1 <= keep < of <= MOST:
                raise ValueError(f"pattern {self.pattern}: N of every M weights are kept, with 1 <= N < M <= {MOST}; such as 2:4 or 4:8")
        return self

    def wanted(self) -> Sparsity:
        return Sparsity(self.sparsity) if self.sparsity is not None else Sparsity.of_pattern(self.pattern or "")


def marked(layout: ModelLayout, params: SparsityParams, by: str) -> tuple[ModelLayout, list[LinearLayout]]:
    """The layout with what the pass `by` prunes marked in it, and those linears. What an earlier pass prunes is left out.

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
    names = {linear.name for linear in chosen}

    def stage(old: StageLayout) -> StageLayout:
        return replace(old, linears=tuple(replace(x, pruned=sparsity) if x.name in names else x for x in old.linears))

    units = tuple(replace(unit, stages=tuple(map(stage, unit.stages))) for unit in layout.units)
    return replace(layout, units=units), chosen


class SparsityPass(Pass):
    """Base of a pass that sets weights to zero: what it speaks of headers."""

    name: ClassVar[str]
    prunes = True

    def __init__(self, params: SparsityParams) -> None:
        self.params = params
        self._chosen: list[LinearLayout] = []

    def prepare(self, layout: ModelLayout) -> ModelLayout:
        layout, self._chosen = marked(layout, self.params, self.name)
        return layout

    def assign(self, layout: ModelLayout, taken: Mapping[str, Scheme]) -> dict[str, Scheme]:
        """Nothing. Raises UserError where an earlier pass has quantised what this one prunes."""
        for linear in self._chosen:
            if linear.name in taken:
                raise UserError(
                    f"{self.name}: {linear.name} is {taken[linear.name].name} by an earlier pass; put {self.name} before the passes that "
                    "quantise, or list it under ignore"
                )
        return {}
