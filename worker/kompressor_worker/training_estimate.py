"""What a training takes, from headers and the size of its data alone: steps, tokens, time, and memory of each process. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kompressor_worker.architectures import text_config
from kompressor_worker.distillation import Distillation
from kompressor_worker.estimate import is_block
from kompressor_worker.layout import DTYPE_BYTES, ModelLayout
from kompressor_worker.passes.distil import DistilParams
from kompressor_worker.sample_warnings import BYTES_PER_TOKEN
from kompressor_worker.structure import operations

MICRO_TOKENS = 4096
"""Of a process at a time, as distil.order has it."""
MOST_HELD_OUT = 8
"""At most one of so many rows is held out of training, too."""
MASTER_BYTES = 16
"""Of a trained parameter: master, gradient, and AdamW's two moments, in fp32."""
IDLE_BYTES = 900 << 20
"""A process with torch and transformers in it."""
TILE_BYTES = 256 << 20
"""Logits of both models, a chunk at a time, and their gradients."""
KEPT = 34
"""Numbers of the hidden size that a block keeps of a token for its backward: an upper bound of what attention and feed-forward take."""
BACKWARD = 2.0
"""Of a forward's products."""


@dataclass(frozen=True)
class TrainingEstimate:
    steps: int
    tokens: int
    """At most: short rows are shorter."""
    seconds: int
    memory: int
    """Bytes of a process at the worst moment, on its device."""
    processes: int
    student: int
    """Parameters."""
    teacher: int
    counted: bool
    """Whether steps follow from the spec alone, not from a guess of how many tokens the files hold."""

    def as_json(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "stepsAreEstimated": not self.counted,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "memoryBytes": self.memory,
            "processes": self.processes,
            "studentParameters": self.student,
            "teacherParameters": self.teacher,
        }

    def status(self) -> dict[str, Any]:
        return {
            "trainingSteps": self.steps,
            "trainingTokens": self.tokens,
            "trainingSeconds": self.seconds,
            "trainingMemoryBytes": self.memory,
        }


def training_estimate(
    found: Distillation, result: ModelLayout, data_bytes: int, processes: int, rate: float, offline_known: bool = False
) -> TrainingEstimate:
    """`result`: the layout of what comes out. `rate`: multiply-adds a second of one process."""
    params, teacher = found.params, found.teacher.layout
    rows, counted = rows_of(params, data_bytes)
    held_out = min(params.validation_rows, rows // MOST_HELD_OUT)
    steps = params.steps or max(1, int((rows - held_out) * params.epochs) // params.batch)
    tokens = steps * params.batch * params.sequence_length
    student, taught = (operations([u for u in layout.units if not u.dropped], text_config(layout.config)) for layout in (result, teacher))
    again = 1.0 if params.activation_checkpointing else 0.0
    products = tokens * (student * (1 + BACKWARD + again) + (0.0 if params.teacher.offline else taught))
    if params.teacher.offline is not None and not offline_known:
        products += min(tokens, rows * params.sequence_length) * taught
    seconds = round(products / (rate * processes))
    return TrainingEstimate(
        steps, tokens, seconds, memory_of(params, result, teacher, processes), processes, parameters(result), parameters(teacher), counted
    )


def rows_of(params: DistilParams, data_bytes: int) -> tuple[int, bool]:
    """Rows to draw, and whether that is what the spec says; else a guess by the size of the files."""
    guess = max(1, data_bytes // (BYTES_PER_TOKEN * params.sequence_length))
    if params.rows is not None:
        return params.rows, True
    return guess, params.steps is not None


def memory_of(params: DistilParams, student: ModelLayout, teacher: ModelLayout, processes: int) -> int:
    """What is shared out, the largest block of each whole, and what a micro batch is on its way."""
    size, text = DTYPE_BYTES[student.dtype], text_config(student.config)
    hidden, layers = int(text["hidden_size"]), sum(is_block(unit) and not unit.dropped for unit in student.units)
    shared = parameters(student) * MASTER_BYTES + (0 if params.teacher.offline else parameters(teacher) * DTYPE_BYTES[teacher.dtype])
    whole = 3 * largest(student) * 4 + (0 if params.teacher.offline else largest(teacher) * 4)
    tokens = max(MICRO_TOKENS if params.micro_batch is None else params.micro_batch * params.sequence_length, params.sequence_length)
    kept = (layers + KEPT if params.activation_checkpointing else layers * KEPT) * tokens * hidden * max(size, 4)
    return IDLE_BYTES + math.ceil(shared / processes) + whole + kept + TILE_BYTES


def parameters(layout: ModelLayout) -> int:
    return sum(math.prod(t.result_shape) for stage in layout.stages() for t in stage.tensors)


def largest(layout: ModelLayout) -> int:
    """Parameters of the largest unit that is whole at a time."""
    return max(sum(math.prod(t.result_shape) for stage in unit.stages if not stage.dropped for t in stage.tensors) for unit in layout.units)
