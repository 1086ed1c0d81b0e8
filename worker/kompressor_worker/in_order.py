"""Bytes of the result in the order of its files, whatever order they are made in.

A GGUF file stacks a layer's experts, matrix by matrix, and the stream makes them expert by expert. What comes before its turn waits in a
file of the scratch folder, until the end of its unit at most: memory stays flat, and a commit finds nothing waiting.
"""

from __future__ import annotations

import heapq
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from kompressor_worker.errors import NoSpaceLeft
from kompressor_worker.shards import OutputPlan, PlacedTensor, Position
from kompressor_worker.storage.posix import explained, write_at

__all__ = ["InOrder", "refuse_without_spool", "spool_bytes"]

PIECE = 8 << 20
"""Bytes that are read back at once."""

Place = tuple[int, int]
"""A shard, and an offset in its data."""


class InOrder:
    """Takes tensors, in pieces or whole, in any order within a unit; passes bytes on as they follow each other."""

    def __init__(self, plan: OutputPlan, emit: Callable[[int, memoryview], None]) -> None:
        """`emit` takes a shard and the next bytes of its data."""
        self._plan, self._emit = plan, emit
        self._turn: Place = (0, 0)
        self._come: dict[str, int] = {}
        """Bytes that are there of a tensor."""
        self._waiting: list[tuple[Place, int, int]] = []
        """A heap of (place, offset in the spool, bytes)."""
        self._spool: IO[bytes] | None = None
        self._spooled = 0

    def begin(self, position: Position) -> None:
        self._turn = self._place(position)

    def stands_at(self, position: Position) -> bool:
        """Whether all that belongs before it has been passed on, and nothing else waits."""
        return not self._waiting and self._turn == self._place(position)

    def put(self, tensor: PlacedTensor, data: memoryview) -> None:
        """The next bytes of a tensor. Raises NoSpaceLeft."""
        if not data.nbytes:
            return
        before = self._come.pop(tensor.name, 0)
        place = tensor.shard, tensor.start + before
        if before + data.nbytes < tensor.stop - tensor.start:
            self._come[tensor.name] = before + data.nbytes
        if place != self._turn:
            self._keep(place, data)
            return
        self._pass_on(data)
        while self._waiting and self._waiting[0][0] == self._turn:
            _, offset, size = heapq.heappop(self._waiting)
            for start in range(0, size, PIECE):
                self._pass_on(self._read(offset + start, min(PIECE, size - start)))
        if not self._waiting and self._spooled:
            assert self._spool is not None
            self._spool.truncate(0)
            self._spooled = 0

    def close(self) -> None:
        if self._spool is not None:
            self._spool.close()

    def _place(self, position: Position) -> Place:
        shard = self._plan.shards[position.shard]
        if position.offset == shard.size:
            return position.shard + 1, 0
        return position.shard, position.offset - len(shard.header) if position.offset else 0

    def _pass_on(self, data: memoryview) -> None:
        """And what fills the file up to the next tensor, or its end."""
        shard, at = self._turn
        self._emit(shard, data)
        at += data.nbytes
        if (filling := self._plan.filling.get((shard, at))) is not None:
            self._emit(shard, memoryview(filling))
            at += len(filling)
        whole = self._plan.shards[shard].size - len(self._plan.shards[shard].header)
        self._turn = (shard + 1, 0) if at == whole else (shard, at)

    def _keep(self, place: Place, data: memoryview) -> None:
        with explained(f"{tempfile.gettempdir()}: keeping parts of the result until it is their turn in the file"):
            if self._spool is None:
                self._spool = tempfile.TemporaryFile(prefix="kompressor-spool-")  # noqa: SIM115 - it lasts as long as the stream
            write_at(self._spool.fileno(), self._spooled, [data])
        heapq.heappush(self._waiting, (place, self._spooled, data.nbytes))
        self._spooled += data.nbytes

    def _read(self, offset: int, size: int) -> memoryview:
        assert self._spool is not None
        buffer = memoryview(bytearray(size))
        done = 0
        while done < size:
            count = os.preadv(self._spool.fileno(), [buffer[done:]], offset + done)
            assert count, "the spool is shorter than what was written to it"
            done += count
        return buffer


def spool_bytes(plan: OutputPlan) -> int:
    """What waits in the scratch folder at most, while the units are made in the plan's order."""
    placed = [t for unit in plan.stages for stage in unit for t in stage if t.stop > t.start]
    ranks = {t.name: rank for rank, t in enumerate(sorted(placed, key=lambda t: (t.shard, t.start)))}
    turn = size = peak = 0
    waiting: set[int] = set()
    for t in placed:
        if ranks[t.name] != turn:
            waiting.add(ranks[t.name])
            size += t.stop - t.start
            peak = max(peak, size)
            continue
        turn += 1
        while turn in waiting:
            waiting.remove(turn)
            turn += 1
        size = size if waiting else 0
    return peak


def refuse_without_spool(needed: int) -> None:
    """Raises NoSpaceLeft."""
    place = Path(tempfile.gettempdir())
    if needed and (room := shutil.disk_usage(place).free) < needed:
        raise NoSpaceLeft(
            f"a layer's experts, on their way into a GGUF file, take {needed:,} bytes in {place}, {room:,} are free; enlarge the volume "
            "there (a worker's is replaced by the volume `tmp` of worker.podTemplate), or set TMPDIR to a larger one"
        )
