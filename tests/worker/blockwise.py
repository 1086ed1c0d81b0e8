"""A whole model compressed block by block in memory, without storage: what tests of passes judge by KL."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
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
from kompressor_worker.formats.compressed_tensors import decode
from kompressor_worker.layout import ModelLayout, StageLayout
from kompressor_worker.passes import Pass, build_passes
from kompressor_worker.reading import read_layout
from kompressor_worker.schemes import Scheme

__all__ = ["Compressed", "compressed", "kl", "layout_of", "logits", "prepared", "transformed"]


def layout_of(folder: Path) -> ModelLayout:
    return read_layout(folder_source(folder))


def prepared(layout: ModelLayout, entries: Sequence[Mapping[str, Any]]) -> tuple[ModelLayout, list[Pass], dict[str, Scheme]]:
    """Built, prepared and assigned, as before a stream."""
    passes, schemes = build_passes(entries), dict[str, Scheme]()
    for each in passes:
        layout = each.prepare(layout)
    for each in passes:
        schemes |= each.assign(layout, schemes)
    return layout, passes, schemes


@dataclass
class Compressed:
    state: dict[str, Tensor]
    """What a reader of the result sees, by full name."""
    encoded: dict[str, Tensor]
    """The encoded linears' tensors."""
    records: list[dict[str, Any]]
    """What there is to say of each block."""


def compressed(
    folder: Path,
    entries: Sequence[Mapping[str, Any]],
    tokens: Tensor,
    weights: Mapping[str, Tensor] | None = None,
    after: Sequence[Pass] = (),
) -> Compressed:
    """`entries` with calibration `tokens` [rows, length]. `weights`: another state than the folder's, as its config has it; `after`: passes
    behind those of `entries`."""
    layout, passes, schemes = prepared(layout_of(folder), entries)
    passes += after
    state = dict(weights or tensors_of(folder))
    outside(layout, passes, state)
    decoder = Decoder(layout, torch.device("cpu"))
    hidden = state["model.embed_tokens.weight"].shape[1]
    stream = Activations.of("calibration", list(tokens), decoder.dtype, hidden, Spill(1 << 30), torch.device("cpu"))
    stream.embed(0, decoder.embed(state["model.embed_tokens.weight"]))
    engine = Engine(decoder, passes, schemes, Streams(calibration=stream))
    made = Compressed(state, {}, [])
    for layer, unit in enumerate(u for u in layout.units if ".layers." in u.name):

        def write(number: int, finished: Finished) -> None:
            state.update(finished.weights)
            for name, encoded in finished.encoded.items():
                state[f"{name}.weight"] = decode(name, encoded.tensors, finished.schemes[name], decoder.dtype)
                made.encoded.update(encoded.tensors)

        def load(stage: StageLayout) -> dict[str, Tensor]:
            return {t.name: state[t.name] for t in stage.tensors}

        made.records.append(engine.block(Place(layer, layer), unit, load, write))
    return made


def transformed(layout: ModelLayout, passes: Sequence[Pass], state: dict[str, Tensor]) -> None:
    """Everything that passes change before anything is measured."""
    for each in passes:
        for unit in (u for u in layout.units if ".layers." in u.name):
            each.transform(unit, state)
    outside(layout, passes, state)


def outside(layout: ModelLayout, passes: Sequence[Pass], state: dict[str, Tensor]) -> None:
    """The embeddings and the head, in slices of rows as the stream reads them."""
    embeddings = state["model.embed_tokens.weight"]
    norm = state["model.norm.weight"]
    tensors = [t for unit in layout.units if ".layers." not in unit.name for stage in unit.stages for t in stage.tensors]
    made: dict[str, Tensor] = {}
    for tensor in (t for t in tensors if len(t.shape) == 2):
        rows = state.get(tensor.name, embeddings)
        for each in passes:
            parts = [each.transform_rows(tensor.name, part, norm if tensor.name == "lm_head.weight" else None) for part in rows.split(50)]
            rows = torch.cat(parts)
        made[tensor.name] = rows
    state |= made
    for each in passes:
        each.transform(next(unit for unit in layout.units if unit.name == "head"), state)


def logits(
    folder: Path,
    state: Mapping[str, Tensor],
    tokens: Tensor,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Tensor:
    """Of transformers' own model with this state (as files hold it) and the folder's config, fp32 [rows, length, vocabulary]."""
    from transformers import AutoModelForCausalLM

    with TemporaryDirectory() as scratch:
        place = Path(scratch)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, place / "model.safetensors", {"format": "pt"})
        (place / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **config}))
        model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype).eval()
    with torch.inference_mode():
        return torch.cat([model(input_ids=rows, use_cache=False).logits.float() for rows in tokens.split(16)])


def kl(reference: Tensor, other: Tensor) -> float:
    """Mean over tokens of KL(reference || other), in nats, of logits."""
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
