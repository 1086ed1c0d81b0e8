"""A stored model as one that is trained, or as a teacher, unit by unit: no more than a unit is in memory beside what has been built.

Of processes that train together the leader alone reads; the others have its bytes from it, whatever becomes of them then.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kompressor_worker import kernels
from kompressor_worker.decoder import Decoder
from kompressor_worker.decoder_block import Cache
from kompressor_worker.distil.lesson import StoredModel
from kompressor_worker.distil.model import Outside, TrainedBlock, TrainedModel, computing_dtype
from kompressor_worker.distil.together import Together
from kompressor_worker.errors import UserError
from kompressor_worker.expand import KV_SCALES
from kompressor_worker.layout import LinearLayout, StageLayout, UnitLayout
from kompressor_worker.pipeline import Limits, Load, Prefetcher
from kompressor_worker.schemes import Scheme
from kompressor_worker.stream import whole
from kompressor_worker.tensors import DTYPES, decode, refuse_nonfinite, tensor
from kompressor_worker.unit_kinds import kind_of

if TYPE_CHECKING:
    from kompressor_worker.straight_through import Fake

NOTHING: Mapping[str, Scheme] = {}
Shard = Callable[[torch.nn.Module], None]
"""What becomes of a module once its weights are there: nothing, or a part of it for each process."""


@dataclass(frozen=True)
class Stored:
    """A unit's tensors as they are read."""

    unit: UnitLayout
    decoded: dict[str, Tensor]
    """As the model sees them, by full name."""
    raw: dict[str, Tensor]
    """As quantised linears are stored, by full name."""


def read_units(model: StoredModel, device: torch.device, limits: Limits, together: Together | None = None) -> Iterator[Stored]:
    """The units of a model, in order; with `together` in all its processes at once. Raises BadNumerics, CorruptSource, and what storage
    raises."""
    units = model.layout.units
    stages = [stage for unit in units for stage in unit.stages if any(t.stored for t in stage.tensors)]
    beside = list(model.others.values())
    loads = [*([Load(tuple((t, 0, t.nbytes) for t in beside))] if beside else []), *(whole(stage) for stage in stages)]
    incoming = _incoming(model, loads, limits, together)
    with closing(incoming):
        views = next(incoming) if beside else {}
        others = {t.name: tensor(views[t.name], t.dtype, t.shape).clone() for t in beside}
        for unit in units:
            found = Stored(unit, {}, {})
            for stage in unit.stages:
                if any(t.stored for t in stage.tensors):
                    _read(stage, next(incoming), device, found)
            prefix = tuple(f"{x.name}." for stage in unit.stages for x in stage.linears if x.kind == "linear")
            found.raw.update({n: t for n, t in others.items() if n.startswith(prefix) or n.startswith(f"{unit.name}.")})
            yield found


def _incoming(
    model: StoredModel, loads: Sequence[Load], limits: Limits, together: Together | None
) -> Generator[Mapping[str, memoryview], None, None]:
    """Of each load its tensors' bytes, by name."""
    if together is None or together.group.leads:
        with Prefetcher(model.source, loads, limits) as prefetched:
            for loaded in prefetched:
                if together is not None:
                    together.spread([loaded.views[t.name] for t, _, _ in loaded.load.ranges])
                yield loaded.views
        return
    for load in loads:
        views = {t.name: memoryview(bytearray(stop - start)) for t, start, stop in load.ranges}
        together.spread(list(views.values()))
        yield views


def _read(stage: StageLayout, views: Mapping[str, memoryview], device: torch.device, into: Stored) -> None:
    for t in stage.tensors:
        value = decode(t, views)
        refuse_nonfinite(t.name, kernels.nonfinite(value))
        into.decoded[t.name] = value.to(device, copy=True)
        if t.encoding == "quantized":
            into.raw.update({s.name: tensor(views[s.name], s.dtype, s.shape).clone() for s in t.stored})


def build(
    model: StoredModel, together: Together, trained: bool, limits: Limits, shard: Shard, schemes: Mapping[str, Scheme] = NOTHING
) -> TrainedModel:
    """The model, each block sharded as soon as it is there; the model itself is not. `schemes`: by linear, those that a model which is
    `trained` is to be published in where it is not stored in them. Raises UserError: a family whose forward is not known."""
    layout, device = model.layout, together.device
    decoder = Decoder(layout, device)
    decoder.dtype = computing_dtype(DTYPES[layout.dtype], device)
    names = outside_names(layout.units)
    blocks: list[TrainedBlock] = []
    outside: dict[str, Tensor] = {}
    ends: dict[str, Fake] = {}
    for found in read_units(model, device, limits, together):
        match kind_of(found.unit):
            case "block":
                fakes = fakes_of(found, device, schemes) if trained else {}
                kept = {name: x for name, x in found.raw.items() if name.endswith(KV_SCALES)}
                block = TrainedBlock(decoder, len(blocks), found.unit, found.decoded, fakes, cache_of(found, device), kept, trained)
                shard(block)
                blocks.append(block)
            case "embeddings" | "head":
                outside |= found.decoded
                ends |= fakes_of(found, device, schemes) if trained else {}
    made = TrainedModel(decoder, blocks, {name: x for name, x in outside.items() if name in names.all}, names, trained)
    made.quantise(ends)
    return made


def fakes_of(found: Stored, device: torch.device, schemes: Mapping[str, Scheme]) -> dict[str, Fake]:
    """By linear, of those that are stored quantised, or are to be."""
    made: dict[str, Fake] = {}
    for linear, source in ((x, t) for s in found.unit.stages for x in s.linears for t in s.tensors if t.name == x.weight):
        if source.scheme is not None:
            from kompressor_worker.straight_through import fake_of

            tensors = {name: x for name, x in found.raw.items() if name.startswith(f"{linear.name}.")}
            made[linear.name] = fake_of(linear, source.scheme, tensors, device)
        elif (scheme := schemes.get(linear.name)) is not None and scheme.format == "gguf":
            from kompressor_worker.gguf_straight_through import FakeBlocks

            made[linear.name] = FakeBlocks.found(linear, scheme, found.decoded[linear.weight], device)
    return made


def cache_of(found: Stored, device: torch.device) -> Cache | None:
    """What an FP8 cache does to keys and values, by the scales that are stored of it."""
    k_scale, v_scale = (found.raw.get(f"{found.unit.name}.self_attn.{kind}_scale") for kind in "kv")
    if k_scale is None or v_scale is None:
        return None
    from kompressor_worker.straight_through import fake_kv

    scales = k_scale.to(device), v_scale.to(device)
    return lambda k, v: (fake_kv(k, scales[0]), fake_kv(v, scales[1]))


def outside_names(units: tuple[UnitLayout, ...]) -> Outside:
    """Raises UserError: no embeddings, or no norm in front of the head."""
    kinds: dict[str, LinearLayout] = {x.kind: x for unit in units for stage in unit.stages for x in stage.linears}
    head = next(unit for unit in units if unit.name == "head")
    norm = next((t.name for stage in head.stages for t in stage.tensors if t.name.endswith("norm.weight")), None)
    if norm is None or "embedding" not in kinds:
        raise UserError("distil: the model has no embeddings, or no norm before its head; it cannot be trained")
    return Outside(kinds["embedding"].weight, norm, kinds.get("head", kinds["embedding"]).name)
