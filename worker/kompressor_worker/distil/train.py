"""A student trained from end to end: reads like a table of contents.

A step is a function of the weights, the optimizer's moments and the step's number: rows follow from that (order.py), nothing else is drawn
at random. Losses are sums over tokens, divided by the number of all tokens of the step, in whatever process and micro batch they were. So
one process and many, undisturbed or started anew behind a checkpoint, go the same way but for the order of sums.
"""

from __future__ import annotations

import logging
import math
import time
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kompressor_worker.architectures import text_config
from kompressor_worker.digests import digest
from kompressor_worker.distil.alike import Alike, Projections
from kompressor_worker.distil.checkpoints import Checkpoints
from kompressor_worker.distil.lesson import History, Lesson, StoredModel, TrainingStep, finished
from kompressor_worker.distil.loading import build
from kompressor_worker.distil.losses import Losses, Measured
from kompressor_worker.distil.model import TrainedBlock, TrainedModel, computing_dtype
from kompressor_worker.distil.optimizer import Optimizer, learning_rate, local
from kompressor_worker.distil.order import Order, micro_rows, micros
from kompressor_worker.distil.teaching import teacher_of, written
from kompressor_worker.distil.together import Together, refuse_parallelism
from kompressor_worker.distil.trained import write_trained
from kompressor_worker.errors import LossNotFinite, Terminated
from kompressor_worker.tensors import DTYPES
from kompressor_worker.training_estimate import CHECKPOINTING_BYTES, kept_numbers
from kompressor_worker.unit_kinds import kind_of

log = logging.getLogger(__name__)

EVALUATIONS = 10
"""Over a training, where nothing else is asked for."""
CURVE = 20_000
"""Steps that are kept of the loss curve; beyond them every other one goes."""


def train(lesson: Lesson) -> History:
    """Trains, or goes on, and writes what came out. In every process of the group alike. Raises UserError (too little data, more processes
    than the model can be shared out to), LossNotFinite, Terminated, and what storage raises."""
    if (done := finished(lesson.output)) is not None:
        return done
    refuse_parallelism(lesson.student, lesson.params.batch, lesson.group.size)
    order = Order.of(lesson.params, len(lesson.rows), lesson.evaluation is not None)
    together = Together.of(lesson.group, device_of(lesson))
    training = Training.begun(lesson, order, together)
    training.run()
    write_trained(lesson, training.best(), together, training.history)
    return training.history


def device_of(lesson: Lesson) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", lesson.group.rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@dataclass(frozen=True)
class Made:
    """A step."""

    loss: float
    """Of a token."""
    total: Measured
    rate: float
    norm: float


@dataclass
class Training:
    """One on its way."""

    lesson: Lesson
    order: Order
    together: Together
    student: TrainedModel
    losses: Losses
    optimizer: Optimizer
    checkpoints: Checkpoints
    history: History

    @classmethod
    def begun(cls, lesson: Lesson, order: Order, together: Together) -> Training:
        """At its last checkpoint, if there is one."""
        params = lesson.params
        checkpoints = Checkpoints(lesson.checkpoints, together, fingerprint(lesson, order))
        alike = Alike.of(params, layers_of(lesson.student), layers_of(lesson.teacher))
        offline = params.teacher.offline is not None
        teacher = written(lesson, together) if offline else teacher_of(lesson, together)
        student = built(lesson, together, alike)
        losses = Losses.of(lesson, student, teacher, alike)
        parameters = dict(student.named_parameters())
        optimizer = Optimizer(params, parameters, masks_of(lesson, student))
        made = cls(lesson, order, together, student, losses, optimizer, checkpoints, deepcopy(checkpoints.manifest.history))
        if (last := checkpoints.manifest.last) is not None:
            checkpoints.load(made.state(), last)
            log.info("training goes on behind step %d of %d", made.history.steps, order.steps)
        made.history.processes.append(lesson.group.size)
        return made

    def weights(self) -> dict[str, Tensor]:
        return {f"weight/{name}": x.detach() for name, x in self.student.named_parameters()}

    def state(self) -> dict[str, Tensor]:
        parameters = self.optimizer.parameters
        moments = self.optimizer.state()
        return self.weights() | {key: self.together.like(x, parameters[key.partition("/")[2]]) for key, x in moments.items()}

    # ---- the loop

    def run(self) -> None:
        steps, every = self.order.steps, self.lesson.params.evaluate_every or max(1, self.order.steps // EVALUATIONS)
        began, saved = time.monotonic(), time.monotonic()
        before, tokens_before = self.history.seconds, self.history.tokens
        if self.checkpoints.manifest.last is None:
            self.evaluate(0)
            self.checkpoints.save(self.state(), self.history, best=True)
        while self.history.steps < steps and not self.history.stopped:
            step = self.history.steps
            made = self.step(step)
            self.history.steps, self.history.seconds = step + 1, before + time.monotonic() - began
            self.note(made, step)
            found = self.evaluate(step + 1) if (step + 1) % every == 0 or step + 1 == steps else None
            self.tell(made, found, time.monotonic() - began, self.history.tokens - tokens_before)
            due = time.monotonic() - saved >= self.lesson.params.checkpoint_every
            stop, save = self.together.sums([self.lesson.stop.is_set(), due and self.together.group.leads])
            better = self.history.best_step == self.history.steps
            if stop or save or better or self.history.steps == steps or self.history.stopped:
                self.checkpoints.save(self.state(), self.history, better)
                saved = time.monotonic()
            if stop:
                raise Terminated(f"told to stop; the training is committed behind step {self.history.steps} of {steps}")

    def step(self, step: int) -> Made:
        """Raises LossNotFinite; then nothing has changed."""
        params, rows = self.lesson.params, self.lesson.rows
        measured = Measured()
        group = self.together.group
        for micro in micros(self.order.rows(step), rows, micro_rows(params), group.rank, group.size, self.together.device):
            loss, found = self.losses(micro)
            loss.backward()  # type: ignore[no-untyped-call]
            measured += found
        total = Measured(*self.together.sums(measured.values()))
        loss_of_token = total.loss / max(1.0, total.tokens)
        if not math.isfinite(loss_of_token):
            raise LossNotFinite(self.not_finite(step, "the loss"))
        rate = learning_rate(params, step, self.order.steps)
        scale = group.size / max(1.0, total.tokens)  # sharded gradients are means over processes
        norm = self.optimizer.norm(scale, self.together.sums)
        if not math.isfinite(norm):
            raise LossNotFinite(self.not_finite(step, "a gradient"))
        self.optimizer.step(rate, scale, norm)
        return Made(loss_of_token, total, rate, norm)

    def not_finite(self, step: int, what: str) -> str:
        last = self.checkpoints.manifest.last
        kept = f"its last good checkpoint, behind step {last.step}, is kept" if last is not None else "there was no checkpoint yet"
        return f"distil: {what} is NaN or Inf at step {step + 1} of {self.order.steps}; {kept}. Set a smaller learningRate or gradientClip"

    def note(self, made: Made, step: int) -> None:
        self.history.tokens += int(made.total.tokens)
        self.history.curve.append(
            {
                "step": step + 1,
                "loss": made.loss,
                "divergence": made.total.divergence / max(1.0, made.total.tokens),
                "crossEntropy": made.total.cross_entropy / max(1.0, made.total.tokens),
                "learningRate": made.rate,
                "gradientNorm": made.norm,
            }
        )
        if len(self.history.curve) > CURVE:
            self.history.curve = self.history.curve[1::2]

    def tell(self, made: Made, found: dict[str, float] | None, seconds: float, tokens: int) -> None:
        if not self.together.group.leads:
            return
        done, steps, count = self.history.steps, self.order.steps, max(1.0, made.total.tokens)
        rate = tokens / max(1e-9, seconds)
        left = (steps - done) * self.history.tokens / max(1, done) / max(1e-9, rate)
        figures = made.loss, made.total.divergence / count, made.total.cross_entropy / count, made.rate, made.norm
        self.lesson.tell(TrainingStep(done, steps, *figures, self.history.tokens, rate, left, found or None))

    # ---- evaluations

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """On the rows held out, behind so many steps; the best student so far is kept."""
        group, size = self.together.group, micro_rows(self.lesson.params)
        apart = self.lesson.evaluation
        rows, numbers = (self.lesson.rows, self.order.held_out()) if apart is None else (apart, list(range(len(apart))))
        offset = len(self.lesson.rows) if self.lesson.evaluation is not None else 0
        if not numbers:
            self.history.evaluations.append({"step": step})
            self.history.best_step = step
            return {}
        measured = Measured()
        for micro in micros(numbers, rows, size, group.rank, group.size, self.together.device):
            measured += self.losses.compare(micro, offset)
        total = Measured(*self.together.sums(measured.values()))
        tokens = max(1.0, total.tokens)
        found = {
            "kl": total.divergence / tokens,
            "crossEntropy": total.cross_entropy / tokens,
            "agreement": total.agreement / tokens,
        }
        self.judge(step, found)
        return found

    def judge(self, step: int, found: dict[str, float]) -> None:
        metric = "kl" if self.lesson.params.divergence.labels < 1 else "crossEntropy"
        so_far = [each[metric] for each in self.history.evaluations]
        self.history.evaluations.append({"step": step, **found})
        if not so_far or found[metric] < min(so_far):
            self.history.best_step = step
            return
        behind = sum(1 for each in self.history.evaluations if each["step"] > self.history.best_step)
        if (patience := self.lesson.params.patience) is not None and behind >= patience and step < self.order.steps:
            self.history.stopped = f"{behind} evaluations without a better one than behind step {self.history.best_step}"

    def best(self) -> TrainedModel:
        """The student of the best evaluation; the last one where there were none."""
        if self.history.best_step != self.history.steps:
            saved = self.checkpoints.manifest.best
            assert saved is not None and saved.step == self.history.best_step, (saved, self.history.best_step)
            self.checkpoints.load(self.weights(), saved)
        return self.student


def built(lesson: Lesson, together: Together, alike: Alike) -> TrainedModel:
    """The student as it is stored, shared out."""
    layout, params = lesson.student.layout, lesson.params
    shard = together.shard(computing_dtype(DTYPES[layout.dtype], together.device), trained=True)
    student = build(lesson.student, together, True, lesson.work.limits, shard, lesson.work.schemes)
    if alike:
        mine, theirs = (int(text_config(each.layout.config)["hidden_size"]) for each in (lesson.student, lesson.teacher))
        student.alike = Projections(alike, mine, theirs, params.seed, together.device)
    shard(student)
    again = params.activation_checkpointing
    for block in student.blocks:
        assert isinstance(block, TrainedBlock)
        block.checkpointing = much_memory(lesson, together.device) if again is None else again
    return student


def layers_of(model: StoredModel) -> int:
    return sum(1 for unit in model.layout.units if kind_of(unit) == "block")


def much_memory(lesson: Lesson, device: torch.device) -> bool:
    """Whether what blocks keep for the backward of a micro batch is much: on a GPU a quarter of its memory."""
    layout = lesson.student.layout
    tokens = micro_rows(lesson.params) * lesson.params.sequence_length
    limit = torch.cuda.get_device_properties(device).total_memory // 4 if device.type == "cuda" else CHECKPOINTING_BYTES
    return kept_numbers(layout) * tokens * computing_dtype(DTYPES[layout.dtype], device).itemsize > limit


def masks_of(lesson: Lesson, student: TrainedModel) -> dict[str, Tensor]:
    """By parameter: which weights of a pruned linear are not zero. Those that are stay so."""
    pruned = {x.weight for x in lesson.work.layout.linears() if x.pruned is not None}
    parameters = ((name, x) for name, x in student.named_parameters() if full_name(name) in pruned)
    return {name: local(x.detach()) != 0 for name, x in parameters}


def full_name(parameter: str) -> str:
    """Of the tensor that a parameter of the student is."""
    return parameter.rpartition(".")[2].replace("/", ".")


def fingerprint(lesson: Lesson, order: Order) -> dict[str, Any]:
    """What a training must have in common with the one whose checkpoint it goes on from; not how it is shared out."""
    how = {"micro_batch", "activation_checkpointing", "checkpoint_every"}
    return {
        "parameters": digest(lesson.params.model_dump(mode="json", by_alias=True, exclude=how)),
        "student": lesson.student.layout.source_digest,
        "teacher": lesson.teacher.layout.source_digest,
        "rows": [order.apart, order.count],
    }
