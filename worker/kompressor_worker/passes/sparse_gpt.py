"""SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774): weights go where that costs the layer's output least, those that stay make it
good. Column by column, as in GPTQ. A pass that quantises afterwards keeps the zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from kompressor_api.fields import Number
from kompressor_api.v1alpha1 import Model
from kompressor_worker.passes.sparsity_params import SparsityParams, SparsityPass

if TYPE_CHECKING:
    from kompressor_worker.block import Site, Stage
    from kompressor_worker.layout import LinearLayout
    from kompressor_worker.statistics import Statistic

NOTHING = 1e6
"""Times the largest of the factor's diagonal, for a column that no activation reaches: what its weights' going costs is next to nothing
then, so they go first, the smallest before the others."""


class SparseGptParams(SparsityParams):
    """SparseGPT: sets weights to zero and corrects the others, so that outputs on the calibration data change least. Before quantising."""

    dampening: Number = Field(
        default=0.01,
        gt=0.0,
        le=1.0,
        description="Share of the Hessian's mean diagonal added to it; ten times more where a factorisation fails.",
    )


class SparseGpt(SparsityPass):
    """The pass `sparseGPT`."""

    Params: ClassVar[type[Model]] = SparseGptParams
    params: SparseGptParams
    statistics: frozenset[Statistic] = frozenset({"hessian"})
    products = 0.5  # a column's error reaches only those that come after it
    name = "sparseGPT"

    def apply(self, stage: Stage) -> None:
        """Raises BadNumerics. `stage.notes["sparseGPT"]`, unless all went as usual: the `dampening` that a factorisation needed, and
        `byMagnitude`, linears that no row of data reached."""
        notes: dict[str, Any] = {}
        left = {linear.name: linear for linear in stage.layout.linears if linear.name in self._asked}
        for site in stage.sites:
            if linears := [left.pop(linear.name) for linear in site.linears if linear.name in left]:
                self._site(stage, site, linears, notes)
        for linear in left.values():
            self._by_magnitude(stage, linear, notes)
        if notes:
            stage.notes["sparseGPT"] = notes

    def _site(self, stage: Stage, site: Site, linears: list[LinearLayout], notes: dict[str, Any]) -> None:
        from kompressor_worker import kernels
        from kompressor_worker.passes.encoding import finite, refuse_nonfinite
        from kompressor_worker.passes.hessian import Factor
        from kompressor_worker.passes.zeroing import put

        hessian, factor = site.statistics.hessian, None
        if hessian is not None and bool(hessian.any()):
            factor = Factor.of(finite(hessian, site.name), self.params.dampening, False, site.name, stage.heard)
            diagonal = factor.inverse.diagonal()
            diagonal[hessian.diagonal() <= 0] = NOTHING * diagonal.max()
            if factor.dampening != self.params.dampening:
                notes["dampening"] = max(notes.get("dampening", 0.0), factor.dampening)
        for linear in linears:
            if factor is None:
                self._by_magnitude(stage, linear, notes)
                continue
            weight = stage.weights[linear.weight]
            refuse_nonfinite(linear, weight)
            put(stage, linear, kernels.prune(weight.float(), factor.inverse, self._asked[linear.name], stage.heard)[0])

    def _by_magnitude(self, stage: Stage, linear: LinearLayout, notes: dict[str, Any]) -> None:
        from kompressor_worker.passes.encoding import refuse_nonfinite
        from kompressor_worker.passes.zeroing import least, put

        weight = stage.weights[linear.weight]
        refuse_nonfinite(linear, weight)
        put(stage, linear, weight.masked_fill(least(weight.abs().float(), self._asked[linear.name], by_row=False), 0.0))
        notes.setdefault("byMagnitude", []).append(linear.name)
