"""Fewer neurons in every feed-forward: rows of gate and up, columns of down, each block (and expert) its own, the same number in all."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator

from kompressor_api.fields import Count, Number
from kompressor_api.v1alpha1 import Model
from kompressor_worker.architectures import Dimensions, text_config
from kompressor_worker.errors import UserError
from kompressor_worker.layout import ModelLayout
from kompressor_worker.passes.structured import RATIO, CorrectedParams, StructuredPass, count_kept
from kompressor_worker.resizing import family_to_resize, resized

if TYPE_CHECKING:
    from kompressor_worker.block import Reduction

KEYS = {"ffn": "intermediate_size", "moe_ffn": "moe_intermediate_size", "shared_ffn": "shared_expert_intermediate_size"}
"""By name in Dimensions: where config.json says it."""


class PruneWidthParams(CorrectedParams):
    """Takes neurons out of every feed-forward, those that the calibration data misses least."""

    ratio: Number | None = RATIO
    intermediate_size: Count | None = Field(
        default=None, ge=1, description="Neurons that stay in every feed-forward (in a mixture: in every expert). Either this or ratio."
    )
    multiple: Count = Field(
        default=128,
        ge=1,
        le=4096,
        description="What a ratio leaves is rounded to a multiple of this, which GPUs and quantised groups want.",
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.ratio is None) == (self.intermediate_size is None):
            raise ValueError("give either ratio, such as 0.25, or intermediateSize, the neurons that stay")
        return self


class PruneWidth(StructuredPass):
    """The pass `pruneWidth`."""

    Params: ClassVar[type[Model]] = PruneWidthParams
    reduces = frozenset({"down", "experts_out", "shared_down"})
    name = "pruneWidth"
    sizes = tuple(KEYS.values())

    def __init__(self, params: PruneWidthParams) -> None:
        self.params = params
        self._kept: dict[str, int] = {}

    def prepare(self, layout: ModelLayout) -> ModelLayout:
        """Narrower gate, up and down. Raises UserError."""
        self.refuse_late(layout)
        family = family_to_resize(layout, self.name)
        sizes = Dimensions(family, layout.config)
        steps = self._sizes(layout)
        said = {**family.defaults, **text_config(layout.config)}
        # a shared expert as wide as so many others has no number of its own
        present = {name: KEYS[name] for name in steps.values() if name != "shared_ffn" or KEYS[name] in said}
        if len(present) > 1 and self.params.intermediate_size is not None:
            both = ", ".join(f"{key} {sizes[name]}" for name, key in present.items())
            raise UserError(
                f"{self.name}: the model has feed-forwards of {len(present)} widths ({both}); give a ratio instead of intermediateSize"
            )
        changes = {}
        for name, key in present.items():
            there = sizes[name]
            if there is None:
                raise UserError(f"{self.name}: config.json says {key} {said.get(key)!r}; correct it")
            params = self.params
            changes[key] = count_kept(self.name, key, there, params.ratio, params.intermediate_size, params.multiple)
        smaller = resized(layout, changes)
        left = Dimensions(family, smaller.config)
        self._kept = {step: width for step, name in steps.items() if (width := left[name]) is not None}
        return smaller

    def _sizes(self, layout: ModelLayout) -> dict[str, str]:
        """By step, whose linears the layout has: the size that is its width."""
        family = family_to_resize(layout, self.name)
        names = {x.name for x in layout.linears() if x.kind == "linear"}
        found = {}
        if family.experts is not None and any(".experts." in name for name in names):
            found["experts_out"] = family.experts.groups[-1].linears[0].columns
            if family.experts.shared:
                found["shared_down"] = family.experts.shared[-1].linears[0].columns
        if family.feed_forward and any(
            name.endswith(family.feed_forward[-1].linears[0].name) and ".experts." not in name for name in names
        ):
            found["down"] = family.feed_forward[-1].linears[0].columns
        return found

    def reduce(self, reduction: Reduction) -> None:
        """Raises BadNumerics."""
        from kompressor_worker.passes.reduction import keep_rows, remove

        width = reduction.site.statistics.columns
        kept = remove(reduction, self.name, 1, self._kept[reduction.step], self.params.correction == "leastSquares")
        for producer in reduction.producers:  # fused in one weight: gate's rows, then up's
            keep_rows(reduction.weights, producer, [kept + start for start in range(0, producer.shape[0], width)])
