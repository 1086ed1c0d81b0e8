"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns rounded one after the other, each error made good by the columns still to come.

What counts is the layer's output on the calibration rows, so all that is needed of them is H = X^T X. Linears that share an input share one
H, one factorisation and one order of columns. "static" order takes the columns of the largest activations first, while they can still be
made good, on scales found beforehand from the weights as they lie: a reader sees groups of neighbouring columns as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from kompressor_api.fields import Number
from kompressor_api.v1alpha1 import Model
from kompressor_worker.passes import Pass
from kompressor_worker.passes.asked_scheme import asked_schemes
from kompressor_worker.passes.inputs import InputParams, input_tensors, needed_statistics
from kompressor_worker.passes.linear_params import GgufMix, LinearParams
from kompressor_worker.passes.selection import select
from kompressor_worker.schemes import SCHEMES, Scheme

if TYPE_CHECKING:
    import torch

    from kompressor_worker.block import Encoded, Site, Stage
    from kompressor_worker.kernels.pieces import Heard
    from kompressor_worker.layout import LinearLayout, ModelLayout
    from kompressor_worker.passes.hessian import Factor
    from kompressor_worker.statistics import Statistic

SchemeName = Literal[
    "W4A16", "W4A16_ASYM", "W3A16", "W2A16", "W2A16_ASYM", "W8A16", "W8A8", "W8A8_STATIC", "W8A8_STATIC_ASYM", "FP8_DYNAMIC",
    "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q4_0",
]  # fmt: skip


class GptqParams(LinearParams, InputParams):
    """GPTQ: rounds weights so that the layer's output on the calibration data changes least."""

    scheme: Literal[SchemeName, GgufMix] = Field(
        description=("As rtn has them; _STATIC: one calibrated scale of activations, _ASYM: a zero point. GGUF: Q8_0 to Q2_K, and mixes.")
    )
    act_order: Literal["static", "none"] = Field(
        default="static",
        description=(
            "static: columns of large activations first, group scales from the original weights. none: as they lie; with "
            "observer minmax, group scales as a group is reached."
        ),
    )
    dampening: Number = Field(
        default=0.01,
        gt=0.0,
        le=1.0,
        description="Share of the Hessian's mean diagonal added to it; ten times more where a factorisation fails.",
    )
    observer: Literal["minmax", "mse"] = Field(
        default="mse",
        description=(
            "What a grid of integers spans: mse, the part of the weights' range with the least squared error; minmax, "
            "all of it, as FP8 always does."
        ),
    )


class Gptq(Pass):
    """The pass `gptq`."""

    Params: ClassVar[type[Model]] = GptqParams
    products = 0.5  # a column's error reaches only those that come after it

    def __init__(self, params: GptqParams) -> None:
        self.params = params
        self.statistics: frozenset[Statistic] = frozenset({"hessian"})
        if (scheme := SCHEMES.get(params.scheme)) is not None:
            self.statistics |= needed_statistics(scheme, params)
        self._assigned: dict[str, Scheme] = {}

    def assign(self, layout: ModelLayout, taken: Mapping[str, Scheme]) -> dict[str, Scheme]:
        """Raises UserError that names the tensor, the value and the remedy."""
        chosen = select(layout, taken, self.params.targets, self.params.ignore)
        return self.take(asked_schemes(layout, chosen, self.params.scheme, self.params.group_size, "gptq"))

    def take(self, schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
        """These linears, by name, each in its scheme: what `assign` answers where nobody else decides them."""
        ordered = self.params.act_order == "static"
        flagged = {
            name for name, x in schemes.items() if ordered and x.strategy == "group" and x.format != "gguf"
        }  # which has no such flag
        self._assigned = {name: replace(x, actorder=name in flagged) for name, x in schemes.items()}
        return dict(self._assigned)

    def apply(self, stage: Stage) -> None:
        """Encodes this stage's linears in `assign`'s answer. Raises BadNumerics.

        `stage.notes["gptq"]`, unless all went as usual: `dampening`, the most that a factorisation needed; `deadColumns` by site,
        columns that no activation reached, and `roundedToNearest` by linear, with the reason, where there was nothing to go by.
        """
        notes: dict[str, Any] = {"dampening": self.params.dampening}
        left = {linear.name: linear for linear in stage.layout.linears if linear.name in self._assigned}
        for site in stage.sites:
            linears = [left.pop(linear.name) for linear in site.linears if linear.name in left]
            if linears:
                self._site(stage, site, linears, notes)
        for linear in left.values():
            self._round(stage, linear, "its input is not measured", notes)
        for name, tensors in input_tensors(stage, self._assigned, self.params).items():
            stage.encoded[name].tensors.update(tensors)
        if len(notes) > 1 or notes["dampening"] != self.params.dampening:
            stage.notes["gptq"] = notes

    def _site(self, stage: Stage, site: Site, linears: list[LinearLayout], notes: dict[str, Any]) -> None:
        from kompressor_worker.passes.encoding import finite
        from kompressor_worker.passes.hessian import Factor

        hessian = site.statistics.hessian
        if hessian is None or not bool(hessian.any()):
            for linear in linears:
                self._round(stage, linear, f"none of {site.statistics.rows} rows of its input is other than zero", notes)
            return
        finite(hessian, site.name)
        factor = Factor.of(hessian, self.params.dampening, self.params.act_order == "static", site.name, stage.heard)
        notes["dampening"] = max(notes["dampening"], factor.dampening)
        if factor.dead:
            notes.setdefault("deadColumns", {})[site.name] = factor.dead
        for linear in linears:
            weight = stage.weights[linear.weight]
            if self._assigned[linear.name].format == "gguf":
                stage.encoded[linear.name] = self._blocks(linear, weight, factor, hessian.diagonal(), stage.heard, notes)
            else:
                stage.encoded[linear.name] = self._linear(linear, weight, factor, stage.heard)
            stage.heard()

    def _round(self, stage: Stage, linear: LinearLayout, reason: str, notes: dict[str, Any]) -> None:
        from kompressor_worker.passes.encoding import round_to_nearest
        from kompressor_worker.passes.gguf_encoding import to_nearest

        scheme = self._assigned[linear.name]
        rounded = to_nearest if scheme.format == "gguf" else round_to_nearest
        stage.encoded[linear.name] = rounded(linear, stage.weights[linear.weight], scheme)
        notes.setdefault("roundedToNearest", {})[linear.name] = reason

    def _linear(self, linear: LinearLayout, weight: torch.Tensor, factor: Factor, heard: Heard) -> Encoded:
        from kompressor_worker import grid, kernels
        from kompressor_worker.passes.clipping import best_shares, grid_at
        from kompressor_worker.passes.encoding import encode, refuse_nonfinite

        refuse_nonfinite(linear, weight)
        scheme, source = self._assigned[linear.name], weight.float()
        zeros = weight == 0 if linear.pruned is not None else None
        if self.params.observer == "mse" and scheme.type == "int":
            found = grid_at(source, scheme, weight.dtype, best_shares(weight, scheme, weight.dtype, heard))
        elif factor.order is not None or scheme.strategy != "group":
            found = grid.grid_of(weight, scheme)
        else:
            codes, found, _ = kernels.gptq_groups(source, factor.inverse, scheme, weight.dtype, heard, zeros)
            return encode(linear, weight, codes, found, scheme)
        tiles = factor.columns // scheme.tile(linear.shape)[1]
        mask = None if zeros is None else factor.ordered(zeros)
        ordered, _ = kernels.gptq(factor.ordered(source), factor.inverse, found, scheme, tiles, heard, mask=mask)
        return encode(linear, weight, factor.as_they_lay(ordered), found, scheme)

    def _blocks(
        self, linear: LinearLayout, weight: torch.Tensor, factor: Factor, diagonal: torch.Tensor, heard: Heard, notes: dict[str, Any]
    ) -> Encoded:
        from kompressor_worker.formats.gguf_types import type_of
        from kompressor_worker.passes.encoding import refuse_nonfinite
        from kompressor_worker.passes.gguf_encoding import by_gptq, to_nearest

        scheme, zeros = self._assigned[linear.name], weight == 0 if linear.pruned is not None else None
        refuse_nonfinite(linear, weight)
        if type_of(scheme).even:
            return by_gptq(linear, weight, scheme, factor, diagonal, heard, zeros)
        notes.setdefault("roundedToNearest", {})[linear.name] = f"{scheme.name}'s levels are no even steps"
        return to_nearest(linear, weight, scheme, diagonal, heard)
