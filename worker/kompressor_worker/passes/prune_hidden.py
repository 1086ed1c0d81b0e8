"""A narrower residual stream: one set of channels for the whole model, in embeddings, norms, every block and the head.

Which stay follows from a survey: at each norm, a channel's share of what its readers get, summed over the model. What a norm divides by
changes with the channels; measured, it is the factor on its weight (docs/decisions/0025-structured-pruning.md). The output projections are
corrected by least squares against the original's, whose rows flow beside those of what comes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from kompressor_api.fields import Count, Number
from kompressor_api.names import Reason
from kompressor_api.v1alpha1 import Model
from kompressor_worker.architectures import Dimensions, text_config
from kompressor_worker.errors import UserError
from kompressor_worker.layout import ModelLayout, UnitLayout
from kompressor_worker.passes.structured import RATIO, StructuredParams, StructuredPass, count_kept
from kompressor_worker.resizing import family_to_resize, head_size, refuse_latent, resized

if TYPE_CHECKING:
    import torch

    from kompressor_worker.block import Reduction
    from kompressor_worker.passes.channels import Channels
    from kompressor_worker.passes.surveyor import Surveyor


class PruneHiddenParams(StructuredParams):
    """Takes channels out of the residual stream, the same ones in the whole model."""

    ratio: Number | None = RATIO
    hidden_size: Count | None = Field(default=None, ge=1, description="Channels that stay. Either this or ratio.")
    multiple: Count = Field(
        default=128,
        ge=1,
        le=4096,
        description="What a ratio leaves is rounded to a multiple of this, which GPUs and quantised groups want.",
    )
    correction: Literal["leastSquares", "none"] = Field(
        default="leastSquares",
        description=(
            "leastSquares: output projections (not of experts) are fitted to the original's outputs on "
            "calibration data. none: they lose their rows."
        ),
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.ratio is None) == (self.hidden_size is None):
            raise ValueError("give either ratio, such as 0.25, or hiddenSize, the channels that stay")
        return self


class PruneHidden(StructuredPass):
    """The pass `pruneHidden`."""

    Params: ClassVar[type[Model]] = PruneHiddenParams
    name = "pruneHidden"
    sizes = ("hidden_size",)
    transforms = True
    surveys = 1

    def __init__(self, params: PruneHiddenParams) -> None:
        self.params = params
        self.corrects = params.correction == "leastSquares"
        self.reduces = frozenset({"o", "down"}) if self.corrects else frozenset()
        self._kept = 0
        self._channels: Channels | None = None

    def prepare(self, layout: ModelLayout) -> ModelLayout:
        """A narrower hidden state throughout; `head_dim` is written out. Raises UserError."""
        self.refuse_late(layout)
        self.refuse_changed(layout)
        family = family_to_resize(layout, self.name)
        refuse_latent(layout, family, self.name)
        if not family.pre_norms:
            raise UserError(
                f"{self.name}: a {text_config(layout.config)['model_type']} has no norm before attention and feed-forward, by which "
                f"channels are weighed; leave {self.name} out",
                Reason.UNSUPPORTED_MODEL,
            )
        if text_config(layout.config) is not layout.config:
            raise UserError(
                f"{self.name}: the model also sees or hears, and what it sees enters the residual stream as wide as before; "
                f"leave {self.name} out, or use pruneWidth, pruneHeads or pruneLayers",
                Reason.UNSUPPORTED_MODEL,
            )
        there = Dimensions(family, layout.config)["hidden"]
        if there is None:
            raise UserError(f"{self.name}: config.json says hidden_size {layout.config.get('hidden_size')!r}; correct it")
        self._kept = count_kept(self.name, "hidden_size", there, self.params.ratio, self.params.hidden_size, self.params.multiple)
        smaller = resized(layout, {"hidden_size": self._kept, "head_dim": head_size(layout, family, self.name)})
        if self._channels is not None:
            self._channels.place(smaller)
        return smaller

    def surveyor(self, source: ModelLayout) -> Surveyor:
        from kompressor_worker.passes.channels import ChannelSurvey

        return ChannelSurvey(family_to_resize(source, self.name))

    def decide(self, found: Mapping[str, torch.Tensor]) -> None:
        from kompressor_worker.passes.channels import Channels

        self._channels = Channels.choose(found, self._kept)

    @property
    def _decided(self) -> Channels:
        assert self._channels is not None, "the survey comes first"
        return self._channels

    def described(self) -> dict[str, Any]:
        return {"channels": self._decided.kept.tolist(), "normFactors": self._decided.factors_told()}

    def transform(self, layout: UnitLayout, weights: dict[str, torch.Tensor]) -> None:
        """A decoder block, or the final norm."""
        self._decided.cut(layout, weights)

    def transform_rows(self, name: str, rows: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        return self._decided.embedding(rows) if norm is None else self._decided.rows(rows)

    def turn(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._decided.rows(hidden)

    def reduce(self, reduction: Reduction) -> None:
        """Takes no column away; fits the output projection to the original's outputs. Raises BadNumerics."""
        from kompressor_worker.passes.channels import fit

        fit(reduction, self.name)
