"""Magnitude pruning (Han et al. 2015, arXiv 1506.02626): the smallest weights of each linear become zero. Needs no data,
unless it is to allocate."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from kompressor_api.v1alpha1 import Model
from kompressor_worker.passes.sparsity_params import SparsityParams, SparsityPass

if TYPE_CHECKING:
    from kompressor_worker.block import Stage


class MagnitudeParams(SparsityParams):
    """Sets the smallest weights of each linear to zero. Before quantising."""


class Magnitude(SparsityPass):
    """The pass `magnitude`."""

    Params: ClassVar[type[Model]] = MagnitudeParams
    name = "magnitude"
    scored = False

    def apply(self, stage: Stage) -> None:
        """Raises BadNumerics."""
        from kompressor_worker.passes.encoding import refuse_nonfinite
        from kompressor_worker.passes.zeroing import least, put

        for linear in stage.layout.linears:
            if linear.name in self._asked:
                stage.heard()
                weight = stage.weights[linear.weight]
                refuse_nonfinite(linear, weight)
                put(stage, linear, weight.masked_fill(least(weight.abs().float(), self._asked[linear.name], by_row=False), 0.0))
