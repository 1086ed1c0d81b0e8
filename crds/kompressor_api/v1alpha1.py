"""`kompressor.io/v1alpha1`: the spec and status of a CompressionJob, as pydantic models.

The CRD is generated from these models (`make crds`), `kompressor run` validates with them, and the operator does the
same, so there is one truth. Every field's description is what `kubectl explain` prints. Unknown names are refused,
never dropped. The parameters of a pass live beside its maths in the worker; here a pass is one name and an opaque
object.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kompressor_api.datasets import CalibrationSpec, DriftSpec, EvaluationSpec, Sample
from kompressor_api.fields import UNSTORED, Count, Flag, Message, Model, Name, Short, Text, Time, Uri, Warnings
from kompressor_api.locations import CaBundle, Location, SourceLocation, canonical_endpoint, canonical_uri, refuse_overlap
from kompressor_api.recipe import PassEntry, RecipeRef, RecipeSpec, RecipeStatus
from kompressor_api.runtime import RuntimeResult, RuntimeSpec
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

    format: Literal["compressed-tensors"] = Field(
        default="compressed-tensors",
        description="File format of the result: compressed-tensors (vLLM, SGLang, transformers).",
    )
    sparse_storage: Literal["dense", "bitmask"] = Field(
        default="dense",
        json_schema_extra={UNSTORED: True},
        description=(
            "How linears that are pruned and not quantised are stored. dense: with their zeros, as every loader reads them. bitmask: by "
            "what is left of them, little more than half the size at 50%; no current loader reads it, kompressor expand makes it dense."
        ),
    )

    @field_validator("uri")
    @classmethod
    def _writable(cls, uri: str) -> str:
        if uri.startswith("hf://"):
            raise ValueError(f"output {uri}: a hub is read-only here; use s3:// or pvc://")
        return uri


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
            "A GPU that the result is to fit, and what it may lose; the passes are chosen from that, and the choice stands on status.plan "
            "before any GPU works. It needs evaluation, and with calibration it has more to choose from. Either this, passes or recipeRef."
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


class StatusCondition(BaseModel):
    """One observation, as in every Kubernetes resource."""

    model_config = ConfigDict(extra="allow")
    type: Short = Field(description="Ready, Reconciling, Stalled, Validated, Suspended, Complete, Failed or CleanupBlocked.")
    status: Literal["True", "False", "Unknown"] = Field(description="True, False or Unknown.")
    reason: Short = Field(description="CamelCase reason of the last transition.")
    message: Message = Field(default="", description="What happened, and what to do about it.")
    lastTransitionTime: Time = Field(description="When the status last changed.")
    observedGeneration: int | None = Field(default=None, description="The generation that this condition speaks of.")


class Progress(BaseModel):
    """How far the worker is; written by the worker."""

    model_config = ConfigDict(extra="allow")
    percent: int | None = Field(default=None, ge=0, le=100, description="Share of the source's bytes that are done, in percent.")
    unit: Short | None = Field(default=None, description="What is being compressed now, such as model.layers.7.")
    unitsDone: int | None = Field(default=None, description="Units (embeddings, blocks, head) committed.")
    unitsTotal: int | None = Field(default=None, description="Units in the model.")
    bytesRead: int | None = Field(default=None, description="Bytes of the source that are done.")
    bytesTotal: int | None = Field(default=None, description="Bytes of the source.")
    bytesPerSecond: int | None = Field(default=None, description="Source bytes per second, since this worker started.")
    etaSeconds: int | None = Field(default=None, description="Estimated seconds to the end.")
    resumedFrom: Short | None = Field(default=None, description="The unit at which this worker went on; absent if it began at the first.")
    step: int | None = Field(default=None, description="With the pass distil: training steps done.")
    stepsTotal: int | None = Field(default=None, description="Training steps in all.")
    tokensPerSecond: int | None = Field(default=None, description="Tokens that are trained on in a second, by all processes together.")
    loss: Text | None = Field(default=None, description="Training loss of the last step, in nats a token.")
    plan: Text | None = Field(default=None, description="With spec.target: the plan that is being tried.")
    tries: int | None = Field(default=None, description="With spec.target: plans tried so far, this one included.")
    updatedAt: Time | None = Field(default=None, description="When the worker last said so.")


class Drift(BaseModel):
    """How far activations in use are from those of calibration; written by the worker."""

    model_config = ConfigDict(extra="allow")
    distance: Text | None = Field(default=None, description="Largest distance of a layer, from 0 (the same distribution) to 1.")
    layer: Short | None = Field(default=None, description="The layer that is farthest off.")
    outside: Text | None = Field(
        default=None, description="Largest share of a layer's values outside of the calibrated range, such as 0.2%."
    )
    layersAbove: int | None = Field(default=None, description="Layers above the threshold; warnings name them.")


class GateResult(BaseModel):
    """A gate and what was measured for it; written by the worker."""

    model_config = ConfigDict(extra="allow")
    metric: Short | None = Field(default=None, description="perplexity, kl, latency or memory.")
    value: Text | None = Field(
        default=None, description="What was measured: by how much perplexity rose, such as 1.2%, nats a token, a duration, bytes."
    )
    limit: Text | None = Field(default=None, description="The limit in the spec.")
    met: bool | None = Field(default=None, description="Whether the value keeps the limit.")


class Result(BaseModel):
    """What came out; written by the worker when the output is published."""

    model_config = ConfigDict(extra="allow")
    uri: Text | None = Field(default=None, description="Where the result is.")
    sourceBytes: int | None = Field(default=None, description="Tensor bytes of the source.")
    outputBytes: int | None = Field(default=None, description="Tensor bytes of the result.")
    ratio: Text | None = Field(default=None, description="sourceBytes / outputBytes, such as 3.6x.")
    quantizedTensors: int | None = Field(default=None, description="Linear layers quantised.")
    relativeError: Text | None = Field(
        default=None, description="Root of squared weight error over squared weights, all quantised layers together."
    )
    prunedTensors: int | None = Field(default=None, description="Linear layers pruned; absent if none was.")
    sparsity: Text | None = Field(default=None, description="Share of the pruned layers' weights that are zero, such as 50%.")
    parametersBefore: int | None = Field(default=None, description="Parameters of the source; absent where its shape stayed.")
    parametersAfter: int | None = Field(default=None, description="Parameters of the result.")
    kvContext: int | None = Field(
        default=None, description="Tokens of a sequence for which kvBytesPerToken counts; absent where the KV cache stays."
    )
    kvBytesPerTokenBefore: int | None = Field(default=None, description="Bytes of KV cache for each of these tokens, with the source.")
    kvBytesPerTokenAfter: int | None = Field(default=None, description="The same with the result.")
    bitmaskTensors: int | None = Field(default=None, description="Pruned linear layers stored by a bitmask; absent if none is.")
    bitmaskSavedBytes: int | None = Field(default=None, description="Bytes by which these are smaller than with their zeros.")
    perplexityBefore: Text | None = Field(default=None, description="Perplexity of the original on the evaluation data.")
    perplexityAfter: Text | None = Field(default=None, description="Perplexity of the result on the same tokens.")
    trainingSteps: int | None = Field(default=None, description="With the pass distil: training steps done.")
    trainingTokens: int | None = Field(default=None, description="Tokens trained on.")
    perplexityBeforeTraining: Text | None = Field(default=None, description="Perplexity of the student as training found it.")
    klBeforeTraining: Text | None = Field(default=None, description="Its mean KL divergence from the original.")
    klRecovered: Text | None = Field(default=None, description="Share of that divergence which training has taken away, such as 85%.")
    kl: Text | None = Field(default=None, description="Mean KL divergence of the result's logits from the original's, in nats a token.")
    topOneAgreement: Text | None = Field(
        default=None, description="Share of tokens at which both models find the same next token likeliest, such as 98.5%."
    )
    evaluatedTokens: int | None = Field(default=None, description="Tokens of the evaluation data that were scored.")
    gates: list[GateResult] | None = Field(default=None, max_length=4, description="The gates of spec.evaluation, and what was measured.")
    drift: Drift | None = Field(default=None, description="How far activations in use are from those of calibration.")
    runtime: RuntimeResult | None = Field(default=None, description="With evaluation.runtime: at the largest batch size.")
    target: TargetResult | None = Field(default=None, description="With spec.target: which plan it became, and what that promises.")
    calibrationDigest: Text | None = Field(default=None, description="Digest of the exact token ids that passes were calibrated with.")
    sourceDigest: Text | None = Field(default=None, description="Digest of the source's files and headers.")
    resultDigest: Text | None = Field(default=None, description="Digest over the digests of all published tensors.")
    resumedFromUnit: int | None = Field(default=None, description="The unit at which the last worker went on; absent if undisturbed.")
    seconds: int | None = Field(default=None, description="Wall-clock seconds of the last worker.")
    warnings: Warnings | None = Field(default=None, description="What the report warns of.")


class PlanStatus(BaseModel):
    """What the preflight estimates, from headers alone."""

    model_config = ConfigDict(extra="allow")
    sourceBytes: int | None = Field(default=None, description="Tensor bytes of the source.")
    outputBytes: int | None = Field(default=None, description="Tensor bytes that the result will have.")
    ratio: Text | None = Field(default=None, description="sourceBytes / outputBytes, such as 3.6x.")
    hostMemoryBytes: int | None = Field(default=None, description="Peak of the worker's memory on the host.")
    gpuMemoryBytes: int | None = Field(default=None, description="Peak of the worker's memory on the GPU; absent without one.")
    scratchBytes: int | None = Field(default=None, description="With evaluation.runtime: copies of checkpoints in the worker's /tmp.")
    seconds: int | None = Field(default=None, description="Wall-clock seconds that the worker will take.")
    trainingSteps: int | None = Field(default=None, description="With the pass distil: training steps, where they are known beforehand.")
    trainingTokens: int | None = Field(default=None, description="Tokens that they take, at most.")
    trainingSeconds: int | None = Field(default=None, description="Wall-clock seconds of them, which are among the others.")
    trainingMemoryBytes: int | None = Field(default=None, description="Memory of a training process on its device.")
    units: int | None = Field(default=None, description="Units (embeddings, blocks, head) in the model.")
    parametersBefore: int | None = Field(default=None, description="Parameters of the source; absent where its shape stays.")
    parametersAfter: int | None = Field(default=None, description="Parameters that the result will have.")
    target: TargetStatus | None = Field(default=None, description="With spec.target: what was chosen, and why it fits.")
    kvContext: int | None = Field(
        default=None, description="Tokens of a sequence for which kvBytesPerToken counts; absent where the KV cache stays."
    )
    kvBytesPerTokenBefore: int | None = Field(default=None, description="Bytes of KV cache for each of these tokens, with the source.")
    kvBytesPerTokenAfter: int | None = Field(default=None, description="The same with the result.")
    warnings: Warnings | None = Field(default=None, description="What the plan warns of.")


class CompressionJobStatus(BaseModel):
    """What is true now. Conditions follow kstatus; phase is for people."""

    model_config = ConfigDict(extra="allow")
    observedGeneration: int = Field(default=-1, description="The generation that the conditions speak of.")
    phase: Short | None = Field(default=None, description="One word for people; nothing decides on it.")
    conditions: list[StatusCondition] = Field(
        default_factory=list,
        max_length=16,
        description="Ready, Reconciling, Stalled, Validated, Suspended, Complete, Failed, CleanupBlocked.",
    )
    jobName: Short | None = Field(default=None, description="The child Job of the current attempt.")
    attempt: int | None = Field(default=None, description="The current attempt; a new Job each.")
    retries: int | None = Field(default=None, description="Pods of the current Job that failed.")
    startTime: Time | None = Field(default=None, description="When the first child Job was created.")
    completionTime: Time | None = Field(default=None, description="When the job ended.")
    specDigest: Text | None = Field(default=None, description="Digest of the spec that the worker was given.")
    recipe: RecipeStatus | None = Field(default=None, description="The recipe that the worker's spec was made with.")
    plan: PlanStatus | None = Field(default=None, description="What the preflight estimates.")
    memoryPlan: int | None = Field(default=None, description="How many times smaller than usual the worker's memory plan is: 0, 1 or 2.")
    failures: int | None = Field(default=None, description="Failures of all attempts so far that count against spec.retry.limit.")
    resumedFromBlock: Short | None = Field(default=None, description="The unit at which the current worker went on.")
    workerImage: Text | None = Field(default=None, description="Image of the worker; all attempts have the same.")
    gpuSeconds: int | None = Field(default=None, description="GPUs times seconds, over all attempts.")
    progress: Progress | None = Field(default=None, description="How far the worker is; written by the worker.")
    result: Result | None = Field(default=None, description="What came out; written by the worker.")
