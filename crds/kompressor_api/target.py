"""`spec.target`: on what the result is to be served, in place of how it is to be made.

A GPU's name and a description of one are two fields, since a structural schema knows no union of a string and an object:
`gpu: RTX-4090`, or `hardware: {memory: 24Gi, computeCapability: "8.9", bandwidth: 1008G}`. So it is for an edge device: `device:
Raspberry-Pi-5-8GB`, or `memory: 4Gi, bandwidth: 50G`. No field has a default in the CRD, so that objects that say nothing of them stay as
they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from kompressor_api.datasets import Amount, Gate, Percent
from kompressor_api.fields import Count, Model, Number, Text
from kompressor_api.hardware import ENGINES, Hardware, device_named, gpu_named
from kompressor_api.quantity import parse

__all__ = ["TARGET_RULES", "HardwareSpec", "TargetResult", "TargetSpec", "TargetStatus", "passes_as_text"]

MAX_CONTEXT = 16_777_216
MAX_PLANS = 64
DEFAULT_INCREASE = "2%"
ONE_OF_THEM = "give either gpu or device (a name), hardware (a GPU's) or memory and bandwidth (a device's)"
BOTH = "memory and bandwidth describe a device together; give both"
ON_GPUS = "engine vllm serves on GPUs; give gpu or hardware, or engine: llama.cpp"

TARGET_RULES = (
    ("[has(self.gpu), has(self.hardware), has(self.device), has(self.memory)].exists_one(given, given)", ONE_OF_THEM),
    ("has(self.memory) == has(self.bandwidth)", BOTH),
    ("!has(self.engine) || self.engine != 'vllm' || has(self.gpu) || has(self.hardware)", ON_GPUS),
)
"""The same in CEL."""


def _some(value: str) -> str:
    if parse(value) < 1:
        raise ValueError(f"{value!r} is nothing; give an amount such as 24Gi or 1008G")
    return value


Something = Annotated[Amount, AfterValidator(_some)]


class HardwareSpec(Model):
    """A GPU that has no name here."""

    memory: Something = Field(description="Its memory, such as 24Gi.")
    compute_capability: Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]?\.[0-9]$", max_length=4)] = Field(
        description='Its CUDA compute capability as text, such as "8.9".'
    )
    bandwidth: Something = Field(description="Bytes read a second, such as 1008G.")


class TargetSpec(Model):
    """One GPU or edge device that the result is to fit, and what it may lose: the passes are chosen from that."""

    gpu: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = Field(
        default=None,
        description="The GPU that serves the result, such as RTX-4090. Another: hardware.",
    )
    device: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = Field(
        default=None,
        description=("The edge device that runs the result, such as Raspberry-Pi-5-8GB. Another: memory and bandwidth."),
    )
    memory: Something | None = Field(default=None, description="What llama.cpp may take, such as 4Gi.")
    bandwidth: Something | None = Field(default=None, description="Read a second, such as 50G.")
    engine: Literal["vllm", "llama.cpp"] | None = Field(
        default=None,
        description=("Default: vllm on a GPU, else llama.cpp."),
    )
    hardware: HardwareSpec | None = Field(default=None, description="Another GPU.")
    context: Count = Field(ge=1, le=MAX_CONTEXT, description="Tokens of the longest request, answer included.")
    concurrency: Count | None = Field(default=None, ge=1, le=65536, description="Requests of that length at a time. Default: 1.")
    max_perplexity_increase: Percent | None = Field(
        default=None,
        description=(f"By how much perplexity may rise; else a safer plan is tried. Default: {DEFAULT_INCREASE}."),
    )
    prefer: Literal["quality", "latency"] | None = Field(
        default=None,
        description=(
            "quality: the safest plan that fits. latency: the fastest, by prediction, that is expected to keep the limit. Default: quality."
        ),
    )
    price_per_hour: Annotated[Number, Field(gt=0, le=1_000_000, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Of an hour, in any currency.",
    )

    @model_validator(mode="after")
    def _one_place(self) -> TargetSpec:
        if sum(given is not None for given in (self.gpu, self.hardware, self.device, self.memory)) != 1:
            raise ValueError(ONE_OF_THEM)
        if (self.memory is None) != (self.bandwidth is None):
            raise ValueError(BOTH)
        if self.engine == "vllm" and self.gpu is None and self.hardware is None:
            raise ValueError(ON_GPUS)
        if self.gpu is not None:
            gpu_named(self.gpu)
        if self.device is not None:
            device_named(self.device)
        return self

    @property
    def on(self) -> Hardware:
        found = self._place
        return found if self.engine is None else replace(found, engine=self.engine)

    @property
    def _place(self) -> Hardware:
        if self.gpu is not None:
            return gpu_named(self.gpu)
        if self.device is not None:
            return device_named(self.device)
        if self.memory is not None and self.bandwidth is not None:
            name, memory, bandwidth = f"a device of {self.memory}", int(parse(self.memory)), float(parse(self.bandwidth))
            return Hardware(name, memory, bandwidth, None, engine="llama.cpp", kept=0)
        assert self.hardware is not None
        major, _, minor = self.hardware.compute_capability.partition(".")
        name = f"a GPU of {self.hardware.memory}"
        return Hardware(name, int(parse(self.hardware.memory)), float(parse(self.hardware.bandwidth)), (int(major), int(minor)))

    @property
    def format(self) -> str:
        """What output.format has to be."""
        return ENGINES[self.on.engine].format

    @property
    def requests(self) -> int:
        return self.concurrency or 1

    @property
    def gate(self) -> Gate:
        return Gate(metric="perplexity", max_increase=self.max_perplexity_increase or DEFAULT_INCREASE)

    @property
    def quality_first(self) -> bool:
        return self.prefer != "latency"


class TargetStatus(BaseModel):
    """The plan that was chosen for `spec.target`, from headers alone."""

    model_config = ConfigDict(extra="allow")
    name: Text | None = Field(default=None, description="Such as W4A16, KV FP8.")
    passes: list[Text] | None = Field(default=None, max_length=16, description="As spec.passes has them.")
    weightBytes: int | None = Field(default=None, description="The result's tensors.")
    kvBytes: int | None = Field(default=None, description="KV cache at full context.")
    activationBytes: int | None = Field(default=None, description="A step of prefill, logits.")
    overheadBytes: int | None = Field(default=None, description="Driver, libraries: assumed.")
    reserveBytes: int | None = Field(default=None, description="Left free on purpose.")
    totalBytes: int | None = Field(default=None, description="All of these together.")
    memoryBytes: int | None = Field(default=None, description="Of the GPU or device.")
    tokensPerSecond: Text | None = Field(default=None, description="Of all requests together, by roofline.")
    fallbacks: list[Text] | None = Field(default=None, max_length=16, description="Tried in this order if the loss is too large.")


class TargetResult(BaseModel):
    """What became of `spec.target`; written by the worker."""

    model_config = ConfigDict(extra="allow")
    plan: Text | None = Field(default=None, description="The plan that was carried out last.")
    passes: list[Text] | None = Field(default=None, max_length=16, description="As spec.passes has them.")
    tries: list[Text] | None = Field(default=None, max_length=MAX_PLANS, description="Each plan tried, and what was measured.")
    totalBytes: int | None = Field(default=None, description="Memory that serving takes, as planned.")
    memoryBytes: int | None = Field(default=None, description="Of the GPU or device.")
    bytesPerTokenBefore: int | None = Field(default=None, description="Read for a token, original.")
    bytesPerTokenAfter: int | None = Field(default=None, description="Read for a token, result.")
    tokensPerSecond: Text | None = Field(default=None, description="Of all requests together, by roofline.")
    costPerMillionTokens: Text | None = Field(default=None, description="At target.pricePerHour and the predicted rate.")


def passes_as_text(passes: list[dict[str, Any]]) -> list[str]:
    """One line a pass, as YAML of spec.passes has it after the dash."""
    return [f"{name}: {_flow(params)}" for entry in passes for name, params in entry.items()]


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(v) for v in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)
