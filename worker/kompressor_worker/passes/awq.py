"""AWQ (Lin et al. 2023, arXiv 2306.00978): channels that matter made larger before rounding, and ranges clipped where that pays.

An input channel is divided, and the weights that read it multiplied, by a scale that is folded into what makes the input: the norm before
q/k/v and gate/up, the rows of v before o (one scale a KV channel, for all query heads of its group), the rows of up before down. The
function stays the same; the rounding error of salient channels shrinks. Then each tile's range is shrunk by what hurts its output least.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from kompressor_api.fields import Count, Flag
from kompressor_api.v1alpha1 import Model
from kompressor_worker.passes import Pass
from kompressor_worker.passes.linear_params import LinearParams, scheme_in_groups
from kompressor_worker.passes.selection import select
from kompressor_worker.passes.shapes import check_shapes
from kompressor_worker.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from kompressor_worker.block import Site, Stage
    from kompressor_worker.layout import LinearLayout, ModelLayout
    from kompressor_worker.statistics import Statistic

SchemeName = Literal["W4A16", "W4A16_ASYM", "W3A16", "W2A16", "W2A16_ASYM", "W8A16"]
FEW = 8
"""Sites that are reported one by one."""
CLIP_RATIOS = tuple(1 - i / 20 for i in range(10))
"""Shares of a tile's range that are tried: 1 down to 0.55, as AutoAWQ."""


class AwqParams(LinearParams):
    """AWQ: scales channels by their activations before rounding, folded so that the function stays the same."""

    scheme: SchemeName = Field(description="W4A16, W4A16_ASYM, W3A16, W2A16, W2A16_ASYM or W8A16: packed integers, weights only.")
    clip: Flag = Field(default=True, description="Shrink each group's range where that lowers the output's error.")
    grid: Count = Field(default=20, ge=1, le=200, description="Powers of the activations' magnitude that are tried, from 0 up to 1.")


@dataclass
class Made:
    """A linear that is encoded already, should its rows be scaled later."""

    stage: Stage
    linear: LinearLayout
    shares: torch.Tensor | None
    """fp32 [out, tiles]: how much of each tile's range its grid spans."""


class Awq(Pass):
    """The pass `awq`."""

    Params: ClassVar[type[Model]] = AwqParams
    statistics: frozenset[Statistic] = frozenset({"hessian", "magnitude"})
    whole_block = True

    def __init__(self, params: AwqParams) -> None:
        self.params = params
        self.products = 2.0 * params.grid
        self._assigned: dict[str, Scheme] = {}
        self._taken: frozenset[str] = frozenset()
        self._block: dict[str, torch.Tensor] = {}
        self._made: dict[str, Made] = {}
        """Of the block whose weights are `_block`, by weight name."""

    def assign(self, layout: ModelLayout, taken: Mapping[str, Scheme]) -> dict[str, Scheme]:
        """Raises UserError that names the tensor, the value and the remedy."""
        scheme = scheme_in_groups(self.params.scheme, self.params.group_size, "awq")
        chosen = select(layout, taken, self.params.targets, self.params.ignore)
        check_shapes(layout, chosen, scheme)
        self._assigned = {linear.name: scheme for linear in chosen}
        self._taken = frozenset(f"{name}.weight" for name in taken)
        return dict(self._assigned)

    def apply(self, stage: Stage) -> None:
        """Scales the inputs of this stage, then encodes its linears in `assign`'s answer. Raises BadNumerics.

        `stage.notes["awq"]`: `scaled`, by site the power that was chosen, whether weights are in the scale too, and the loss left of one;
        `left`, by site why it was not scaled. Of many experts only how many, and the mean loss."""
        if stage.weights is not self._block:
            self._block, self._made = stage.weights, {}
        notes: dict[str, Any] = {}
        inner = {id(child) for site in stage.sites for child in site.children}
        for site in stage.sites:
            if id(site) not in inner and not site.same_as:
                self._scale(stage, site, notes)
        for linear in stage.layout.linears:
            if linear.name in self._assigned:
                self._clip(stage, linear)
        if notes:
            stage.notes["awq"] = brief(notes)

    def _scale(self, stage: Stage, site: Site, notes: dict[str, Any]) -> None:
        from kompressor_worker.passes.folding import divide_input
        from kompressor_worker.passes.scale_search import best_scaling

        readers = self._readers(stage, site)
        quantised = [name for name in (*site.readers, *([site.fold.tensor] if site.fold else [])) if name in self._taken]
        found = None
        if site.fold is None:
            reason = "nothing makes its input that a scale could be folded into"
        elif quantised:
            reason = f"{quantised[0]} is quantised by an earlier pass"
        elif not readers:
            reason = "no row of calibration data, or no linear of this pass reads it"
        else:
            assert site.statistics.magnitude is not None
            found = best_scaling(readers, site.statistics.magnitude / site.statistics.rows, site.fold, self.params.grid, stage.heard)
            reason = "no scale lowers the error"
        if found is None or site.fold is None:
            notes.setdefault("left", {})[site.name] = reason
            return
        divide_input(stage.weights, site, found.scale)
        notes.setdefault("scaled", {})[site.name] = {"ratio": found.ratio, "duo": found.duo, "loss": round(found.gain, 4)}
        if (made := self._made.get(site.fold.tensor)) is not None:
            self._encode(made)

    def _readers(self, stage: Stage, site: Site) -> list[Any]:
        from kompressor_worker.passes.encoding import finite, refuse_nonfinite
        from kompressor_worker.passes.scale_search import Reader

        readers = []
        for each in (site, *site.children):
            for linear in each.linears:
                if linear.name in self._assigned and (hessian := each.statistics.hessian) is not None:
                    weight = stage.weights[linear.weight]
                    refuse_nonfinite(linear, weight)
                    readers.append(Reader(weight.float(), finite(hessian, each.name), self._assigned[linear.name], weight.dtype))
        return readers

    def _clip(self, stage: Stage, linear: LinearLayout) -> None:
        from kompressor_worker.passes.clipping import best_shares, on_output

        weight, scheme = stage.weights[linear.weight], self._assigned[linear.name]
        hessian = next((site.statistics.hessian for site in stage.sites if linear in site.linears), None)
        shares = None
        if self.params.clip and hessian is not None:
            shares = best_shares(weight, scheme, weight.dtype, stage.heard, on_output(hessian, scheme.tile(linear.shape)[1]), CLIP_RATIOS)
        made = self._made[linear.weight] = Made(stage, linear, shares)
        self._encode(made)

    def _encode(self, made: Made) -> None:
        """Rounds to nearest on the grid that was found. Dividing a row by a number divides its grid by the same, so the codes stay."""
        from kompressor_worker import grid
        from kompressor_worker.passes.clipping import clipped, grid_at
        from kompressor_worker.passes.encoding import encode, refuse_nonfinite

        linear, scheme = made.linear, self._assigned[made.linear.name]
        weight = made.stage.weights[linear.weight]
        refuse_nonfinite(linear, weight)
        found = grid.grid_of(weight, scheme) if made.shares is None else grid_at(weight, scheme, weight.dtype, made.shares)
        codes = grid.quantize(weight, found, scheme)
        saturated = clipped(weight, found, scheme) if made.shares is not None else 0
        made.stage.encoded[linear.name] = encode(linear, weight, codes, found, scheme, saturated)


def brief(notes: dict[str, Any]) -> dict[str, Any]:
    """Notes of a stage; those of a mixture's many experts in few words."""
    scaled, left = notes.get("scaled", {}), notes.get("left", {})
    if len(scaled) + len(left) <= FEW:
        return notes
    made: dict[str, Any] = {"left": dict(Counter(left.values()))} if left else {}
    if scaled:
        made["scaled"] = {"sites": len(scaled), "loss": round(sum(each["loss"] for each in scaled.values()) / len(scaled), 4)}
    return made
