"""What the passes that make a model smaller in shape have in common: when they may come, and how much stays. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from kompressor_api.v1alpha1 import Model
from kompressor_worker.architectures import text_config
from kompressor_worker.errors import UserError
from kompressor_worker.layout import ModelLayout
from kompressor_worker.passes import Pass
from kompressor_worker.schemes import Scheme

RATIO = Field(default=None, gt=0.0, lt=1.0, description="Share that is taken away. Either this or the count that stays.")


class StructuredParams(Model):
    """Base of the parameters of a pass that changes sizes."""

    @model_validator(mode="before")
    @classmethod
    def _alike_in_all_layers(cls, given: Any) -> Any:
        if isinstance(given, dict) and (asked := next((name for name in ("targets", "ignore") if name in given), None)):
            raise ValueError(
                f"{asked}: sizes are the same in all layers, for config.json has one number and no portable loader reads sizes by layer; "
                f"leave {asked} out"
            )
        return given


class CorrectedParams(StructuredParams):
    """Base of the parameters of a pass that takes input columns of a linear away."""

    correction: Literal["leastSquares", "none"] = Field(
        default="leastSquares",
        description=(
            "leastSquares: the columns that stay make good, on the calibration data, for those that go: those that cost least then. none: "
            "those go that add least."
        ),
    )


class StructuredPass(Pass):
    """Base of a pass that takes heads, neurons, channels or blocks away: it comes before whatever is said of single weights."""

    name: ClassVar[str]
    sizes: ClassVar[tuple[str, ...]]
    """In config.json: what becomes smaller."""

    def assign(self, layout: ModelLayout, taken: Mapping[str, Scheme]) -> dict[str, Scheme]:
        """Nothing. Raises UserError after a pass that quantises."""
        if taken:
            linear, scheme = next(iter(taken.items()))
            raise UserError(f"{self.name}: {linear} is {scheme.name} by an earlier pass; put {self.name} before the passes that quantise")
        return {}

    def refuse_late(self, layout: ModelLayout) -> None:
        """Raises UserError after a pass that sets weights to zero, or that measures the cache, and after another of the same name."""
        for size in self.sizes:
            was, now = (text_config(config).get(size) for config in (layout.source_config, layout.config))
            if was != now:
                raise UserError(f"{self.name}: an earlier {self.name} has left {size} {now} of {was}; ask once, for all that shall go")
        if pruned := next((x.name for x in layout.linears() if x.pruned is not None), None):
            raise UserError(
                f"{self.name}: {pruned} is to have zeros by an earlier pass, and loses some with its shape; put {self.name} first"
            )
        if layout.windowed:
            raise UserError(f"{self.name}: an earlier hybridAttention has chosen among layers as they were; put {self.name} first")
        if layout.kv_cache is not None:
            raise UserError(f"{self.name}: an earlier kvCache has scales for the cache as it was; put {self.name} before kvCache")

    def refuse_changed(self, layout: ModelLayout) -> None:
        """Raises UserError where an earlier pass has given the residual stream another basis than the survey of the source has."""
        before, now = (text_config(config).get("hidden_size") for config in (layout.source_config, layout.config))
        if before != now:
            raise UserError(f"{self.name}: an earlier pruneHidden has left {now} of the {before} channels; put {self.name} first, once")
        if layout.rotated:
            raise UserError(f"{self.name}: an earlier rotate has turned the hidden states that it looks at; put {self.name} first")


def count_kept(by: str, what: str, there: int, ratio: float | None, count: int | None, multiple: int = 1) -> int:
    """How many of `there` stay: `count`, or what `ratio` leaves, to the nearest multiple. `what`: its name in config.json.

    Raises UserError: more than there are, all, or none."""
    if count is not None:
        if count >= there:
            raise UserError(f"{by}: {what} {count} is to stay, the model has {there}; ask for fewer, or leave {by} out")
        return count
    assert ratio is not None
    kept = round(there * (1 - ratio) / multiple) * multiple
    if not 0 < kept < there:
        several = f" to a multiple of {multiple}" if multiple > 1 else ""
        remedy = "choose another ratio, or a smaller multiple" if multiple > 1 else "choose another ratio"
        raise UserError(f"{by}: ratio {ratio:g} of {what} {there} leaves {kept}, rounded{several}; {remedy}")
    return kept
