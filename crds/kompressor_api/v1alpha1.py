"""`kompressor.io/v1alpha1`: the spec of a CompressionJob, as pydantic models; with the status, all of it.

The CRD is generated from these models (`make crds`), `kompressor run` validates with them, and the operator does the
same, so there is one truth. Every field's description is what `kubectl explain` prints. Unknown names are refused,
never dropped. The parameters of a pass live beside its maths in the worker; here a pass is one name and an opaque
object.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from kompressor_api.datasets import CalibrationSpec, DriftSpec, EvaluationSpec, Sample
from kompressor_api.fields import UNSTORED, Count, Flag, Model, Name, Short, Uri
from kompressor_api.locations import CaBundle, Location, SourceLocation, canonical_endpoint, canonical_uri, refuse_overlap
from kompressor_api.recipe import PassEntry, RecipeRef, RecipeSpec, RecipeStatus
from kompressor_api.runtime import RuntimeResult, RuntimeSpec
from kompressor_api.status import CompressionJobStatus, Drift, PlanStatus, Progress, Result, StatusCondition
from kompressor_api.target import HardwareSpec, TargetResult, TargetSpec, TargetStatus
from kompressor_api.worker import WorkerSpec, refuse_idle_processes

__all__ = [
    "CaBundle",
    "CompressionJobSpec",
    "CompressionJobStatus",
    "Drift",
    "HardwareSpec",
    "Location",
    "Model",
    "ModelSpec",
    "Name",
    "OutputSpec",
    "PassEntry",
    "PlanStatus",
    "Progress",
    "RecipeRef",
    "RecipeSpec",
    "RecipeStatus",
    "Result",
    "RetrySpec",
    "RuntimeResult",
    "RuntimeSpec",
    "Short",
    "SourceLocation",
    "StatusCondition",
    "TargetResult",
    "TargetSpec",
    "TargetStatus",
    "Uri",
    "WorkerSpec",
    "canonical_endpoint",
    "canonical_uri",
    "refuse_overlap",
]


class ModelSpec(Model):
    """The model to compress."""

    source: SourceLocation = Field(description="The checkpoint: config.json and safetensors files.")


class OutputSpec(Location):
    """Where the result is written. Readers see nothing there until all of it is there."""

    format: Literal["compressed-tensors", "gguf"] = Field(
        default="compressed-tensors",
        description="Of the result: compressed-tensors (vLLM, SGLang, transformers), gguf (llama.cpp).",
    )
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.gguf$", max_length=200)] | None = Field(
        default=None,
        description="Of a GGUF file. Default: model-<scheme>.gguf.",
    )
    max_file_bytes: Count | None = Field(
        default=None,
        ge=1 << 20,
        le=10**11,
        description="GGUF is split above it. Default: 45 GB.",
    )
    sparse_storage: Literal["dense", "bitmask"] = Field(
        default="dense",
        json_schema_extra={UNSTORED: True},
        description=(
            "How pruned linears that are not quantised are stored. dense: with their zeros. bitmask: what is left, little more than half "
            "the size at 50%; no loader reads it, kompressor expand makes it dense."
        ),
    )

    @field_validator("uri")
    @classmethod
    def _writable(cls, uri: str) -> str:
        if uri.startswith("hf://"):
            raise ValueError(f"output {uri}: a hub is read-only here; use s3:// or pvc://")
        return uri

    @model_validator(mode="after")
    def _of_its_format(self) -> OutputSpec:
        if self.format != "gguf" and (self.name is not None or self.max_file_bytes is not None):
            raise ValueError("name and maxFileBytes are of GGUF; set format: gguf")
        if self.format == "gguf" and self.sparse_storage == "bitmask":
            raise ValueError("GGUF knows no sparseStorage: bitmask; leave it out, or choose format compressed-tensors")
        return self


class RetrySpec(Model):
    """What happens when a worker fails for a reason that may pass."""

    limit: Count = Field(
        default=4,
        ge=0,
        le=100,
        description="Failed pods tolerated before the job is Failed; preemption is not counted.",
    )


class CompressionJobSpec(Model):
    """Model, passes and output. Immutable but for suspend, retry and ttlSecondsAfterFinished."""

    model: ModelSpec = Field(description="The model to compress.")
    output: OutputSpec = Field(description="Where the result is written, and in which format.")
    passes: list[PassEntry] = Field(
        default_factory=list,
        min_length=1,
        max_length=16,
        description="What to do, in this order; each entry has exactly one key, the name of a pass. Either this, recipeRef or target.",
    )
    recipe_ref: RecipeRef | None = Field(
        default=None,
        description="A recipe of passes, calibration and gates. It is read once, when the job starts. Either this, passes or target.",
    )
    target: TargetSpec | None = Field(
        default=None,
        description=(
            "A GPU or device that the result is to fit, and what it may lose; passes are chosen from that (status.plan). It needs "
            "evaluation, and has more to choose from with calibration. Either this, passes or recipeRef."
        ),
    )
    calibration: CalibrationSpec | None = Field(
        default=None, description="Data that passes measure activations with. Passes that read weights alone need none."
    )
    evaluation: EvaluationSpec | None = Field(
        default=None, description="Held-out data that the original and the result are compared on, and what the result must keep."
    )
    drift: DriftSpec | None = Field(
        default=None, description="Data as the model will meet it in use, whose activations are compared with those of calibration."
    )
    worker: WorkerSpec = Field(default_factory=WorkerSpec, description="The pod that does the work.")
    preflight: Literal["Job", "Skip"] = Field(
        default="Job",
        json_schema_extra={UNSTORED: True},
        description="Job: a small pod checks credentials, source, data and passes before the worker is started. Skip: the worker does.",
    )
    queue_name: Name | None = Field(
        default=None, description="Kueue's LocalQueue in the job's namespace that admits the worker. Default: no queue."
    )
    active_deadline_seconds: Count | None = Field(
        default=None,
        ge=1,
        le=31536000,
        description="Seconds that workers may take, all attempts together; time suspended is not counted. Default: no limit.",
    )
    deletion_policy: Literal["Retain", "Delete"] = Field(
        default="Retain",
        json_schema_extra={UNSTORED: True},
        description="What becomes of the output when this resource is deleted. Delete: what this job wrote goes too, and nothing else.",
    )
    suspend: Flag = Field(default=False, description="Stop the worker at its last committed block; false goes on from there.")
    retry: RetrySpec = Field(default_factory=RetrySpec, description="How failures that may pass are retried.")
    ttl_seconds_after_finished: Count | None = Field(
        default=None,
        ge=0,
        le=31536000,
        description="Seconds from the end until the child Job is removed; the CompressionJob stays. Default: never.",
    )

    @property
    def datasets(self) -> list[Sample]:
        """What is given of calibration, evaluation and drift."""
        return [sample for sample in (self.calibration, self.evaluation, self.drift) if sample is not None]

    @model_validator(mode="after")
    def _passes_or_a_recipe(self) -> CompressionJobSpec:
        if [bool(self.passes), self.recipe_ref is not None, self.target is not None].count(True) != 1:
            raise ValueError("give either passes, recipeRef or target, exactly one of them")
        return self

    @model_validator(mode="after")
    def _many_processes_have_work(self) -> CompressionJobSpec:
        if self.recipe_ref is None:  # whose passes are not known yet
            refuse_idle_processes(self.worker, self.passes)
        return self

    @model_validator(mode="after")
    def _a_target_is_measured(self) -> CompressionJobSpec:
        if self.target is None:
            return self
        if self.evaluation is None:
            raise ValueError("target.maxPerplexityIncrease is measured on evaluation, which is missing; add held-out data")
        if any(gate.metric == "perplexity" for gate in self.evaluation.gates):
            raise ValueError("evaluation has a gate on perplexity beside target.maxPerplexityIncrease; say it once, in the target")
        if self.target.format != self.output.format:
            raise ValueError(
                f"spec.target: {self.target.on.engine} on {self.target.on.name} serves {self.target.format}, and output.format is "
                f"{self.output.format}; set output.format: {self.target.format}"
            )
        return self

    @model_validator(mode="after")
    def _drift_from_something(self) -> CompressionJobSpec:
        if self.drift is not None and self.calibration is None and self.recipe_ref is None:
            raise ValueError("drift is measured from calibration, which is missing; add it")
        return self

    @model_validator(mode="after")
    def _source_and_output_are_apart(self) -> CompressionJobSpec:
        refuse_overlap(self.model.source, self.output)
        return self
