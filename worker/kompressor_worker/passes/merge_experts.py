"""Fewer experts: those whose outputs are most alike become one, and the router's rows that lead to them one row.

Clusters (after HC-SMoE, Chen et al. 2024, arXiv 2410.08589): agglomerative, by what the outputs on a sample of tokens lose, weighted with
use, when a cluster's mean stands for them (Ward 1963). Within one, neurons of each member are permuted to fit those of the most frequent
one (Ainsworth et al. 2022, arXiv 2209.04836), and the weights averaged by the tokens routed to each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from kompressor_api.v1alpha1 import Model
from kompressor_worker.layout import ModelLayout, UnitLayout
from kompressor_worker.passes.fewer_experts import Clusters, FewerExperts, FewerExpertsParams

if TYPE_CHECKING:
    import torch

    from kompressor_worker.passes.merging import Average
    from kompressor_worker.passes.surveyor import Surveyor


class MergeExpertsParams(FewerExpertsParams):
    """Makes one expert of several, of those that say the same on the calibration data."""


class MergeExperts(FewerExperts):
    """The pass `mergeExperts`."""

    Params: ClassVar[type[Model]] = MergeExpertsParams
    name = "mergeExperts"

    def __init__(self, params: MergeExpertsParams) -> None:
        super().__init__(params.ratio, params.experts)
        self.params = params
        self._clusters: dict[int, list[list[int]]] | None = None
        self._tokens: dict[int, list[int]] = {}
        self._rows: dict[int, torch.Tensor] = {}
        """By block: fp32 [result's experts, source's experts], what the router's rows are multiplied by."""
        self._open: Average | None = None

    @property
    def clusters(self) -> Clusters | None:
        return self._clusters

    def surveyor(self, source: ModelLayout) -> Surveyor:
        from kompressor_worker.passes.expert_surveys import Likeness

        return Likeness()

    def decide(self, found: Mapping[str, torch.Tensor]) -> None:
        from kompressor_worker.passes.expert_surveys import by_layer
        from kompressor_worker.passes.merging import clusters, joined

        self._clusters = {}
        for layer, (tokens, products) in by_layer(found, "tokens", "products").items():
            self._clusters[layer] = clusters(products, tokens, self.kept, self.groups)
            self._rows[layer] = joined(self._clusters[layer], tokens)
            self._tokens[layer] = tokens.long().tolist()

    def routed(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """Rows of experts that stay by themselves are the very same bytes."""
        assert self._clusters is not None, "the survey comes first"
        joined = (self._rows[layer].to(rows.device) @ rows.float()).to(rows.dtype)
        for new, members in enumerate(self._clusters[layer]):
            if len(members) == 1:
                joined[new] = rows[members[0]]
        return joined

    def transform(self, layout: UnitLayout, weights: dict[str, torch.Tensor]) -> None:
        """A cluster's members come one after the other, the last one in the place of all."""
        from kompressor_worker.passes.merging import Average

        super().transform(layout, weights)
        layer = self.layer(layout)
        if layer is None or self._clusters is None:
            return
        clusters = {member: members for members in self._clusters[layer] for member in members if len(members) > 1}
        for stage in layout.stages:
            if stage.expert is None or stage.expert not in clusters or any(x.weight not in weights for x in stage.linears):
                continue
            members = clusters[stage.expert]
            if stage.expert == members[0]:
                self._open = Average()
            assert self._open is not None, f"{stage.name}: comes before the first of its cluster"
            self._open.add(stage.linears, weights, self._tokens[layer][stage.expert])
            if stage.expert == members[-1]:
                weights |= self._open.result(stage.linears, weights)
                self._open = None

    def described(self) -> dict[str, Any]:
        """By block of the source: which experts became one, the most frequent first, and every expert's tokens."""
        layers = {
            str(layer): {"merged": [list(members) for members in clusters if len(members) > 1], "tokens": self._tokens[layer]}
            for layer, clusters in (self._clusters or {}).items()
        }
        return {"kept": self.kept, "layers": layers}
