"""A training that leaves the student as it is: for what is around a training. It does nothing but read, write and say how far it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from types import ModuleType

import pytest
import safetensors.torch
from torch import Tensor

from kompressor_worker.distil.lesson import DONE, History, Lesson, TrainingStep, trained_object
from kompressor_worker.formats import bitmask
from kompressor_worker.unit_kinds import kind_of

STEPS = 4


def untrain(patch: pytest.MonkeyPatch) -> None:
    """From here on nothing is trained."""
    module = ModuleType("kompressor_worker.distil.train")
    module.train = leave_as_it_is  # type: ignore[attr-defined]
    patch.setitem(sys.modules, module.__name__, module)


def leave_as_it_is(lesson: Lesson) -> History:
    """In place of `distil.training.train`."""
    files = [name for name in lesson.student.source.list() if name.endswith(".safetensors")]
    stored: dict[str, Tensor] = {}
    for name in files:
        stored |= safetensors.torch.load(lesson.student.source.read(name))
    for step in range(1, STEPS + 1):
        lesson.tell(told(step))
    for number, (unit, placed) in enumerate(zip(lesson.work.layout.units, lesson.work.plan.stages, strict=True)):
        if unit.dropped or kind_of(unit) == "other":
            continue
        tensors = {t.name: stored[t.name] for stage in placed for t in stage}
        linears = [x for stage in unit.stages if not stage.dropped for x in stage.linears]
        bitmask.unpack_linears(linears, tensors)
        said: dict[str, Mapping[str, float]] = {}
        for x in linears:
            if x.name in lesson.work.schemes:
                said[x.name] = {"squaredError": 1.0, "squaredNorm": 100.0, "saturated": 0}
            if x.pruned is not None:
                said[x.name] = {**said.get(x.name, {}), "zeros": zeros(tensors, x.name)}
        lesson.output.write(trained_object(number), safetensors.torch.save(tensors, {"linears": json.dumps(said)}))
    curve = [{"step": step, "loss": told(step).loss} for step in range(1, STEPS + 1)]
    history = History(STEPS, 4096, 1.5, STEPS, "", curve, [{"step": 0, "kl": 0.5, "crossEntropy": 2.0, "agreement": 0.8}], [1])
    lesson.output.write(DONE, json.dumps({"history": history.as_json()}).encode())
    return history


def zeros(tensors: Mapping[str, Tensor], linear: str) -> int:
    weight = tensors.get(f"{linear}.weight")
    return 0 if weight is None else int((weight == 0).sum())


def told(step: int) -> TrainingStep:
    return TrainingStep(step, STEPS, 2.0 / step, 1.0 / step, 2.0, 1e-4, 0.5, 1024 * step, 1000.0, 4.0 - step)
