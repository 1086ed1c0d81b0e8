"""Trainings on small models, without a job around them: students by cutting a trained model down, and lessons over folders."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from independent import tensors_of
from kompressor_api.v1alpha1 import OutputSpec, SourceLocation
from kompressor_worker.distil.lesson import Group, Lesson, StoredModel, TrainingStep, trained_object
from kompressor_worker.distil.trained import read_trained
from kompressor_worker.layout import ModelLayout
from kompressor_worker.passes.distil import DistilParams
from kompressor_worker.shards import plan_output
from kompressor_worker.sparsity import Sparsity
from kompressor_worker.storage.locations import open_output, open_source
from kompressor_worker.stream import Work
from models import RECIPES, token_rows, trained_model

__all__ = ["lesson", "narrower", "noisy", "published", "rows_of", "stored"]


def rows_of(kind: str, rows: int, length: int, seed: int = 77) -> list[torch.Tensor]:
    """Of the language of a trained model; "random": of ids below 128."""
    if kind == "random":
        return list(torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed)))
    return list(token_rows(trained_model(kind), RECIPES[kind].language, seed, rows, length))


def stored(folder: Path) -> StoredModel:
    return StoredModel.read(open_source(SourceLocation(uri=f"file://{folder}"), {}, threading.Event()))


def narrower(kind: str, folder: Path, share: float) -> Path:
    """The trained model without this share of each feed-forward's neurons, those of the smallest weights."""
    source = trained_model(kind)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    state, config = tensors_of(source), json.loads((source / "config.json").read_text())
    keep = round(config["intermediate_size"] * (1 - share))
    for layer in range(config["num_hidden_layers"]):
        gate, up, down = (f"model.layers.{layer}.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
        loudness = state[up].float().norm(dim=1) * state[down].float().norm(dim=0)
        kept = loudness.topk(keep).indices.sort().values
        state |= {gate: state[gate][kept], up: state[up][kept], down: state[down][:, kept]}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": keep}))
    return folder


def noisy(source: Path, folder: Path, share: float = 0.3) -> Path:
    """A checkpoint with matrices that are off by so much."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    drawn = torch.Generator().manual_seed(0)
    state = tensors_of(source)
    for name, tensor in state.items():
        if tensor.dim() > 1:
            state[name] = (tensor.float() * (1 + share * torch.randn(tensor.shape, generator=drawn))).to(tensor.dtype)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def lesson(
    teacher: Path,
    student: Path,
    output: Path,
    rows: Sequence[torch.Tensor],
    params: dict[str, Any],
    *,
    pruned: Sparsity | None = None,
    group: Group | None = None,
    stop: threading.Event | None = None,
    tell: Callable[[TrainingStep], None] = lambda step: None,
) -> Lesson:
    """Of a student whose shape is the result's, in a folder; `pruned`: what has been set to zero in all its linears."""
    learner = stored(student)
    schemes = {t.name.removesuffix(".weight"): t.scheme for s in learner.layout.stages() for t in s.tensors if t.scheme is not None}
    layout = marked(learner.layout, pruned) if pruned is not None else learner.layout
    place = open_output(OutputSpec(uri=f"file://{output}"), {}, threading.Event())
    work = Work(layout, [], schemes, plan_output(layout, schemes))
    asked = DistilParams.model_validate({"sequenceLength": len(rows[0]), **params})
    inner = place.inner("training")
    return Lesson(asked, stored(teacher), learner, work, rows, None, place, inner, group or Group(), stop or threading.Event(), tell)


def marked(layout: ModelLayout, pruned: Sparsity) -> ModelLayout:
    """With all linears of blocks pruned."""
    units = [
        replace(
            unit,
            stages=tuple(
                replace(s, linears=tuple(replace(x, pruned=pruned) if x.kind == "linear" else x for x in s.linears)) for s in unit.stages
            ),
        )
        for unit in layout.units
    ]
    return replace(layout, units=tuple(units))


def published(given: Lesson) -> dict[str, torch.Tensor]:
    """What came out, by name."""
    found: dict[str, torch.Tensor] = {}
    for unit in range(len(given.work.layout.units)):
        data = given.output.read(trained_object(unit))
        assert data is not None
        found |= read_trained(data[0])[0]
    return found
