"""Wanda (Sun et al. 2024, arXiv 2306.11695): in each row those weights go whose magnitude times the norm of their input is smallest."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from kompressor_api.v1alpha1 import Model
from kompressor_worker.passes.sparsity_params import SparsityParams, SparsityPass

if TYPE_CHECKING:
    import torch

    from kompressor_worker.block import Stage
    from kompressor_worker.statistics import Statistic


class WandaParams(SparsityParams):
    """Wanda: sets those weights to zero that matter least to each row's output on the calibration data. Before quantising."""


class Wanda(SparsityPass):
    """The pass `wanda`."""

    Params: ClassVar[type[Model]] = WandaParams
    statistics: frozenset[Statistic] = frozenset({"norms"})
    name = "wanda"

    def apply(self, stage: Stage) -> None:
        """Raises BadNumerics. `stage.notes["wanda"]` names linears that no row of data reached: there magnitudes alone decide."""
        from kompressor_worker.passes.encoding import finite, refuse_nonfinite
        from kompressor_worker.passes.zeroing import least, put

        unreached = []
        squares = {x.name: finite(s, site.name) for site in stage.sites for x in site.linears if (s := site.statistics.squares) is not None}
        for linear in stage.layout.linears:
            if linear.name not in self._asked:
                continue
            stage.heard()
            weight = stage.weights[linear.weight]
            refuse_nonfinite(linear, weight)
            if linear.name not in squares:
                unreached.append(linear.name)
            scores = self._scores(weight, squares.get(linear.name))
            put(stage, linear, weight.masked_fill(least(scores, self._asked[linear.name], by_row=True), 0.0))
        if unreached:
            stage.notes["wanda"] = {"byMagnitude": unreached}

    def _scores(self, weight: torch.Tensor, squares: torch.Tensor | None) -> torch.Tensor:
        """fp32 [out, in]; squares fp32 [in]: sums of the inputs' squares."""
        return weight.abs().float() if squares is None else weight.abs().float() * squares.sqrt()
