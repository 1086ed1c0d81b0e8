"""The output's shards, known to the byte before any weight is read: so headers go first and tensors follow as they are made.

In safetensors files they stand in the order in which the stream makes them, without gaps. Format:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from kompressor_worker.formats import bitmask
from kompressor_worker.formats.gguf_form import Form
from kompressor_worker.formats.stored import PlannedTensor, planned_tensors
from kompressor_worker.layout import DTYPE_BYTES, LinearLayout, ModelLayout, StageLayout
from kompressor_worker.schemes import Scheme

MAX_SHARD_BYTES = 5 * 10**9
"""What transformers calls max_shard_size, and its default for years."""


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor of the output: bytes [start, stop) of its shard's data, which begins after the header."""

    name: str
    """As the model has it, whatever the file calls it."""
    dtype: str
    """Of the value as the stream makes it, and its shape."""
    shape: tuple[int, ...]
    shard: int
    start: int
    stop: int
    form: Form | None = None
    """What becomes of the value in the file; None: its bytes stand there."""

    @property
    def sliced(self) -> bool:
        """Whether its rows may be written slice by slice."""
        return self.form is None or not self.form.heads


@dataclass(frozen=True)
class Position:
    """A place in the output: `offset` bytes of shard number `shard` are behind it, header included."""

    shard: int
    offset: int


@dataclass(frozen=True)
class Shard:
    name: str
    header: bytes
    """Length prefix and JSON, padded to 8 bytes."""
    size: int
    """Of the whole file."""


@dataclass(frozen=True)
class OutputPlan:
    shards: tuple[Shard, ...]
    stages: tuple[tuple[tuple[PlacedTensor, ...], ...], ...]
    """Per unit, per stage: its tensors as the stream makes them. A unit's follow each other in the files, in any order, and not all of
    them have to lie where the one before ends."""
    constants: tuple[tuple[PlacedTensor, bytes], ...] = ()
    """Tensors that are known already, which no unit makes; each lies in a gap behind one that a unit does."""

    @property
    def tensor_bytes(self) -> int:
        return sum(t.stop - t.start for t in self.tensors())

    def tensors(self) -> Iterator[PlacedTensor]:
        """All of them, constants too."""
        yield from (t for unit in self.stages for stage in unit for t in stage)
        yield from (t for t, _ in self.constants)

    def position(self, unit: int) -> Position:
        """Where a unit's first byte goes; for the number of units: the end. What fills the gap behind a unit belongs to it."""
        for stages in self.stages[unit:]:
            if placed := [(t.shard, t.start) for stage in stages for t in stage]:
                shard, start = min(placed)
                return Position(shard, len(self.shards[shard].header) + start if start else 0)
        return Position(len(self.shards) - 1, self.shards[-1].size)

    @cached_property
    def filling(self) -> dict[tuple[int, int], bytes]:
        """By shard and the offset in its data where a tensor ends: the bytes up to the next one, or the end of the file. Zeros, and
        constants."""
        found: dict[tuple[int, int], bytes] = {}
        placed = sorted((t.shard, t.start, t.stop) for unit in self.stages for stage in unit for t in stage if t.stop > t.start)
        ends = [(shard, start) for shard, start, _ in placed[1:]]
        for (shard, _, stop), (following, start) in zip(placed, [*ends, (-1, 0)], strict=True):
            end = start if following == shard else self.shards[shard].size - len(self.shards[shard].header)
            if end > stop:
                found[shard, stop] = self._filled(shard, stop, end)
        return found

    def _filled(self, shard: int, start: int, stop: int) -> bytes:
        data = bytearray(stop - start)
        for t, value in self.constants:
            if t.shard == shard and start <= t.start < stop:
                data[t.start - start : t.stop - start] = value
        return bytes(data)

    def index(self) -> dict[str, object]:
        """`model.safetensors.index.json`."""
        return {
            "metadata": {"total_size": self.tensor_bytes},
            "weight_map": {t.name: self.shards[t.shard].name for t in sorted(self.tensors(), key=lambda t: t.name)},
        }


def plan_output(layout: ModelLayout, schemes: Mapping[str, Scheme], max_shard: int = MAX_SHARD_BYTES) -> OutputPlan:
    """Places every tensor of the result. A new shard begins when `max_shard` would be passed, and where a tensor would no longer be aligned
    to its own dtype (a loader that views the file in place needs that; safetensors allows no gaps)."""
    shard, size = 0, 0
    placed: list[tuple[tuple[PlacedTensor, ...], ...]] = []
    for unit in layout.units:
        stages = []
        for stage in unit.stages:
            tensors = [] if unit.dropped or stage.dropped else stage_tensors(stage, schemes)
            total = sum(nbytes(t) for t in tensors)
            widest = max((DTYPE_BYTES[t.dtype] for t in tensors), default=1)
            if size and (size + total > max_shard or size % widest):
                shard, size = shard + 1, 0
            row = []
            for t in tensors:
                row.append(PlacedTensor(t.name, t.dtype, tuple(t.shape), shard, size, size + nbytes(t)))
                size += nbytes(t)
            stages.append(tuple(row))
        placed.append(tuple(stages))
    return OutputPlan(_shards(placed, shard + 1), tuple(placed))


def stage_tensors(stage: StageLayout, schemes: Mapping[str, Scheme]) -> list[PlannedTensor]:
    """What a stage becomes, widest dtype first so that each tensor is aligned when the stage is."""
    linears = {linear.weight: linear for linear in stage.linears if linear.name in schemes or linear.bitmask is not None}
    tensors: list[PlannedTensor] = []
    for t in stage.tensors:
        if (linear := linears.get(t.name)) and linear.bitmask is not None:
            tensors += bitmask.planned_tensors(linear.name, linear.shape, linear.dtype, linear.bitmask)
        elif linear:
            tensors += planned_tensors(linear.name, linear.shape, linear.dtype, schemes[linear.name])
        else:
            tensors.append(PlannedTensor(t.name, t.dtype, t.result_shape))
    return sorted(tensors, key=lambda t: -DTYPE_BYTES[t.dtype])


def row_by_row(stage: StageLayout, schemes: Mapping[str, Scheme]) -> LinearLayout | None:
    """Its matrix, where that is quantised a slice of rows at a time: embeddings and head in a GGUF file."""
    if len(stage.linears) != 1:
        return None
    (matrix,) = stage.linears
    scheme = schemes.get(matrix.name)
    return matrix if scheme is not None and scheme.format == "gguf" and matrix.kind in ("embedding", "head") else None


def nbytes(tensor: PlannedTensor) -> int:
    return prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]


def _shards(placed: list[tuple[tuple[PlacedTensor, ...], ...]], count: int) -> tuple[Shard, ...]:
    entries: list[dict[str, object]] = [{"__metadata__": {"format": "pt"}} for _ in range(count)]
    sizes = [0] * count
    for unit in placed:
        for stage in unit:
            for t in stage:
                entries[t.shard][t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.start, t.stop]}
                sizes[t.shard] = t.stop
    shards = []
    for i, (entry, size) in enumerate(zip(entries, sizes, strict=True)):
        name = "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        text = json.dumps(entry, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        shards.append(Shard(name, header, len(header) + size))
    return tuple(shards)
