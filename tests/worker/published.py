"""A small model through passes with calibration, block by block, and written as a checkpoint: what loaders are given to read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sources import folder_source
from torch import Tensor

from independent import tensors_of
from kompressor_worker.activations import Activations, Spill
from kompressor_worker.block_work import Finished, Place, Streams
from kompressor_worker.calibrated import Engine
from kompressor_worker.decoder import Decoder
from kompressor_worker.layout import ModelLayout, StageLayout
from kompressor_worker.passes import build_passes
from kompressor_worker.publish import published_config
from kompressor_worker.reading import read_layout
from kompressor_worker.schemes import Scheme
from kompressor_worker.shards import plan_output
from kompressor_worker.stream import Work
from kompressor_worker.tensors import DTYPES

__all__ = ["Published", "publish"]


@dataclass
class Published:
    folder: Path
    layout: ModelLayout
    schemes: dict[str, Scheme]
    tensors: dict[str, Tensor]


def publish(source: Path, folder: Path, entries: Sequence[Mapping[str, Any]], tokens: Tensor) -> Published:
    """`source` after the passes of `entries`, calibrated on tokens [rows, length]; every tensor is what the plan announces."""
    layout, passes, schemes = read_layout(folder_source(source)), build_passes(entries), dict[str, Scheme]()
    for each in passes:
        layout = each.prepare(layout)
        schemes |= each.assign(layout, schemes)
    decoder, state = Decoder(layout, torch.device("cpu")), tensors_of(source)
    embeddings = state["model.embed_tokens.weight"]
    stream = Activations.of("calibration", list(tokens), decoder.dtype, embeddings.shape[1], Spill(1 << 30), torch.device("cpu"))
    stream.embed(0, decoder.embed(embeddings))
    engine = Engine(decoder, passes, schemes, Streams(calibration=stream))

    def load(stage: StageLayout) -> dict[str, Tensor]:
        return {t.name: state[t.name] for t in stage.tensors if t.stored}

    def write(number: int, finished: Finished) -> None:
        state.update(finished.weights)
        for name, encoded in finished.encoded.items():
            del state[f"{name}.weight"]
            state.update(encoded.tensors)

    for layer, unit in enumerate(u for u in layout.units if ".layers." in u.name):
        engine.block(Place(layer, layer), unit, load, write)
    plan = plan_output(layout, schemes)
    planned = {t.name: (DTYPES[t.dtype], t.shape) for unit in plan.stages for stage in unit for t in stage}
    assert planned == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    (folder / "config.json").write_text(json.dumps(published_config(Work(layout, passes, schemes, plan))))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})
    return Published(folder, layout, schemes, state)
