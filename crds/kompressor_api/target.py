"""`spec.target`: on what the result is to be served, in place of how it is to be made.

A GPU's name and a description of one are two fields, since a structural schema knows no union of a string and an object:
`gpu: RTX-4090`, or `hardware: {memory: 24Gi, computeCapability: "8.9", bandwidth: 1008G}`. No field has a default in the CRD, so that
objects that say nothing of them stay as they are.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from kompressor_api.datasets import Amount, Gate, Percent
from kompressor_api.fields import Count, Model, Number, Text
from kompressor_api.hardware import GPUS, Hardware, gpu_named
from kompressor_api.quantity import parse

__all__ = ["HardwareSpec", "TargetResult", "TargetSpec", "TargetStatus", "passes_as_text"]

MAX_CONTEXT = 16_777_216
MAX_PLANS = 64
DEFAULT_INCREASE = "2%"


class HardwareSpec(Model):
    """A GPU that has no name here."""

    memory: Amount = Field(description="Its memory, such as 24Gi.")
    compute_capability: Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]?\.[0-9]$", max_length=4)] = Field(
        description='Its CUDA compute capability as text, such as "8.9": it decides which schemes run there.'
    )
    bandwidth: Amount = Field(description="Bytes a second that it reads from its memory, such as 1008G: the data sheet's, for predictions.")

    @field_validator("memory", "bandwidth")
    @classmethod
    def _something(cls, value: str) -> str:
        if parse(value) < 1:
            raise ValueError(f"{value!r} is nothing; give an amount such as 24Gi or 1008G")
        return value


class TargetSpec(Model):
    """One GPU that the result is to fit, and what it may lose: the passes are chosen from that."""

    gpu: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = Field(
        default=None, description=f"The GPU that serves the result: {', '.join(GPUS)}. Another one: hardware. Either this or hardware."
    )
    hardware: HardwareSpec | None = Field(default=None, description="The GPU by its memory, bandwidth and compute capability.")
    context: Count = Field(ge=1, le=MAX_CONTEXT, description="Tokens of the longest request, prompt and answer together.")
    concurrency: Count | None = Field(
        default=None, ge=1, le=65536, description="Requests of that length at a time that there must be memory for. Default: 1."
    )
    max_perplexity_increase: Percent | None = Field(
        default=None,
        description=(
            "By how much perplexity on the evaluation data may rise. Measured before anything is published: where it is more, the next "
            f"safer plan that fits is tried. Default: {DEFAULT_INCREASE}."
        ),
    )
    prefer: Literal["quality", "latency"] | None = Field(
        default=None,
        description=(
            "quality: the safest plan that fits. latency: the one predicted to be fastest of those expected to keep maxPerplexityIncrease. "
            "Default: quality."
        ),
    )
    price_per_hour: Annotated[Number, Field(gt=0, le=1_000_000, allow_inf_nan=False)] | None = Field(
        default=None,
        description="An hour of that GPU, in any currency: with it the report predicts what a million tokens cost.",
    )

    @model_validator(mode="after")
    def _one_gpu(self) -> TargetSpec:
        if (self.gpu is None) == (self.hardware is None):
            raise ValueError("give either gpu (a name) or hardware (what it has), exactly one of them")
        if self.gpu is not None:
            gpu_named(self.gpu)
        return self

    @property
    def on(self) -> Hardware:
        if self.gpu is not None:
            return gpu_named(self.gpu)
        assert self.hardware is not None
        major, _, minor = self.hardware.compute_capability.partition(".")
        name = f"a GPU of {self.hardware.memory}"
        return Hardware(name, int(parse(self.hardware.memory)), float(parse(self.hardware.bandwidth)), (int(major), int(minor)))

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
    name: Text | None = Field(default=None, description="The plan in words, such as W4A16, KV FP8.")
    passes: list[Text] | None = Field(default=None, max_length=16, description="Its passes, as spec.passes would have them.")
    weightBytes: int | None = Field(default=None, description="The result's tensors.")
    kvBytes: int | None = Field(default=None, description="KV cache of all requests at their full context.")
    activationBytes: int | None = Field(default=None, description="The largest step of a prefill, and logits.")
    overheadBytes: int | None = Field(default=None, description="Driver, libraries, graphs: assumed.")
    reserveBytes: int | None = Field(default=None, description="What is left free on purpose.")
    totalBytes: int | None = Field(default=None, description="All of these together.")
    memoryBytes: int | None = Field(default=None, description="Memory of the GPU.")
    tokensPerSecond: Text | None = Field(default=None, description="Tokens a second, all requests together: a prediction by roofline.")
    fallbacks: list[Text] | None = Field(
        default=None, max_length=16, description="Plans that are tried in this order if the measured loss is too large."
    )


class TargetResult(BaseModel):
    """What became of `spec.target`; written by the worker."""

    model_config = ConfigDict(extra="allow")
    plan: Text | None = Field(default=None, description="The plan that was carried out last.")
    passes: list[Text] | None = Field(default=None, max_length=16, description="Its passes, as spec.passes would have them.")
    tries: list[Text] | None = Field(default=None, max_length=MAX_PLANS, description="Each plan that was tried, with what was measured.")
    totalBytes: int | None = Field(default=None, description="Memory that serving the result takes, as planned.")
    memoryBytes: int | None = Field(default=None, description="Memory of the GPU.")
    bytesPerTokenBefore: int | None = Field(default=None, description="Bytes read for a token at decode, of the original.")
    bytesPerTokenAfter: int | None = Field(default=None, description="The same of the result.")
    tokensPerSecond: Text | None = Field(default=None, description="Tokens a second, all requests together: a prediction by roofline.")
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
