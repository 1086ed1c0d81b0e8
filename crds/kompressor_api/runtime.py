"""`spec.evaluation.runtime`: the original and the result served by an inference engine on the worker's own hardware, and timed.

No field has a default in the CRD, so that objects that say nothing of them stay as they are.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from kompressor_api.fields import UNSTORED, Count, Model, Number, Text

__all__ = ["Duration", "RuntimeResult", "RuntimeSpec", "seconds_of"]

Duration = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,5})(\.[0-9]{1,6})?(ms|s)$", max_length=16)]
MAX_TOKENS = 1_048_576
UNIT = {"ms": 1e-3, "s": 1.0}
_UNSTORED: dict[str, Any] = {UNSTORED: True}


def seconds_of(duration: str) -> float:
    """Of a Duration, such as 800ms or 1.5s."""
    unit = "ms" if duration.endswith("ms") else "s"
    return float(duration.removesuffix(unit)) * UNIT[unit]


def _each_once(batch: list[int]) -> list[int]:
    if len(set(batch)) < len(batch):
        raise ValueError(f"{batch} names a batch size twice; name each once")
    return batch


class RuntimeSpec(Model):
    """How fast the result is served, and in how much memory: measured beside the original before anything is published."""

    engine: Literal["vllm", "llama.cpp"] = Field(
        description="In the worker's image (Dockerfile: worker-vllm, worker-llama-cpp). vllm serves compressed-tensors, llama.cpp gguf."
    )
    prompt: Count = Field(
        default=512, ge=1, le=MAX_TOKENS, json_schema_extra=_UNSTORED, description="Tokens of a prompt, from the evaluation data."
    )
    generate: Count = Field(default=128, ge=2, le=MAX_TOKENS, json_schema_extra=_UNSTORED, description="Tokens generated after it.")
    batch: Annotated[list[Annotated[Count, Field(ge=1, le=4096)]], AfterValidator(_each_once)] = Field(
        default_factory=lambda: [1],
        min_length=1,
        max_length=4,
        description="Requests at a time, each size by itself. Default: [1].",
    )
    rounds: Count = Field(default=5, ge=1, le=100, json_schema_extra=_UNSTORED, description="Rounds after a warm-up; medians count.")
    price_per_hour: Annotated[Number, Field(gt=0, le=1_000_000, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Of an hour, in any currency.",
    )
    timeout_seconds: Count = Field(default=3600, ge=1, le=604_800, json_schema_extra=_UNSTORED, description="For all of it.")

    @property
    def tokens(self) -> int:
        """Of a request, prompt and answer together."""
        return self.prompt + self.generate


class RuntimeResult(BaseModel):
    """What an engine measured, at the largest batch size; the report has all."""

    model_config = ConfigDict(extra="allow")
    engine: Text | None = Field(default=None, description="The engine and its version.")
    device: Text | None = Field(default=None, description="What it ran on.")
    batch: int | None = Field(default=None, description="Requests at the same time.")
    timeToFirstTokenBefore: Text | None = Field(default=None, description="Of a request, original.")
    timeToFirstTokenAfter: Text | None = Field(default=None, description="Result.")
    latencyBefore: Text | None = Field(default=None, description="To the last token, original.")
    latencyAfter: Text | None = Field(default=None, description="Result.")
    tokensPerSecondBefore: Text | None = Field(default=None, description="Of all requests, original.")
    tokensPerSecondAfter: Text | None = Field(default=None, description="Result.")
    memoryBytesBefore: int | None = Field(default=None, description="Peak of the GPU's, else the host's, original.")
    memoryBytesAfter: int | None = Field(default=None, description="Result.")
    costPerMillionTokensBefore: Text | None = Field(default=None, description="Of generated tokens, original.")
    costPerMillionTokensAfter: Text | None = Field(default=None, description="Result.")
    failed: Text | None = Field(default=None, description="Why there are no figures.")
