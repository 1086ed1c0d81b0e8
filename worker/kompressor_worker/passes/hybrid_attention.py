"""A sliding window in most layers, full attention where it is missed most: the KV cache of a long context shrinks to a share of itself.

Which layers need to see far is measured, not guessed by their number: each one by itself gets the window while all others keep what they
have, and what the logits then lose (KL) on calibration rows longer than the window is its score; the relative error of the block's own
output on all of them stands beside it. Both come from one survey. A second one tries whole sets of layers (`attention_sets`): those of the
highest scores, their neighbours and evenly spaced ones. No attention sinks: no loader keeps first tokens beside a window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from kompressor_api.fields import Count, Number
from kompressor_api.v1alpha1 import Model
from kompressor_worker.architectures import FAMILIES, text_config
from kompressor_worker.dropping import kept_layers
from kompressor_worker.errors import UserError
from kompressor_worker.layout import ModelLayout
from kompressor_worker.passes import Pass
from kompressor_worker.passes.attention_sets import SETS, sets
from kompressor_worker.schemes import Scheme
from kompressor_worker.windows import kept_tokens, recipe_for, windowed, windows_of, with_windows

if TYPE_CHECKING:
    import torch

    from kompressor_worker.block import Stage
    from kompressor_worker.passes.surveyor import Surveyor

NAME = "hybridAttention"


class HybridAttentionParams(Model):
    """Gives a sliding window to the layers that miss full attention least."""

    window: Count = Field(ge=1, description="Tokens that a layer with a window sees, itself the last of them.")
    full_layers: Count | None = Field(default=None, ge=1, description="Layers that keep full attention. Either this or kvBudget.")
    kv_budget: Number | None = Field(
        default=None,
        gt=0.0,
        lt=1.0,
        description=(
            "Share of the KV cache's tokens at `context` that may stay, such as 0.4: so many layers keep full attention. Either this or "
            "fullLayers."
        ),
    )
    context: Count | None = Field(
        default=None,
        ge=2,
        description="Tokens of a sequence that kvBudget and the report count. Default: max_position_embeddings.",
    )
    measure: Literal["divergence", "blockError"] = Field(
        default="divergence",
        description=(
            "divergence: by what logits lose (KL) once a layer alone has the window, on `samples` rows: half as many forwards as blocks "
            f"squared; then at most {SETS} sets of layers are tried. blockError: by the block's output; one forward."
        ),
    )
    samples: Count = Field(default=8, ge=1, le=4096, description="Calibration rows that divergence is measured on.")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.full_layers is None) == (self.kv_budget is None):
            raise ValueError("give either fullLayers, such as 4, or kvBudget, a share such as 0.4")
        return self


class HybridAttention(Pass):
    """The pass `hybridAttention`."""

    Params: ClassVar[type[Model]] = HybridAttentionParams
    surveys_whole_blocks = True
    survey_repeats = 1

    def __init__(self, params: HybridAttentionParams) -> None:
        self.params = params
        self.surveys = 2 if params.measure == "divergence" else 1
        self.shortest_row = params.window + 1
        self.context = 0
        """Tokens for which the report counts; known once the model is."""
        self._scores: dict[str, list[float]] = {}
        """Measure to score by layer of the source."""
        self._full: tuple[int, ...] = ()
        self._free: list[int] = []
        """Layers of the result that there is a choice for."""
        self._tried: dict[tuple[int, ...], float] = {}
        """Sets of layers of the source that keep full attention, to the KL of the logits."""
        self._kept: list[int] = []
        """Layers of the source, by layer of the result."""

    def prepare(self, layout: ModelLayout) -> ModelLayout:
        """With windows, and the names under which loaders keep to them; before the survey, on the last layers. Raises UserError."""
        recipe, text = recipe_for(layout, NAME), text_config(layout.config)
        self._kept = kept = kept_layers(layout)
        now = windows_of(layout.config, FAMILIES[layout.family or ""], len(kept))
        self._refuse(layout, now)
        self.context = self.params.context or int(text["max_position_embeddings"])
        count = self._count(now)
        self._free = [layer for layer, window in enumerate(now) if window is None]
        if self._tried:
            best = min(self._tried, key=lambda layers: self._tried[layers])
            self._full = tuple(layer for layer in self._free if kept[layer] in best)
        else:
            self._full = self._sets(count)[0]
        return with_windows(layout, recipe, self._full, self.params.window)

    def _sets(self, count: int) -> list[tuple[int, ...]]:
        """Of the result's layers; before the survey, the first that there are."""
        scores = self._scores.get(self.params.measure)
        return sets({layer: scores[self._kept[layer]] if scores else 0.0 for layer in self._free}, count)

    def assign(self, layout: ModelLayout, taken: Mapping[str, Scheme]) -> dict[str, Scheme]:
        """Nothing: weights stay as they are."""
        return {}

    def _refuse(self, layout: ModelLayout, now: Sequence[int | None]) -> None:
        """Raises UserError for what makes no sense of this model."""
        window, context = self.params.window, self.params.context
        if layout.windowed:
            raise UserError(f"{NAME}: an earlier {NAME} has given layers a window; ask once")
        positions = text_config(layout.config).get("max_position_embeddings")
        if type(positions) is not int:
            raise UserError(f"{NAME}: config.json says max_position_embeddings {positions!r}; correct it")
        if context is not None and context > positions:
            raise UserError(f"{NAME}: context {context} is above the model's max_position_embeddings {positions}; ask for that or less")
        if window >= (context or positions):
            what = "max_position_embeddings" if context is None else "context"
            raise UserError(f"{NAME}: window {window} is no less than {what} {context or positions}, so nothing is saved; choose less")
        there = sorted({one for one in now if one is not None})
        if there and there != [window]:
            raise UserError(
                f"{NAME}: {sum(one is not None for one in now)} of {len(now)} layers have a window of {there[0]} already, and config.json "
                f"has one size for all; set window {there[0]}"
            )
        if all(one is not None for one in now):
            raise UserError(f"{NAME}: all {len(now)} layers have a window already; leave {NAME} out")

    def _count(self, now: Sequence[int | None]) -> int:
        """How many layers keep full attention. Raises UserError."""
        full = sum(one is None for one in now)
        if (count := self.params.full_layers) is not None:
            if count >= full:
                raise UserError(
                    f"{NAME}: fullLayers {count} are to stay, the model has {full} of {len(now)}; ask for fewer, or leave it out"
                )
            return count
        assert self.params.kv_budget is not None
        window, context = self.params.window, self.context
        before = kept_tokens(now, context)
        allowed = [n for n in range(1, full) if n * context + (len(now) - n) * window <= self.params.kv_budget * before]
        if not allowed:
            least = (context + (len(now) - 1) * window) / before
            raise UserError(
                f"{NAME}: kvBudget {self.params.kv_budget:g} is below {least:.3g}, which one layer with full attention and a window of "
                f"{window} in the {len(now) - 1} others take of a context of {context}; raise it, or choose a smaller window"
            )
        return allowed[-1]

    def apply(self, stage: Stage) -> None:
        """Zeros, where the result's class wants what the source has not."""
        import torch

        from kompressor_worker.tensors import DTYPES

        for tensor in stage.layout.tensors:
            if tensor.encoding == "made" and tensor.name.endswith(".weight"):
                stage.weights[tensor.name] = torch.zeros(tensor.shape, dtype=DTYPES[tensor.dtype])

    # ---- the survey

    def surveyor(self, source: ModelLayout) -> Surveyor:
        from kompressor_worker.passes.layer_surveys import Windows, WindowSets

        recipe, family = recipe_for(source, NAME), FAMILIES[source.family or ""]
        now = windows_of(source.config, family, int(text_config(source.config)["num_hidden_layers"]))
        everywhere = replace(source, config=windowed(source.config, family, recipe, (), self.params.window))
        if self._scores:
            tried = [[self._kept[layer] for layer in layers] for layers in self._sets(len(self._full))]
            gone = sorted(set(range(len(now))) - set(self._kept))
            return WindowSets(everywhere, [self._kept[layer] for layer in self._free], tried, gone, self.params.samples)
        samples = self.params.samples if self.params.measure == "divergence" else 0
        return Windows(everywhere, [layer for layer, window in enumerate(now) if window is None], samples, self.params.window)

    def survey_rows(self, layers: int) -> float:
        return self.params.samples * ((layers - 1) / 2 + SETS) if self.params.measure == "divergence" else 0.0

    def survey_held(self, layers: int) -> int:
        return self.params.samples * max(layers, SETS) if self.params.measure == "divergence" else 0

    def decide(self, found: Mapping[str, torch.Tensor]) -> None:
        if "kl" in found:
            self._tried = {tuple(layers): float(kl) for layers, kl in zip(found["layers"].tolist(), found["kl"].tolist(), strict=True)}
        else:
            self._scores = {name: [float(x) for x in scores] for name, scores in sorted(found.items())}

    def chosen(self) -> dict[str, Any]:
        """What the report says of it; scores are by layer of the source."""
        return {
            "window": self.params.window,
            "fullLayers": list(self._full),
            "sourceLayers": [self._kept[layer] for layer in self._full],
            "measure": self.params.measure,
            "scores": self._scores,
            "tried": [{"sourceLayers": list(layers), "kl": kl} for layers, kl in self._tried.items()],
        }
