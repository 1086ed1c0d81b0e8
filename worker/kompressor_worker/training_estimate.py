"""What a training takes, from headers and the size of its data alone: steps, tokens, time, memory of each process, and room beside the
result. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kompressor_worker.architectures import text_config
from kompressor_worker.assignment import Assignment
from kompressor_worker.distillation import Distillation
from kompressor_worker.estimate import is_block
from kompressor_worker.formats.bitmask import saved_bytes
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
KEPT_BYTES = 12
"""The same in a checkpoint: master and moments."""
CHECKPOINTS = 3
"""At a time: the last one, the one of the best student, and one that is being written."""
IDLE_BYTES = 900 << 20
"""A process with torch and transformers in it."""
TILE_BYTES = 256 << 20
"""Logits of both models, a chunk at a time, and their gradients."""
CHECKPOINTING_BYTES = 1 << 30
"""Of what blocks keep of a micro batch for their backward: beyond it a CPU computes them again, unless it is told otherwise."""
KEPT = 34
"""Numbers of the hidden size that a block keeps of a token for its backward: an upper bound of what attention and feed-forward take."""
BLOCK_SECONDS = 0.06
"""What a block takes of a step on a CPU beside its products: all of the time that a model of a few megabytes takes."""
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
    found: Distillation, result: ModelLayout, data_bytes: int, processes: int, rate: float, gpu: bool, offline_known: bool = False
) -> TrainingEstimate:
    """`result`: the layout of what comes out. `rate`: multiply-adds a second of one process, on a `gpu` or not."""
    params, teacher = found.params, found.teacher.layout
    rows, counted = rows_of(params, data_bytes)
    held_out = min(params.validation_rows, rows // MOST_HELD_OUT)
    steps = params.steps or max(1, int((rows - held_out) * params.epochs) // params.batch)
    tokens = steps * params.batch * params.sequence_length
    student, taught = (operations([u for u in layout.units if not u.dropped], text_config(layout.config)) for layout in (result, teacher))
    again = 1.0 if recomputes(params, result, gpu) else 0.0
    products = tokens * (student * (1 + BACKWARD + again) + (0.0 if params.teacher.offline else taught))
    if params.teacher.offline is not None and not offline_known:
        products += min(tokens, rows * params.sequence_length) * taught
    beside = 0.0 if gpu else steps * sum(is_block(unit) and not unit.dropped for unit in result.units) * BLOCK_SECONDS
    seconds = round(products / (rate * processes) + beside)
    memory = memory_of(params, result, teacher, processes, gpu)
    return TrainingEstimate(steps, tokens, seconds, memory, processes, parameters(result), parameters(teacher), counted)


def room_beside(found: Distillation | None, assigned: Assignment) -> int:
    """Bytes that the working objects of a training take at the job's output beside the result, at the worst moment: the student that its
    passes make, checkpoints, and what comes out of it, before that is published. A recording of the teacher's logits is not counted: how
    long it is only its data says."""
    if found is None:
        return 0
    result = sum(shard.size for shard in assigned.plan.shards)
    before = assigned.before_training()
    student = sum(shard.size for shard in before.plan.shards) if before.passes else 0
    checkpoint = parameters(assigned.layout) * KEPT_BYTES
    trained = result + saved_bytes([x for x in assigned.layout.linears() if x.bitmask is not None])  # dense
    return student + max(CHECKPOINTS * checkpoint - result, (CHECKPOINTS - 1) * checkpoint + trained)


def rows_of(params: DistilParams, data_bytes: int) -> tuple[int, bool]:
    """Rows to draw, and whether that is what the spec says; else a guess by the size of the files."""
    guess = max(1, data_bytes // (BYTES_PER_TOKEN * params.sequence_length))
    if params.rows is not None:
        return params.rows, True
    return guess, params.steps is not None


def recomputes(params: DistilParams, student: ModelLayout, gpu: bool) -> bool:
    """Whether blocks' forwards are computed again in the backward. Of a GPU whose memory is not known: not unless it is asked for."""
    if params.activation_checkpointing is not None:
        return params.activation_checkpointing
    return not gpu and kept_numbers(student) * micro_tokens(params) * DTYPE_BYTES[student.dtype] > CHECKPOINTING_BYTES


def micro_tokens(params: DistilParams) -> int:
    """At a time in a process, as distil.order has it."""
    return max(MICRO_TOKENS if params.micro_batch is None else params.micro_batch * params.sequence_length, params.sequence_length)


def kept_numbers(student: ModelLayout) -> float:
    """Of a token: what goes into its linears and comes out of them, which is about what blocks keep for their backward."""
    chosen = int(text_config(student.config).get("num_experts_per_tok") or 1)
    experts = max(sum(1 for stage in unit.stages if stage.expert is not None) for unit in student.units)
    numbers = 0.0
    for stage in student.stages():
        share = min(1.0, chosen / experts) if stage.expert is not None else 1.0
        numbers += share * sum(sum(x.shape) for x in stage.linears if x.kind == "linear")
    return numbers


def memory_of(params: DistilParams, student: ModelLayout, teacher: ModelLayout, processes: int, gpu: bool) -> int:
    """What is shared out, the largest block of each whole, and what a micro batch is on its way."""
    size, text = DTYPE_BYTES[student.dtype], text_config(student.config)
    hidden, layers = int(text["hidden_size"]), sum(is_block(unit) and not unit.dropped for unit in student.units)
    shared = parameters(student) * MASTER_BYTES + (0 if params.teacher.offline else parameters(teacher) * DTYPE_BYTES[teacher.dtype])
    whole = 3 * largest(student) * 4 + (0 if params.teacher.offline else largest(teacher) * 4)
    tokens = min(micro_tokens(params), math.ceil(params.batch / processes) * params.sequence_length)
    kept = (layers + KEPT if recomputes(params, student, gpu) else layers * KEPT) * tokens * hidden * max(size, 4)
    return IDLE_BYTES + math.ceil(shared / processes) + whole + kept + TILE_BYTES


def parameters(layout: ModelLayout) -> int:
    return sum(math.prod(t.result_shape) for stage in layout.stages() for t in stage.tensors)


def largest(layout: ModelLayout) -> int:
    """Parameters of the largest unit that is whole at a time."""
    return max(sum(math.prod(t.result_shape) for stage in unit.stages if not stage.dropped for t in stage.tensors) for unit in layout.units)
