"""What comes out of a training: each unit's tensors as they are to be published, an object a unit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from kompressor_worker import kernels
from kompressor_worker.distil.lesson import DONE, History, Lesson, trained_object
from kompressor_worker.distil.loading import Stored, read_units
from kompressor_worker.distil.model import TrainedBlock, TrainedModel
from kompressor_worker.distil.together import Together
from kompressor_worker.errors import BadNumerics, Terminated
from kompressor_worker.layout import LinearLayout, UnitLayout
from kompressor_worker.tensors import DTYPES
from kompressor_worker.unit_kinds import kind_of


@dataclass
class Made:
    """A unit's."""

    tensors: dict[str, Tensor]
    linears: dict[str, dict[str, float]]


def write_trained(lesson: Lesson, model: TrainedModel, together: Together, history: History) -> None:
    """All units, and last that they are all there. Raises BadNumerics: NaN or Inf in a trained weight."""
    others = others_of(lesson) if together.group.leads else {}
    layer = 0
    for number, unit in enumerate(lesson.work.layout.units):
        if lesson.stop.is_set():
            raise Terminated("told to stop; the training is over, and what came of it is being written")
        if unit.dropped:
            continue
        kind = kind_of(unit)
        module: nn.Module = model
        if kind == "block":
            module = model.blocks[layer]
            layer += 1

        def write(number: int = number, unit: UnitLayout = unit, module: nn.Module = module) -> None:
            made = made_of(unit, module, others.get(unit.name))
            lesson.output.write(trained_object(number), save(made.tensors, {"format": "pt", "linears": json.dumps(made.linears)}))

        together.gathered(module, write)
    if together.group.leads:
        lesson.output.write(DONE, json.dumps({"history": history.as_json()}, sort_keys=True, separators=(",", ":")).encode())


def others_of(lesson: Lesson) -> dict[str, Stored]:
    """By unit: what is not trained, and goes as it is."""
    student, limits = lesson.student, lesson.work.limits
    if all(kind_of(unit) != "other" for unit in student.layout.units):
        return {}
    return {found.unit.name: found for found in read_units(student, torch.device("cpu"), limits) if kind_of(found.unit) == "other"}


def made_of(unit: UnitLayout, module: nn.Module, other: Stored | None) -> Made:
    """Of a unit of the result, from whoever holds its weights."""
    if isinstance(module, TrainedBlock):
        masters, fakes = module.tensors, module.fakes
    else:
        assert isinstance(module, TrainedModel)
        masters, fakes = module.outside, module.fakes
    made = Made({}, {})
    for stage in unit.stages:
        linears: Mapping[str, LinearLayout] = {x.weight: x for x in stage.linears}
        for t in () if stage.dropped else stage.tensors:
            linear = linears.get(t.name)
            if t.name not in masters:
                if other is not None:
                    made.tensors[t.name] = other.decoded[t.name]
                continue
            value = masters[t.name].detach()
            if kernels.nonfinite(value):
                raise BadNumerics(f"{t.name}: {kernels.nonfinite(value)} trained values are NaN or Inf; set a smaller learningRate")
            if linear is not None and (fake := fakes.get(linear.name)) is not None:
                encoded = fake.encode(value)
                made.tensors |= encoded.tensors
                made.linears[linear.name] = {
                    "squaredError": encoded.squared_error,
                    "squaredNorm": encoded.squared_norm,
                    "saturated": encoded.saturated,
                }
            else:
                dtype = DTYPES[t.dtype] if value.is_floating_point() else value.dtype
                made.tensors[t.name] = value.to(dtype).cpu().contiguous()
            if linear is not None and linear.pruned is not None:
                made.linears.setdefault(linear.name, {})["zeros"] = int((value == 0).sum())
    if isinstance(module, TrainedBlock):
        made.tensors |= module.kept
    made.tensors = {name: tensor.cpu().contiguous() for name, tensor in made.tensors.items()}
    return made


def read_trained(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A unit's tensors by name, and what there is to say of its linears (`trained_object`)."""
    from safetensors.torch import load

    size = int.from_bytes(data[:8], "little")
    said: dict[str, Any] = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["linears"])
    return load(data), said
