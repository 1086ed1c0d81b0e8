"""What a restart goes on from: the activations of all streams before a unit, and the blocks that were published since.

Every commit leaves one or the other. A snapshot is as large as all hidden states, so it is taken now and then; a block alone costs
a forward through it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
from torch import Tensor

from kompressor_worker.activations import CHUNK_BYTES, Activations, chunked
from kompressor_worker.block_work import Streams
from kompressor_worker.journal import State
from kompressor_worker.storage import WORK, Output
from kompressor_worker.writer import Carry


@dataclass
class Snapshots:
    """Of one job's streams."""

    streams: Streams
    output: Output
    seconds: float
    _saved: float = field(default_factory=time.monotonic)
    _since: list[str] = field(default_factory=list)
    """Working objects that the next snapshot makes superfluous."""

    def restore(self, state: State) -> int:
        """Fills the streams from the latest snapshot. Returns the unit before which they then stand: 0 where there is none."""
        if state.snapshot is None:
            self._since = [block_name(n) for n in range(state.unit)]
            return 0
        restored(snapshot_name(state.snapshot), self.streams.all(), self._read)
        self._since = [*self._objects(state.snapshot), *(block_name(n) for n in range(state.snapshot, state.unit))]
        return state.snapshot

    @property
    def left(self) -> list[str]:
        """Working objects that are there for a restart."""
        return list(self._since)

    def block(self, unit: int) -> dict[str, Tensor]:
        """The published tensors of a block that the journal counts and no snapshot is behind."""
        return safetensors.torch.load(self._read(block_name(unit)))

    def carry(self, unit: int, record: Mapping[str, Any], published: dict[str, Tensor]) -> Carry:
        """What this block's commit leaves: a snapshot if one is due, or smaller than the block itself; else the block."""
        size = sum(stream.nbytes for stream in self.streams.all())
        due = time.monotonic() - self._saved > self.seconds or size <= sum(t.nbytes for t in published.values())
        if not due:
            self._since.append(block_name(unit))
            return Carry(dict(record), lambda: iter([(block_name(unit), safetensors.torch.save(published))]))
        self._saved = time.monotonic()
        stale, self._since = tuple(self._since), self._objects(unit + 1)
        kept = [(s, s.snapshot(), [list(b.excluded) for b in s.batches], list(s.excluded)) for s in self.streams.all()]
        return Carry(dict(record), lambda: snapshot_objects(snapshot_name(unit + 1), kept), snapshot=unit + 1, stale=stale)

    def _objects(self, unit: int) -> list[str]:
        return [
            *(name for stream in self.streams.all() for name in object_names(snapshot_name(unit), stream)),
            f"{snapshot_name(unit)}index.json",
        ]

    def _read(self, name: str) -> bytes:
        found = self.output.read(name)
        assert found is not None, f"the journal counts on {name}, which is missing"
        return found[0]


def block_name(unit: int) -> str:
    return f"{WORK}blocks/{unit:05d}.safetensors"


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
