"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): outliers of activations moved into the weights, where they are easier to round.

Column j of an input that a norm makes is divided by s_j = max|x_j|^alpha / max|w_j|^(1 - alpha). max|w_j| goes over all linears that read
the input and may be quantised: q, k and v; gate and up; in a mixture those of every expert, but not the router, which stays exact and only
takes the scale along.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from kompressor_api.fields import Number
from kompressor_api.v1alpha1 import Model
from kompressor_worker.errors import UserError
from kompressor_worker.passes import Pass
from kompressor_worker.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from kompressor_worker.block import Site, Stage
    from kompressor_worker.layout import ModelLayout
    from kompressor_worker.statistics import Statistic

SMALLEST, LARGEST = 1e-4, 1e4
"""Bounds of a scale: what is moved stays within the range of fp16."""


class SmoothQuantParams(Model):
    """Moves outliers of activations into the weights, so that both can be 8 bits. Before quantising."""

    alpha: Number = Field(
        default=0.5,
        ge=0.0,
        le=1.0,
        description="How much of the difficulty moves from the activations (0) into the weights (1).",
    )


class SmoothQuant(Pass):
    """The pass `smoothQuant`."""

    Params: ClassVar[type[Model]] = SmoothQuantParams
    statistics: frozenset[Statistic] = frozenset({"range"})
    folds = True

    def __init__(self, params: SmoothQuantParams) -> None:
        self.params = params

    def assign(self, layout: ModelLayout, taken: Mapping[str, Scheme]) -> dict[str, Scheme]:
        """Nothing. Raises UserError after a pass that quantises: its weights cannot be scaled any more."""
        if taken:
            first, scheme = next(iter(taken.items()))
            raise UserError(f"smoothQuant: {first} is {scheme.name} by an earlier pass; put smoothQuant before the passes that quantise")
        return {}

    def apply(self, stage: Stage) -> None:
        """Scales the weights behind every norm and the norm itself; `stage.notes` names the inputs that have none."""
        from kompressor_worker.passes.folding import divide_input

        inner = {id(child) for site in stage.sites for child in site.children}
        left: dict[str, str] = {}
        for site in stage.sites:
            if id(site) in inner or site.same_as:
                continue
            if site.fold is None or site.fold.rows is not None:
                left[stage.layout.name] = "no norm makes its input"
            elif not site.statistics.rows:
                left[site.name] = "no row of calibration data"
            else:
                divide_input(stage.weights, site, self._scale(stage, site))
        if left:
            stage.notes["smoothQuant"] = {"left": left}

    def _scale(self, stage: Stage, site: Site) -> torch.Tensor:
        """fp32 [columns]; 1 where no activation or no weight was ever other than zero."""
        import torch

        from kompressor_worker.passes.encoding import finite

        inputs = finite(site.statistics.largest, site.name)
        linears = [*site.beside, *(linear for each in (site, *site.children) for linear in each.linears)]
        columns = torch.stack([stage.weights[linear.weight].abs().amax(0).float() for linear in linears])
        weights = columns.amax(0).to(inputs.device)
        scale = inputs.pow(self.params.alpha) / weights.pow(1 - self.params.alpha)
        return torch.where((inputs > 0) & (weights > 0), scale.clamp(SMALLEST, LARGEST), 1.0)
