"""Distillation from end to end: what is asked for. The training itself is in `kompressor_worker.distil`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from kompressor_api.datasets import MAX_SAMPLES, MAX_SEQUENCE_LENGTH, CalibrationSpec, Dataset, Sample
from kompressor_api.fields import Count, Flag, Model, Number
from kompressor_api.locations import Location, SourceLocation
from kompressor_api.names import Reason, Role
from kompressor_worker.architectures import FAMILIES, text_config
from kompressor_worker.errors import UserError
from kompressor_worker.layout import ModelLayout
from kompressor_worker.passes import Pass

Share = Annotated[Number, Field(ge=0, le=1, allow_inf_nan=False)]
Size = Annotated[Count, Field(ge=1, le=1_048_576)]


class DivergenceParams(Model):
    """How far the student's next-token distribution is from the teacher's."""

    kind: Literal["forward", "reverse", "jensenShannon"] = Field(
        default="forward", description="forward: KL(teacher || student). reverse: KL(student || teacher). jensenShannon: both."
    )
    temperature: Annotated[Number, Field(gt=0, le=100, allow_inf_nan=False)] = Field(
        default=1.0, description="Logits of both are divided by it, the loss multiplied by its square."
    )
    labels: Share = Field(default=0.0, description="Share of the data's own next tokens (cross-entropy) in the loss; 1: nothing else.")


class LayerPairs(Model):
    """States of student's and teacher's layers that are to be alike: mean squared error over the teacher's mean square."""

    layers: Size | None = Field(default=None, description="Pairs, evenly over the depth up to the last. Default: all.")
    pairs: list[Annotated[list[Annotated[Count, Field(ge=0, le=100_000)]], Field(min_length=2, max_length=2)]] | None = Field(
        default=None, min_length=1, max_length=512, description="[student's layer, teacher's layer], counted from 0, instead of layers."
    )
    weight: Annotated[Number, Field(gt=0, le=1000, allow_inf_nan=False)] = Field(default=1.0, description="Factor in the loss.")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.layers is not None and self.pairs is not None:
            raise ValueError("give either layers or pairs")
        return self


class OfflineParams(Model):
    """The teacher's largest logits, written once and read by any number of students."""

    top_k: Annotated[Count, Field(ge=1, le=4096)] = Field(default=64, description="Logits kept of each position.")
    location: Location | None = Field(default=None, description="Where they are kept, by digest. Default: below the job's own output.")


class TeacherParams(Model):
    """Who is learned from."""

    source: SourceLocation | None = Field(default=None, description="A checkpoint with the same tokenizer. Default: model.source.")
    offline: OfflineParams | None = Field(default=None, description="Its logits are written once, instead of run at every step.")


class StudentParams(Model):
    """Who learns: what the passes before have made, unless said otherwise."""

    source: SourceLocation | None = Field(default=None, description="A checkpoint with the same tokenizer, instead of any passes.")
    layers: Size | None = Field(default=None, description="Blocks of the student, as by pruneLayers.")
    intermediate_size: Size | None = Field(default=None, description="Neurons of its feed-forwards, as by pruneWidth.")
    hidden_size: Size | None = Field(default=None, description="Channels of its hidden state, as by pruneHidden.")
    key_value_heads: Size | None = Field(default=None, description="Its KV heads, as by pruneHeads.")

    @model_validator(mode="after")
    def _a_checkpoint_or_a_shape(self) -> Self:
        shape = [name for name in ("layers", "intermediate_size", "hidden_size", "key_value_heads") if getattr(self, name) is not None]
        if self.source is not None and shape:
            raise ValueError("student.source has a shape of its own; give either source or sizes")
        return self


class DistilParams(Model):
    """Trains the student from end to end to say what the teacher says; the last pass of all but kvCache."""

    dataset: Dataset | None = Field(default=None, description="What to train on. Default: calibration.dataset.")
    rows: Annotated[Count, Field(ge=1, le=MAX_SAMPLES * 1000)] | None = Field(default=None, description="Rows to draw. Default: all.")
    sequence_length: Annotated[Count, Field(ge=2, le=MAX_SEQUENCE_LENGTH)] = Field(default=2048, description="Tokens in a row.")
    packing: Flag = Field(default=True, description="As in calibration.")
    validation_rows: Annotated[Count, Field(ge=0, le=65_536)] = Field(
        default=64, description="Rows held out, to evaluate on; an eighth of all at most."
    )
    steps: Annotated[Count, Field(ge=1, le=100_000_000)] | None = Field(default=None, description="Optimizer steps. Default: by epochs.")
    epochs: Annotated[Number, Field(gt=0, le=10_000, allow_inf_nan=False)] = Field(
        default=1.0, description="Uses of each row, where steps is not given."
    )
    batch: Annotated[Count, Field(ge=1, le=1_048_576)] = Field(default=32, description="Rows of a step, over all processes.")
    micro_batch: Annotated[Count, Field(ge=1, le=65_536)] | None = Field(
        default=None, description="Rows of a process at a time. Default: about 4096 tokens."
    )
    learning_rate: Annotated[Number, Field(gt=0, le=1, allow_inf_nan=False)] = Field(default=1e-4, description="AdamW's, after warm-up.")
    schedule: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="How the learning rate falls.")
    warmup: Share = Field(default=0.03, description="Share of steps in which it rises.")
    floor: Share = Field(default=0.1, description="Share of it that is left at the end.")
    weight_decay: Share = Field(default=0.0, description="AdamW's, on matrices.")
    betas: Annotated[list[Annotated[Number, Field(ge=0, lt=1, allow_inf_nan=False)]], Field(min_length=2, max_length=2)] = Field(
        default=[0.9, 0.95], description="AdamW's."
    )
    gradient_clip: Annotated[Number, Field(ge=0, le=1_000_000, allow_inf_nan=False)] = Field(
        default=1.0, description="Largest norm of a gradient; 0: any."
    )
    divergence: DivergenceParams = Field(default_factory=DivergenceParams, description="The loss on logits.")
    hidden_states: LayerPairs | None = Field(default=None, description="A loss on what blocks put out, too.")
    attention_outputs: LayerPairs | None = Field(default=None, description="A loss on what attentions put out, too.")
    evaluate_every: Annotated[Count, Field(ge=1, le=100_000_000)] | None = Field(
        default=None, description="Steps between evaluations; the best student is kept. Default: a tenth."
    )
    patience: Annotated[Count, Field(ge=1, le=10_000)] | None = Field(
        default=None, description="Evaluations without a better one before it stops. Default: never."
    )
    checkpoint_every: Annotated[Count, Field(ge=0, le=86_400)] = Field(
        default=300, description="Seconds between checkpoints; 0: after every step."
    )
    activation_checkpointing: Flag | None = Field(
        default=None, description="Compute blocks' forwards again in the backward. Default: where activations would take much memory."
    )
    teacher: TeacherParams = Field(default_factory=TeacherParams, description="Who is learned from. Default: model.source.")
    student: StudentParams = Field(default_factory=StudentParams, description="Who learns. Default: what the passes before have made.")
    seed: Annotated[Count, Field(ge=0, le=4_294_967_295)] = Field(default=0, description="Of the order of rows.")

    @field_validator("betas")
    @classmethod
    def _two(cls, betas: list[float]) -> list[float]:
        return [float(beta) for beta in betas]

    @model_validator(mode="after")
    def _offline_logits_alone(self) -> Self:
        if self.teacher.offline is not None and (self.hidden_states is not None or self.attention_outputs is not None):
            raise ValueError(
                "teacher.offline keeps logits alone; hiddenStates and attentionOutputs need the teacher itself, so leave one out"
            )
        return self


MOST_ROWS = MAX_SAMPLES * 1000


class TrainingData(Sample):
    """Rows that a student is trained on."""

    ROLE = Role.TRAINING
    SECTION = "training"

    samples: Annotated[Count, Field(ge=1, le=MOST_ROWS)] = Field(default=MOST_ROWS, description="Rows at most.")


class CalibrationData(TrainingData):
    """The same out of the calibration's dataset."""

    ROLE = Role.DATA


class Distil(Pass):
    """The pass `distil`: in the stream it does nothing, what it asks for comes behind it (`distillation`, `distilling`)."""

    Params: ClassVar[type[Model]] = DistilParams
    trains = True
    once = True

    def __init__(self, params: DistilParams) -> None:
        self.params = params

    @property
    def reads_calibration(self) -> bool:
        return self.params.dataset is None

    def trained_on(self, calibration: CalibrationSpec | None) -> TrainingData:
        params = self.params
        asked: dict[str, Any] = {name: getattr(params, name) for name in ("sequence_length", "packing", "seed")}
        asked["samples"] = params.rows or MOST_ROWS
        if params.dataset is not None:
            return TrainingData(dataset=params.dataset, **asked)
        if calibration is None:
            raise UserError("distil: nothing to train on; give distil.dataset, or spec.calibration.dataset, which it reads too")
        return CalibrationData(dataset=calibration.dataset, **asked)

    def prepare(self, layout: ModelLayout) -> ModelLayout:
        """Nothing changes. Raises UserError: a model that cannot be run, layers that it has not."""
        if FAMILIES.get(layout.family or "") is None or not FAMILIES[layout.family or ""].forward:
            known = ", ".join(name for name, family in FAMILIES.items() if family.forward)
            model_type = text_config(layout.config).get("model_type")
            raise UserError(
                f"distil: model_type {model_type!r} is not one whose function is known (known: {known}), so it cannot be trained; leave "
                "distil out",
                Reason.UNSUPPORTED_MODEL,
            )
        self.refuse_layers("student", 0, layout.config)
        if self.params.teacher.source is None:
            self.refuse_layers("teacher", 1, layout.source_config)
        return layout

    def refuse_layers(self, who: str, side: int, config: Mapping[str, Any]) -> None:
        """Raises UserError where a pair of layers names one that `who` (the pairs' `side`) has not."""
        layers = int(text_config(config).get("num_hidden_layers") or 0)
        for name, asked in (("hiddenStates", self.params.hidden_states), ("attentionOutputs", self.params.attention_outputs)):
            if asked is None:
                continue
            if asked.layers is not None and asked.layers > layers:
                raise UserError(f"distil: {name}.layers {asked.layers}, and the {who} has {layers}; ask for {layers} at most")
            for pair in asked.pairs or ():
                if pair[side] >= layers:
                    raise UserError(f"distil: {name}.pairs {pair}: the {who} has no layer {pair[side]}: they go up to {layers - 1}")


def in_place_of_sizes(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The passes of a spec, with those that make a student of the sizes that distil asks for in front. Raises UserError for sizes of
    another kind, as `DistilParams` does."""
    asked = next((entry["distil"] for entry in entries if "distil" in entry), None)
    student = (asked or {}).get("student") or {}
    front = [{name: {size: student[key]}} for key, (name, size) in SIZES.items() if student.get(key) is not None]
    if not front:
        return [dict(entry) for entry in entries]
    if there := next((name for entry in entries for name in entry if any(name in pruning for pruning in front)), None):
        raise UserError(f"distil: student asks for a size that the pass {there} gives already; say it once")
    rest = {key: value for key, value in student.items() if key not in SIZES}
    left = {key: value for key, value in (asked or {}).items() if key != "student"}
    told = {"distil": {**left, **({"student": rest} if rest else {})}}
    return [*front, *(told if "distil" in entry else dict(entry) for entry in entries)]


SIZES = {
    "layers": ("pruneLayers", "layers"),
    "hiddenSize": ("pruneHidden", "hiddenSize"),
    "keyValueHeads": ("pruneHeads", "kvHeads"),
    "intermediateSize": ("pruneWidth", "intermediateSize"),
}
"""Of `student`: the pass that leaves it, and what that calls it; in the order in which they come."""
