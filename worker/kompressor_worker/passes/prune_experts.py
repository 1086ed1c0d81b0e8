"""Fewer experts: those go that the calibration data misses least, and the router loses their rows.

Importance (REAP, Lasby et al. 2025, arXiv 2510.13999): the mean, over the tokens that are routed to an expert, of the gate as the model
applies it times the norm of the expert's output. Frequency: the share of all routed tokens that go to it, which knows nothing of what it
says to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from kompressor_api.fields import Count
from kompressor_api.v1alpha1 import Model
from kompressor_worker.layout import ModelLayout
from kompressor_worker.passes.fewer_experts import Clusters, FewerExperts, FewerExpertsParams

if TYPE_CHECKING:
    import torch

    from kompressor_worker.passes.surveyor import Surveyor


class PruneExpertsParams(FewerExpertsParams):
    """Takes experts out of every mixture, those that the calibration data misses least."""

    importance: Literal["reap", "frequency"] = Field(
        default="reap",
        description=(
            "Which go. reap: those that add least to the tokens routed to them (mean gate times norm of output). frequency: those "
            "that fewest are routed to."
        ),
    )
    min_tokens: Count = Field(
        default=32,
        ge=0,
        le=1_000_000,
        description=(
            "An expert with fewer calibration tokens is judged partly by its layer's average, the more the fewer it got; one with none "
            "goes first."
        ),
    )


class PruneExperts(FewerExperts):
    """The pass `pruneExperts`."""

    Params: ClassVar[type[Model]] = PruneExpertsParams
    name = "pruneExperts"

    def __init__(self, params: PruneExpertsParams) -> None:
        super().__init__(params.ratio, params.experts)
        self.params = params
        self._kept: dict[int, list[int]] | None = None
        self._scores: dict[int, list[float]] = {}
        self._tokens: dict[int, list[int]] = {}

    @property
    def clusters(self) -> Clusters | None:
        return None if self._kept is None else {layer: [(expert,) for expert in kept] for layer, kept in self._kept.items()}

    def surveyor(self, source: ModelLayout) -> Surveyor:
        from kompressor_worker.passes.expert_surveys import Contributions

        return Contributions()

    def decide(self, found: Mapping[str, torch.Tensor]) -> None:
        from kompressor_worker.passes.expert_surveys import by_layer, importance, keep

        self._kept = {}
        for layer, (tokens, contributed) in by_layer(found, "tokens", "contributed").items():
            scores = importance(tokens, contributed if self.params.importance == "reap" else None, self.params.min_tokens)
            self._kept[layer] = keep(scores, tokens, self.kept, self.groups)
            self._scores[layer], self._tokens[layer] = scores.tolist(), tokens.long().tolist()

    def routed(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        assert self._kept is not None, "the survey comes first"
        return rows[self._kept[layer]].contiguous()

    def described(self) -> dict[str, Any]:
        """By block of the source: what went, every expert's importance and tokens, and which got few."""
        least, layers = self.params.min_tokens, dict[str, Any]()
        for layer, kept in (self._kept or {}).items():
            tokens = self._tokens[layer]
            layers[str(layer)] = {
                "gone": sorted(set(range(len(tokens))) - set(kept)),
                "scores": self._scores[layer],
                "tokens": tokens,
                "few": [expert for expert, count in enumerate(tokens) if count < least],
            }
        return {"importance": self.params.importance, "minTokens": least, "kept": self.kept, "layers": layers}
