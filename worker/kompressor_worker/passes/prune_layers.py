"""Fewer blocks: those go whose loss the calibration data feels least, and a linear map in the block before may stand in for them.

Influence of a block: one minus the mean cosine of its input and its output (ShortGPT, Men et al. 2024, arXiv 2403.03853). Divergence: the
KL of the logits without it, measured for every block in one survey on a few rows. The map (ReplaceMe, Shopkhoev et al. 2025, arXiv
2505.02819): with M what the feed-forward before a run of blocks adds to the stream, Y the stream before that and L the stream behind the
run, the T of least |M T + Y - L| goes into its down projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from kompressor_api.fields import Count, Number
from kompressor_api.v1alpha1 import Model
from kompressor_worker.dropping import block_numbers, depth_config, without
from kompressor_worker.family import Family
from kompressor_worker.layout import ModelLayout, UnitLayout
from kompressor_worker.passes.structured import RATIO, StructuredParams, StructuredPass, count_kept
from kompressor_worker.resizing import family_to_resize

if TYPE_CHECKING:
    import torch

    from kompressor_worker.passes.surveyor import Surveyor


class PruneLayersParams(StructuredParams):
    """Takes whole blocks out of the model, those that the calibration data misses least."""

    ratio: Number | None = RATIO
    layers: Count | None = Field(default=None, ge=1, description="Blocks that stay. Either this or ratio.")
    measure: Literal["influence", "divergence"] = Field(
        default="influence",
        description=(
            "influence: blocks go that turn the hidden state least. divergence: those without which, one at a time, logits change least "
            "(KL) on `samples` rows: half as many forwards as blocks squared."
        ),
    )
    samples: Count = Field(default=16, ge=1, le=4096, description="Calibration rows that divergence is measured on.")
    correction: Literal["linear", "none"] = Field(
        default="linear",
        description=(
            "linear: a least-squares map in the down projection before each run of blocks that go (a second survey). none: those around "
            "are joined as they are."
        ),
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.ratio is None) == (self.layers is None):
            raise ValueError("give either ratio, such as 0.25, or layers, the blocks that stay")
        return self


class PruneLayers(StructuredPass):
    """The pass `pruneLayers`."""

    Params: ClassVar[type[Model]] = PruneLayersParams
    name = "pruneLayers"
    sizes = ("num_hidden_layers",)

    def __init__(self, params: PruneLayersParams) -> None:
        self.params = params
        self.surveys = 1
        self.surveys_whole_blocks = params.measure == "divergence"
        self._family: Family | None = None
        self._count = 0
        self._gone: tuple[int, ...] | None = None
        self._scores: list[float] = []
        self._maps: dict[int, torch.Tensor] = {}
        """By the block before a run, counted in the source: fp32 [hidden, hidden]."""
        self._mapped: dict[str, int] = {}

    @property
    def transforms(self) -> bool:  # type: ignore[override]
        return self.params.correction == "linear"

    def prepare(self, layout: ModelLayout) -> ModelLayout:
        """Without the blocks that go; before the survey, without the last ones, which are as large. Raises UserError."""
        self.refuse_late(layout)
        self.refuse_changed(layout)
        self._family = family_to_resize(layout, self.name)
        blocks = block_numbers(layout)
        there = len(blocks)
        self._count = there - count_kept(self.name, "num_hidden_layers", there, self.params.ratio, self.params.layers)
        self.surveys = 2 if self.params.correction == "linear" and not self._family.post_norms else 1
        gone = tuple(range(there - self._count, there)) if self._gone is None else self._gone
        kept = [layer for layer in range(there) if layer not in gone]
        smaller = without(layout, gone)
        self._mapped = {smaller.units[blocks[layer]].name: layer for layer in self._maps}
        config = depth_config(layout.config, self._family, kept)
        return replace(smaller, config=config, warnings=(*layout.warnings, *self._warnings()))

    def _warnings(self) -> list[str]:
        lines = []
        if self._family is not None and self._family.post_norms and self.params.correction == "linear":
            lines.append(
                f"{self.name}: the model has norms behind its feed-forwards, through which no linear map can be folded: blocks that go are "
                "not made good"
            )
        if self._gone and self._gone[0] == 0 and self.params.correction == "linear":
            lines.append(f"{self.name}: the first block goes, and there is none before it that could make it good")
        return lines

    def surveyor(self, source: ModelLayout) -> Surveyor:
        from kompressor_worker.passes import layer_surveys

        if self._gone is not None:
            return layer_surveys.Maps(runs(self._gone))
        layers = len(block_numbers(source))
        if self.params.measure == "influence":
            return layer_surveys.Influence(layers)
        return layer_surveys.Divergence(layers, self.params.samples)

    def survey_rows(self, layers: int) -> float:
        return self.params.samples * (layers - 1) / 2 if self.params.measure == "divergence" else 0.0

    def survey_held(self, layers: int) -> int:
        return self.params.samples * layers if self.params.measure == "divergence" else 0

    def decide(self, found: Mapping[str, torch.Tensor]) -> None:
        if self._gone is None:
            self._scores = [float(x) for x in found["scores"]]
            order = sorted(range(len(self._scores)), key=lambda layer: (self._scores[layer], layer))
            self._gone = tuple(sorted(order[: self._count]))
            return
        self._maps = {int(name): value for name, value in found.items()}

    def transform(self, layout: UnitLayout, weights: dict[str, torch.Tensor]) -> None:
        """The map goes into the down projections (of all experts) of the block before a run: W' = T^T W, b' = T^T b."""
        if (matrix := self._map(layout)) is None:
            return
        for name in [n for n in weights if self._maps_into(n.rpartition(".")[0])]:
            weight = weights[name]
            weights[name] = (matrix.to(weight.device).T @ weight.float()).to(weight.dtype)

    def turn_output(self, linear: str, output: torch.Tensor) -> torch.Tensor:
        block = next((name for name in self._mapped if linear.startswith(f"{name}.")), None)
        if block is None or not self._maps_into(linear):
            return output
        return output @ self._maps[self._mapped[block]].to(output.device)

    def _maps_into(self, linear: str) -> bool:
        assert self._family is not None, "prepare comes first"
        experts = self._family.experts
        downs = [groups[-1].linears[0].name for groups in (self._family.feed_forward, experts.groups if experts else ()) if groups]
        return linear.endswith(tuple(downs))

    def _map(self, unit: UnitLayout) -> torch.Tensor | None:
        return self._maps[self._mapped[unit.name]] if unit.name in self._mapped else None

    def described(self) -> dict[str, Any]:
        """What the report says of it."""
        gone = list(self._gone or ())
        return {"layers": gone, "scores": self._scores, "measure": self.params.measure, "mapped": sorted(self._maps)}


def runs(layers: Sequence[int]) -> list[tuple[int, int]]:
    """(first, last) of every run of neighbours; one that begins with the first block has none before it, and is left out."""
    found: list[list[int]] = []
    for layer in layers:
        if found and found[-1][1] == layer - 1:
            found[-1][1] = layer
        else:
            found.append([layer, layer])
    return [(first, last) for first, last in found if first > 0]
