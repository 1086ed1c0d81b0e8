"""What the passes that leave fewer experts have in common: how many stay, what the router keeps, what cannot be met. No torch.

The number is the same in every layer, since config.json has one; where routing goes by groups, the same in every group.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from kompressor_api.fields import Count, Number
from kompressor_api.names import Reason
from kompressor_worker.architectures import EXPERT_COUNTS, Dimensions, text_config
from kompressor_worker.dropping import mixtures, with_experts
from kompressor_worker.errors import UserError
from kompressor_worker.family import Family, Scoring
from kompressor_worker.layout import ModelLayout, UnitLayout
from kompressor_worker.passes.structured import RATIO, StructuredParams, StructuredPass, count_kept
from kompressor_worker.resizing import family_to_resize, resized

if TYPE_CHECKING:
    import torch

Clusters = Mapping[int, Sequence[Sequence[int]]]
"""By block, counted in the source: experts that become one, the result's in their order, numbers of the source."""


class FewerExpertsParams(StructuredParams):
    """Base of the parameters of a pass that leaves fewer experts."""

    ratio: Number | None = RATIO
    experts: Count | None = Field(
        default=None, ge=1, description="Experts that stay in every layer that has some, of which a token goes to no more than there are. "
        "Either this or ratio."
    )  # fmt: skip

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.ratio is None) == (self.experts is None):
            raise ValueError("give either ratio, such as 0.25, or experts, those that stay")
        return self


class FewerExperts(StructuredPass):
    """Base: what goes is decided by one survey; the layout has the rest."""

    sizes = EXPERT_COUNTS
    surveys = 1
    transforms = True

    def __init__(self, ratio: float | None, count: int | None) -> None:
        self._ratio, self._count = ratio, count
        self.kept, self.groups = 0, 1
        self._family: Family | None = None
        self._layers: dict[str, int] = {}
        """By what a mixture's tensors are called in the source: its block."""

    @property
    @abstractmethod
    def clusters(self) -> Clusters | None:
        """What the survey has decided; None: nothing yet."""

    # ---- headers

    def prepare(self, layout: ModelLayout) -> ModelLayout:
        """Fewer experts, each layer's own; before the survey, without the last ones, which are as large. Raises UserError."""
        if any(stage.dropped for unit in layout.units for stage in unit.stages):
            raise UserError(f"{self.name}: an earlier pass has left fewer experts; ask once, for all that shall go")
        self.refuse_late(layout)
        self._family, found = family_to_resize(layout, self.name), mixtures(layout)
        text = text_config(layout.config)
        if self._family.experts is None or not found:
            raise UserError(
                f"{self.name}: the model (model_type {text.get('model_type')!r}) has no experts; leave {self.name} out",
                Reason.UNSUPPORTED_MODEL,
            )
        there = Dimensions(self._family, layout.config)["experts"]
        key = next((name for name in EXPERT_COUNTS if name in text), EXPERT_COUNTS[0])
        if there is None:
            raise UserError(f"{self.name}: config.json says {key} {text.get(key)!r}; correct it")
        self.groups = grouped(self._family.experts.scoring, text)
        changes = self._counts(text, there, key)
        held = [(t, layer) for number, layer in found.items() for stage in layout.units[number].stages for t in stage.tensors]
        self._layers = {t.stored[0].name: layer for t, layer in held if t.stored}
        clusters = self.clusters or dict.fromkeys(found.values(), first(there, self.kept, self.groups))
        smaller = with_experts(resized(layout, changes), clusters)
        return replace(smaller, warnings=(*layout.warnings, *self.warnings(text)))

    def _counts(self, text: Mapping[str, Any], there: int, key: str) -> dict[str, int]:
        """What becomes of config.json. Raises UserError where too few would stay to be routed to."""
        if self._count is not None and self._count % self.groups:
            raise UserError(
                f"{self.name}: {key} {self._count} is to stay, in {self.groups} groups (n_group) of equal size; ask for a multiple of "
                f"{self.groups}"
            )
        self.kept = count_kept(self.name, key, there, self._ratio, self._count, self.groups)
        routed = int(text.get("num_experts_per_tok") or 1)
        if self.kept < routed and self._ratio is not None:
            most = 1 - -(-routed // self.groups) * self.groups / there
            raise UserError(
                f"{self.name}: ratio {self._ratio:g} of {key} {there} leaves {self.kept}, fewer than the {routed} that a token is "
                f"routed to (num_experts_per_tok); ask for at most {most:.4g}, or for a count, and tokens are routed to fewer"
            )
        changes = {name: self.kept for name in EXPERT_COUNTS if name in text}
        if self.kept < routed:
            changes["num_experts_per_tok"] = routed = self.kept
        self._refuse_thin_groups(text, routed)
        return changes

    def _refuse_thin_groups(self, text: Mapping[str, Any], routed: int) -> None:
        """Raises UserError where the groups that a token is routed to have too few experts, or one has fewer than it is judged by."""
        assert self._family is not None and self._family.experts is not None, "prepare comes first"
        best, within, chosen = self._family.experts.scoring.best, self.kept // self.groups, int(text.get("topk_group") or 1)
        if self.groups == 1 or (within * chosen >= routed and within >= best):
            return
        least = self.groups * max(best, -(-routed // chosen))
        raise UserError(
            f"{self.name}: {self.kept} experts in {self.groups} groups (n_group) are {within} a group, and a token is routed to {routed} "
            f"of {chosen} groups (topk_group), each judged by its best {best}; leave {least} or more"
        )

    def warnings(self, text: Mapping[str, Any]) -> list[str]:
        routed = int(text.get("num_experts_per_tok") or 1)
        if self.kept < routed:
            return [f"{self.name}: {self.kept} experts stay, so a token is routed to {self.kept} (num_experts_per_tok), not to {routed}"]
        return []

    # ---- weights

    def layer(self, unit: UnitLayout) -> int | None:
        """Which block of the source's mixtures it is; None: it has no experts."""
        names = (t.stored[0].name for stage in unit.stages for t in stage.tensors if t.stored)
        return next((self._layers[name] for name in names if name in self._layers), None)

    def transform(self, layout: UnitLayout, weights: dict[str, torch.Tensor]) -> None:
        """The router first, then experts in the layout's order; of all these, those whose weights are here."""
        layer, clusters = self.layer(layout), self.clusters
        if layer is None or clusters is None or layer not in clusters:
            return
        assert self._family is not None and self._family.experts is not None, "prepare comes first"
        experts = self._family.experts
        of_the_router = {f"{layout.name}.{name}" for name in (f"{experts.router}.weight", f"{experts.router}.bias", experts.correction)}
        for name in of_the_router & set(weights):
            weights[name] = self.routed(layer, weights[name])

    @abstractmethod
    def routed(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """A parameter of the router [experts, ...] for the experts of the result."""


def grouped(scoring: Scoring, text: Mapping[str, Any]) -> int:
    """In how many groups, of neighbours, routing has its experts."""
    asked = scoring.best and (not scoring.grouped_by or text.get("topk_method") in scoring.grouped_by)
    groups = text.get("n_group")
    return groups if asked and type(groups) is int and groups > 1 else 1


def first(experts: int, kept: int, groups: int) -> list[tuple[int]]:
    """The first ones of each group, each for itself."""
    within = experts // groups
    return [(group * within + n,) for group in range(groups) for n in range(kept // groups)]
