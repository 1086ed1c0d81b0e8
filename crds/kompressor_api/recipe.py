"""Recipes: passes, calibration and gates under a name, for many jobs. What a job takes from one is fixed when it starts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from kompressor_api.datasets import CalibrationSpec, Gate, one_gate_a_metric
from kompressor_api.fields import Model, Name, Short, Text

__all__ = ["PassEntry", "RecipeRef", "RecipeSpec", "RecipeStatus"]

PassEntry = Annotated[dict[str, dict[str, Any]], Field(min_length=1, max_length=1)]


class RecipeRef(Model):
    """Names a recipe."""

    kind: Literal["CompressionRecipe", "ClusterCompressionRecipe"] = Field(
        default="CompressionRecipe",
        description="CompressionRecipe (in the job's namespace) or ClusterCompressionRecipe (for the whole cluster).",
    )
    name: Name = Field(description="Name of the recipe.")


class RecipeSpec(Model):
    """Passes, calibration and gates. A section that a job gives itself replaces the recipe's whole section."""

    passes: list[PassEntry] = Field(
        min_length=1,
        max_length=16,
        description="What to do, in this order; each entry has exactly one key, the name of a pass.",
    )
    calibration: CalibrationSpec | None = Field(
        default=None, description="Data that passes measure activations with; its Secret and claim are looked for in the job's namespace."
    )
    gates: Annotated[list[Gate], AfterValidator(one_gate_a_metric)] = Field(
        default_factory=list,
        max_length=4,
        description="Limits that results must keep, at most one a metric; a job that uses them has spec.evaluation.",
    )


class RecipeStatus(BaseModel):
    """Which recipe, as it was when the job started."""

    model_config = ConfigDict(extra="allow")
    kind: Short | None = Field(default=None, description="CompressionRecipe or ClusterCompressionRecipe.")
    name: Short | None = Field(default=None, description="Name of the recipe.")
    generation: int | None = Field(default=None, description="Generation of the recipe that was read.")
    digest: Text | None = Field(default=None, description="Digest of the recipe's spec that was read.")
