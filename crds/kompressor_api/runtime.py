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
        description=(
            "The engine, which the worker's image must have (Dockerfile: targets worker-vllm and worker-llama-cpp). vllm serves "
            "compressed-tensors, llama.cpp serves gguf."
        )
    )
    prompt: Count = Field(
        default=512, ge=1, le=MAX_TOKENS, json_schema_extra=_UNSTORED, description="Tokens of a prompt, out of the evaluation data."
    )
    generate: Count = Field(default=128, ge=2, le=MAX_TOKENS, json_schema_extra=_UNSTORED, description="Tokens generated after it.")
    batch: Annotated[list[Annotated[Count, Field(ge=1, le=4096)]], AfterValidator(_each_once)] = Field(
        default_factory=lambda: [1],
        min_length=1,
        max_length=4,
        description="Requests at the same time, each size by itself. Default: [1].",
    )
    rounds: Count = Field(default=5, ge=1, le=100, json_schema_extra=_UNSTORED, description="Rounds after a warm-up; medians count.")
    price_per_hour: Annotated[Number, Field(gt=0, le=1_000_000, allow_inf_nan=False)] | None = Field(
        default=None,
        description="An hour of this hardware, in any currency, for costs.",
    )
    timeout_seconds: Count = Field(default=3600, ge=1, le=604_800, json_schema_extra=_UNSTORED, description="For all of it.")

    @property
    def tokens(self) -> int:
        """Of a request, prompt and answer together."""
        return self.prompt + self.generate


class RuntimeResult(BaseModel):
    """What an engine measured, at the largest batch size; the report has all of them. Written by the worker."""

    model_config = ConfigDict(extra="allow")
    engine: Text | None = Field(default=None, description="The engine and its version.")
    device: Text | None = Field(default=None, description="What it ran on.")
    batch: int | None = Field(default=None, description="Requests at the same time.")
    timeToFirstTokenBefore: Text | None = Field(default=None, description="Of a request, with the original.")
    timeToFirstTokenAfter: Text | None = Field(default=None, description="With the result.")
    latencyBefore: Text | None = Field(default=None, description="Of a request, to its last token, with the original.")
    latencyAfter: Text | None = Field(default=None, description="With the result.")
    tokensPerSecondBefore: Text | None = Field(default=None, description="While decoding, all requests together, with the original.")
    tokensPerSecondAfter: Text | None = Field(default=None, description="With the result.")
    memoryBytesBefore: int | None = Field(default=None, description="The engine's peak on the GPU, else on the host, with the original.")
    memoryBytesAfter: int | None = Field(default=None, description="With the result.")
    costPerMillionTokensBefore: Text | None = Field(default=None, description="Of generated tokens, with the original.")
    costPerMillionTokensAfter: Text | None = Field(default=None, description="With the result.")
    failed: Text | None = Field(default=None, description="Why there are no figures.")
