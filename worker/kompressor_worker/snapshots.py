"""What a restart goes on from: the activations of all streams before a unit, and the blocks that were published since.

Every commit leaves one or the other. A snapshot is as large as all hidden states, so it is taken now and then; a block alone costs
a forward through it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
from torch import Tensor

from kompressor_worker.activations import CHUNK_BYTES, Activations, chunked
from kompressor_worker.block_work import Streams
from kompressor_worker.formats import bitmask
from kompressor_worker.journal import State
from kompressor_worker.layout import StageLayout, UnitLayout
from kompressor_worker.storage import WORK, Output
from kompressor_worker.stream import Work
from kompressor_worker.unit_kinds import kind_of
from kompressor_worker.writer import Carry

PIECE_BYTES = 8 << 20
"""Of a block's published tensors that share a working object, at least: up to three times as much waits to be written."""

Submit = Callable[[str, Callable[[], bytes]], Future[None]]
"""Writes a working object in the background."""


class Pieces:
    """The published tensors of one block as working objects, written while the block is still being worked on: never whole in memory."""

    def __init__(self, unit: int, groups: Sequence[Sequence[int]], submit: Submit) -> None:
        """`groups`: numbers of the stages that make an object."""
        self._unit, self._groups, self._submit = unit, groups, submit
        self._held: dict[str, Tensor] = {}
        self.written: list[Future[None]] = []

    def add(self, stage: int, tensors: Mapping[str, Tensor]) -> None:
        """Of one stage, in order."""
        self._held |= tensors
        if stage == self._groups[len(self.written)][-1]:
            if self.written:
                self.written[-1].result()  # so that no more than two are held
            held, self._held = self._held, {}
            self.written.append(self._submit(piece_name(self._unit, len(self.written)), lambda: safetensors.torch.save(held)))


@dataclass
class Snapshots:
    """Of one job's streams."""

    streams: Streams
    output: Output
    seconds: float
    work: Work
    _saved: float = field(default_factory=time.monotonic)
    _block_began: float = field(default_factory=time.monotonic)
    _block_took: float = 0.0
    _since: list[str] = field(default_factory=list)
    """Working objects that the next snapshot makes superfluous."""

    def restore(self, state: State) -> int:
        """Fills the streams from the latest snapshot. Returns the unit before which they then stand: 0 where there is none."""
        if state.snapshot is None:
            self._since = [name for n in range(state.unit) for name in self._names(n)]
            return 0
        restored(snapshot_name(state.snapshot), self.streams.all(), self._read)
        self._since = [*self._objects(state.snapshot), *(name for n in range(state.snapshot, state.unit) for name in self._names(n))]
        return state.snapshot

    @property
    def left(self) -> list[str]:
        """Working objects that are there for a restart."""
        return list(self._since)

    def reader(self, unit: int, layout: UnitLayout) -> Callable[[StageLayout], dict[str, Tensor]]:
        """The published tensors, stage by stage, of a block that the journal counts and no snapshot is behind."""
        held: dict[str, Tensor] = {}
        groups = [[layout.stages[number] for number in group] for group in self._groups(unit)]
        of = {stage.name: number for number, group in enumerate(groups) for stage in group}
        names = {stage.name: [t.name for t in placed] for stage, placed in zip(layout.stages, self.work.plan.stages[unit], strict=True)}

        def published(stage: StageLayout) -> dict[str, Tensor]:
            if not names[stage.name]:
                return {}
            if any(name not in held for name in names[stage.name]):
                held.update(safetensors.torch.load(self._piece(unit, of[stage.name])))
            found = {name: held.pop(name) for name in names[stage.name]}
            bitmask.unpack_linears(stage.linears, found)
            return found

        return published

    def _piece(self, unit: int, number: int) -> bytes:
        """Or the whole block in one object, as earlier releases left it."""
        found = self.output.read(piece_name(unit, number)) or self.output.read(f"{WORK}blocks/{unit:05d}.safetensors")
        assert found is not None, f"the journal counts on {piece_name(unit, number)}, which is missing"
        return found[0]

    def pieces(self, unit: int, submit: Submit) -> Pieces | None:
        """Before a block: where its tensors go that a restart needs; None where a snapshot behind it is due, or smaller than the block."""
        self._block_began = time.monotonic()
        size = sum(stream.nbytes for stream in self.streams.all())
        due = self._block_began + self._block_took - self._saved > self.seconds
        return None if due or size <= self._bytes(unit) else Pieces(unit, self._groups(unit), submit)

    def carry(self, unit: int, record: Mapping[str, Any], pieces: Pieces | None) -> Carry:
        """What this block's commit leaves: its `pieces`, or a snapshot."""
        self._block_took = time.monotonic() - self._block_began
        if pieces is not None:
            self._since += self._names(unit)
            return Carry(dict(record), written=pieces.written)
        self._saved = time.monotonic()
        stale, self._since = tuple(self._since), self._objects(unit + 1)
        kept = [(s, s.snapshot(), [list(b.excluded) for b in s.batches], list(s.excluded)) for s in self.streams.all()]
        return Carry(dict(record), lambda: snapshot_objects(snapshot_name(unit + 1), kept), snapshot=unit + 1, stale=stale)

    def _bytes(self, unit: int) -> int:
        return sum(t.stop - t.start for placed in self.work.plan.stages[unit] for t in placed)

    def _groups(self, unit: int) -> list[list[int]]:
        """Numbers of the stages of a block, those that share an object together."""
        groups: list[list[int]] = []
        size = PIECE_BYTES
        for number, placed in enumerate(self.work.plan.stages[unit]):
            if not placed:
                continue
            if size >= PIECE_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(number)
            size += sum(t.stop - t.start for t in placed)
        return groups

    def _names(self, unit: int) -> list[str]:
        """Of the objects that a block's commit leaves; none of a unit that is no block."""
        if kind_of(self.work.layout.units[unit]) != "block":
            return []
        return [piece_name(unit, number) for number in range(len(self._groups(unit)))]

    def _objects(self, unit: int) -> list[str]:
        return [
            *(name for stream in self.streams.all() for name in object_names(snapshot_name(unit), stream)),
            f"{snapshot_name(unit)}index.json",
        ]

    def _read(self, name: str) -> bytes:
        found = self.output.read(name)
        assert found is not None, f"the journal counts on {name}, which is missing"
        return found[0]


def piece_name(unit: int, number: int) -> str:
    return f"{WORK}blocks/{unit:05d}-{number:04d}.safetensors"


def snapshot_name(unit: int) -> str:
    return f"{WORK}snapshot-{unit:05d}/"


def object_names(place: str, stream: Activations) -> list[str]:
    """Of one stream in the snapshot whose names begin with `place`."""
    return [f"{place}{stream.name}-{number:05d}" for number in range(-(-stream.nbytes // CHUNK_BYTES))]


Kept = tuple[Activations, list[Tensor], list[list[bool]], list[str]]


def snapshot_objects(place: str, kept: list[Kept]) -> Iterator[tuple[str, bytes]]:
    """Its objects, the index last."""
    index: dict[str, Any] = {}
    for stream, values, excluded, excluded_in in kept:
        yield from zip(object_names(place, stream), chunked(values), strict=True)
        index[stream.name] = {"excluded": excluded, "excludedIn": excluded_in}
    yield f"{place}index.json", json.dumps(index).encode()


def restored(place: str, streams: Sequence[Activations], read: Callable[[str], bytes]) -> None:
    """Fills the streams from `snapshot_objects`."""
    index = json.loads(read(f"{place}index.json"))
    for stream in streams:
        kept = index[stream.name]
        stream.restore((read(name) for name in object_names(place, stream)), kept["excluded"])
        stream.excluded = list(kept["excludedIn"])
