"""What a training run is given, and what it leaves behind."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from kompressor_worker.checkpoint import read_checkpoint
from kompressor_worker.expand import read_result, source_tensors_of
from kompressor_worker.layout import ModelLayout, StoredTensor
from kompressor_worker.passes.distil import DistilParams
from kompressor_worker.publish import REPORT
from kompressor_worker.reading import arranged, read_layout
from kompressor_worker.storage import WORK, Output, Source

if TYPE_CHECKING:
    from torch import Tensor

    from kompressor_worker.stream import Work

TRAINING = f"{WORK}training/"
"""Prefix of checkpoints of the training."""
TRAINED = f"{WORK}trained/"
"""Prefix of what comes out: the tensors as they are to be published, an object a unit."""
DONE = f"{TRAINED}done.json"
"""Written last."""


def trained_object(unit: int) -> str:
    """safetensors: the tensors of this unit of the result's layout, by their published names, dense. Its metadata has under `linears` a
    JSON object by linear: squaredError, squaredNorm (of the encoding, against the trained weight) and saturated, for those quantised;
    zeros, for those pruned."""
    return f"{TRAINED}{unit:05d}.safetensors"


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint: plain, or one of our results."""

    source: Source
    layout: ModelLayout
    others: Mapping[str, StoredTensor] = field(default_factory=dict)
    """By name, what the layout leaves out: the scales of inputs and of the KV cache of one of our results."""

    @classmethod
    def read(cls, source: Source) -> StoredModel:
        """From headers alone. Raises UserError, CorruptSource, and what storage raises."""
        if REPORT not in source.list():
            return cls(source, read_layout(source))
        checkpoint, result = read_result(source)
        tensors = source_tensors_of(checkpoint, result)
        seen = {stored.name for tensor in tensors.values() for stored in tensor.stored}
        others = {name: tensor for name, tensor in read_checkpoint(source).tensors.items() if name not in seen}
        return cls(source, arranged(checkpoint, tensors), others)


@dataclass(frozen=True)
class Group:
    """Who trains together, as one of them knows it."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class TrainingStep:
    """A step that is done, for progress."""

    step: int
    """From 1."""
    steps: int
    loss: float
    """Mean over the step's tokens, over all processes."""
    divergence: float
    cross_entropy: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    """Trained on so far, in this run and those before it."""
    tokens_per_second: float
    eta_seconds: float
    evaluation: Mapping[str, float] | None = None
    """Behind this step: kl, crossEntropy and agreement on the rows held out; None: there was no evaluation."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> TrainingStep:
        return cls(**found)


@dataclass(frozen=True)
class Lesson:
    """All that training needs to know. Every process of the group has its own, alike but for `group`, `stop` and `tell`."""

    params: DistilParams
    teacher: StoredModel
    student: StoredModel
    """Whose weights are trained from: names as in the result."""
    work: Work
    """Of the result: the units of its layout are what `trained_object` counts, its plan says what they hold."""
    rows: Sequence[Tensor]
    """int64 [length] each, asked for one at a time as they are needed: they may come from storage."""
    evaluation: Sequence[Tensor] | None
    """What evaluations measure on; None: `params.validation_rows` of `rows`, which are then not trained on."""
    output: Output
    """Of the job: working objects below TRAINED are written here."""
    checkpoints: Output
    """Where working objects below TRAINING are: the job's output where this process owns it (one process), else an output of its own, since
    the leader of the group claims it by `replace`."""
    group: Group
    stop: threading.Event
    tell: Callable[[TrainingStep], None] = lambda step: None
    """Called in the leader alone."""
    logits: Callable[[str], Output] | None = None
    """Where the recording of a teacher's logits with this name lies (`params.teacher.offline`); None: below the job's output."""


@dataclass
class History:
    """How it went; all of it outlives a restart."""

    steps: int = 0
    """Done."""
    tokens: int = 0
    """Trained on: positions with a next token."""
    seconds: float = 0.0
    """Of training, those of earlier processes up to their last checkpoint among them."""
    best_step: int = 0
    """Whose weights are the result."""
    stopped: str = ""
    """Why before the last step; empty: it was reached."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """By step: step, loss, divergence, crossEntropy, learningRate, gradientNorm."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """step, kl, crossEntropy, agreement. The first is of step 0, before any training."""
    processes: list[int] = field(default_factory=list)
    """How many trained, from start to start."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> History:
        return cls(**found)


def finished(output: Output) -> History | None:
    """How the training went that has left its result at `output`; None: it is not over."""
    found = output.read(DONE)
    return None if found is None else History.of(json.loads(found[0])["history"])
