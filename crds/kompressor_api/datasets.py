"""The data that a job is calibrated with, judged by and compared to: `spec.calibration`, `spec.evaluation`, `spec.drift`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from kompressor_api.fields import UNSTORED, Count, Flag, Model, Number
from kompressor_api.locations import SourceLocation
from kompressor_api.names import Role
from kompressor_api.quantity import parse
from kompressor_api.runtime import Duration, RuntimeSpec, seconds_of

__all__ = [
    "LIMITS",
    "MIN_TOKENS_PER_EXPERT",
    "RUNTIME_METRICS",
    "CalibrationSpec",
    "Dataset",
    "DriftSpec",
    "EvaluationSpec",
    "Gate",
    "Sample",
    "one_gate_a_metric",
]

Amount = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,15})(\.[0-9]{1,6})?([KMGT]i|[kMGT])?$", max_length=32)]
Column = Annotated[str, StringConstraints(min_length=1, max_length=253)]
Percent = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,3})(\.[0-9]{1,6})?%$", max_length=12)]

MAX_SAMPLES = 1_000_000
MAX_SEQUENCE_LENGTH = 1_048_576
MIN_TOKENS_PER_EXPERT = 256
"""Two groups of 128 columns."""


class Dataset(SourceLocation):
    """Text, chats or token ids: one file, or all files of a folder in the order of their names."""

    format: Literal["jsonl", "parquet", "text"] | None = Field(
        default=None,
        description=(
            "jsonl: a JSON object a line; parquet; text: documents with blank lines between them. "
            "Default: by the files' names (.jsonl and .ndjson, .parquet, .txt)."
        ),
    )
    field: Column | None = Field(
        default=None, description="Column that holds plain text. Default: text, where neither messages nor tokens is given."
    )
    messages: Column | None = Field(
        default=None,
        description="Column that holds chats, lists of {role, content}, in place of text; the tokenizer's chat template writes them out.",
    )
    tokens: Column | None = Field(default=None, description="Column that holds lists of token ids, in place of text.")

    @model_validator(mode="after")
    def _one_column(self) -> Dataset:
        given = {name: column for name in ("field", "messages", "tokens") if (column := getattr(self, name)) is not None}
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given; keep the one whose column is to be read")
        if self.format == "text" and given:
            raise ValueError(f"{next(iter(given))} names a column, and plain text has none; leave it out, or correct format")
        return self

    @property
    def column(self) -> str:
        return self.messages or self.tokens or self.field or "text"

    @property
    def kind(self) -> Literal["text", "messages", "tokens"]:
        return "messages" if self.messages else "tokens" if self.tokens else "text"


class Sample(Model):
    """Rows of token ids that are drawn from a dataset."""

    ROLE: ClassVar[Role]
    SECTION: ClassVar[str]
    """Where it stands in the spec."""

    dataset: Dataset = Field(description="Where the data is, and in which column.")
    samples: Count = Field(default=512, ge=1, le=MAX_SAMPLES, description="Rows of token ids to draw from the dataset.")
    sequence_length: Count = Field(
        default=2048, ge=2, le=MAX_SEQUENCE_LENGTH, description="Tokens in a row: longer documents are cut, shorter ones make shorter rows."
    )
    packing: Flag = Field(
        default=False,
        description="Join documents, an end-of-sequence token after each, and cut them into full rows, so that no row is short.",
    )
    seed: Count = Field(default=0, ge=0, le=4_294_967_295, description="Which documents are drawn; the same seed draws the same ones.")


class CalibrationSpec(Sample):
    """The data that passes measure activations with."""

    ROLE = Role.DATA
    SECTION = "calibration"

    min_tokens_per_expert: Count = Field(
        default=MIN_TOKENS_PER_EXPERT,
        ge=0,
        le=2**31 - 1,
        json_schema_extra={UNSTORED: True},
        description=(
            "In a mixture of experts: one that fewer tokens are routed to is measured on all of them; what is computed follows "
            "the true routing. 0: none is."
        ),
    )


LIMITS = {"perplexity": "maxIncrease", "kl": "maxKL", "latency": "maxLatency", "memory": "maxMemory"}
"""The metrics of gates, and the field that holds the limit of each."""
RUNTIME_METRICS = ("latency", "memory")
"""Those that evaluation.runtime measures."""


class Gate(Model):
    """A limit that the result must keep; otherwise the job fails and nothing is published."""

    metric: Literal["perplexity", "kl", "latency", "memory"] = Field(
        description=(
            "perplexity; kl: mean KL divergence of the logits from the original's, nats a token; or what runtime measures: latency of a "
            "request, at the batch size where it is longest, memory of the engine."
        )
    )
    max_increase: Percent | None = Field(
        default=None, description="With perplexity: by how much it may rise over the original model's, such as 3%."
    )
    max_kl: Annotated[Number, Field(gt=0, le=1000, allow_inf_nan=False)] | None = Field(
        default=None, alias="maxKL", description="With kl: the largest mean divergence, such as 0.05."
    )
    max_latency: Duration | None = Field(default=None, description="With latency: such as 800ms or 1.5s.")
    max_memory: Amount | None = Field(default=None, description="With memory: such as 12Gi.")

    @model_validator(mode="after")
    def _the_limit_of_its_metric(self) -> Gate:
        right = LIMITS[self.metric]
        given = (self.max_increase, self.max_kl, self.max_latency, self.max_memory)
        if [name for name, limit in zip(LIMITS.values(), given, strict=True) if limit is not None] != [right]:
            raise ValueError(f"a gate on {self.metric} has {right} and no other limit")
        return self

    @property
    def limit(self) -> float:
        """0.03 for maxIncrease 3%; nats a token for maxKL; seconds; bytes."""
        if self.max_kl is not None:
            return self.max_kl
        if self.max_latency is not None:
            return seconds_of(self.max_latency)
        if self.max_memory is not None:
            return float(parse(self.max_memory))
        assert self.max_increase is not None
        return float(self.max_increase.removesuffix("%")) / 100


def one_gate_a_metric(gates: list[Gate]) -> list[Gate]:
    """Raises ValueError for two of a metric."""
    metrics = [gate.metric for gate in gates]
    if twice := next((metric for metric in metrics if metrics.count(metric) > 1), None):
        raise ValueError(f"a metric has one gate, {twice} has two; keep the stricter one")
    return gates


class EvaluationSpec(Sample):
    """Held-out data that the original and the compressed model are both measured with."""

    ROLE = Role.EVALUATION
    SECTION = "evaluation"

    samples: Count = Field(default=64, ge=1, le=MAX_SAMPLES, description="Rows of token ids to draw from the dataset.")
    gates: Annotated[list[Gate], AfterValidator(one_gate_a_metric)] = Field(
        default_factory=list,
        max_length=4,
        description="Limits that the result must keep, at most one a metric; if one is not kept, the job fails and publishes nothing.",
    )
    runtime: RuntimeSpec | None = Field(
        default=None,
        description=(
            "Serve original and result with an inference engine before publishing: time to first token, tokens a second, memory, cost."
        ),
    )

    @model_validator(mode="after")
    def _measured_by_something(self) -> EvaluationSpec:
        if self.runtime is None and (timed := next((g.metric for g in self.gates if g.metric in RUNTIME_METRICS), None)):
            raise ValueError(f"a gate on {timed} needs evaluation.runtime, which measures it")
        return self


class DriftSpec(Sample):
    """Data as the model will meet it in use; the report says how far activations on it differ from those that calibration saw."""

    ROLE = Role.DRIFT
    SECTION = "drift"

    samples: Count = Field(default=64, ge=1, le=MAX_SAMPLES, description="Rows of token ids to draw from the dataset.")
    threshold: Annotated[Number, Field(ge=0, le=1, allow_inf_nan=False)] = Field(
        default=0.1,
        description=(
            "Distance of a layer's activations from those of calibration, from 0 (the same distribution) to 1 (nothing in common), "
            "above which the result warns of it."
        ),
    )
