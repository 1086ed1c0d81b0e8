"""The status of a CompressionJob: what the operator says, and what its worker does (`progress`, `result`)."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from kompressor_api.fields import Message, Short, Text, Time, Warnings
from kompressor_api.recipe import RecipeStatus
from kompressor_api.runtime import RuntimeResult
from kompressor_api.target import TargetResult, TargetStatus

__all__ = ["CompressionJobStatus", "Drift", "GateResult", "PlanStatus", "Progress", "Result", "StatusCondition"]


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
    scratchBytes: int | None = Field(default=None, description="In the worker's /tmp: copies of checkpoints, experts for GGUF.")
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
