"""Encoded tensors into shards, and finished units into the journal: in order, one commit in the background."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import xxhash

from kompressor_worker.block import Encoded, Pruned
from kompressor_worker.errors import Terminated
from kompressor_worker.in_order import InOrder
from kompressor_worker.journal import Journal, Upload
from kompressor_worker.layout import LinearLayout
from kompressor_worker.pipeline import Uploader, results
from kompressor_worker.schemes import Scheme
from kompressor_worker.shards import OutputPlan, PlacedTensor
from kompressor_worker.storage import Output


@dataclass
class Carry:
    """What a finished unit leaves beside its tensors: words for the report, and objects that a restart goes on from."""

    record: dict[str, Any] = field(default_factory=dict)
    objects: Callable[[], Iterator[tuple[str, bytes]]] = lambda: iter(())
    """(name, content) of working objects, written before the commit that counts the unit."""
    written: Sequence[Future[None]] = ()
    """Those that are being written already."""
    snapshot: int | None = None
    """The unit before which these activations stand, if the objects are a snapshot."""
    stale: tuple[str, ...] = ()
    """Working objects that nothing needs after the commit."""


NOTHING = Carry()


@dataclass(frozen=True)
class _Done:
    """A finished unit that waits for its commit."""

    unit: int
    uploads: int
    """How many uploads had begun when it was finished."""
    parts: list[tuple[int, list[Future[Any]]]]
    """Parts on their way, by upload."""
    tail: bytes
    digests: dict[str, str | Future[str]]
    linears: dict[str, dict[str, Any]]
    pruned: dict[str, dict[str, Any]]
    carry: Carry


class Writer:
    """Puts encoded tensors into shards, opens and closes these, and commits finished units in order, one in the background."""

    def __init__(self, plan: OutputPlan, output: Output, journal: Journal, uploads: Uploader) -> None:
        self._plan, self._output, self._journal, self._uploads = plan, output, journal, uploads
        self._units = len(plan.stages)
        self._commits = ThreadPoolExecutor(1, "commit")
        self._committing: Future[None] | None = None
        self._uploaded = list(journal.state.uploads)
        """Uploads with the parts that are certain; `_parts` are those still on their way, by upload."""
        self._parts: list[tuple[int, list[Future[Any]]]] = []
        self._digests: dict[str, str | Future[str]] = {}
        self._linears: dict[str, dict[str, Any]] = {}
        self._pruned: dict[str, dict[str, Any]] = {}
        self._shard = -1
        self._order = InOrder(plan, self._pass_on)

    def __enter__(self) -> Writer:
        position = self._plan.position(self._journal.state.unit)
        self._order.begin(position)
        if position.offset and self._journal.state.unit < self._units:
            self._shard = position.shard
            upload = self._uploaded[-1]
            assert upload.name == self._plan.shards[position.shard].name
            self._uploads.open(upload.name, upload.id, upload.parts, self._journal.read_tail())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self._committing and (error is None or isinstance(error, Terminated)):
                self._committing.result()
        finally:
            self._commits.shutdown(wait=True, cancel_futures=True)
            self._order.close()

    def write(self, tensor: PlacedTensor, data: memoryview) -> None:
        self._digests[tensor.name] = self._uploads.submit(digest, data)
        self.append(tensor, data)

    def append(self, tensor: PlacedTensor, data: memoryview) -> None:
        """The next bytes of a tensor; of those of a unit, any may come first."""
        self._order.put(tensor, data)

    def submit(self, name: str, content: Callable[[], bytes]) -> Future[None]:
        """Writes a working object in the background."""
        return self._uploads.submit(lambda: self._output.write(name, content()))

    def record_digest(self, tensor: str, value: str) -> None:
        self._digests[tensor] = value

    def record_linear(self, linear: LinearLayout, scheme: Scheme, encoded: Encoded) -> None:
        self._linears[linear.name] = {
            "scheme": scheme.name,
            "shape": list(linear.shape),
            "dtype": linear.dtype,
            "squaredError": encoded.squared_error,
            "squaredNorm": encoded.squared_norm,
            **({"groupSize": scheme.group_size or -1} if scheme.choosable_groups else {}),
            **({"saturated": encoded.saturated} if encoded.saturated else {}),
        }

    def record_pruned(self, linear: LinearLayout, pruned: Pruned) -> None:
        self._pruned[linear.name] = {
            "asked": str(linear.pruned),
            "shape": list(linear.shape),
            "zeros": pruned.zeros,
            "squaredError": pruned.squared_error,
            "squaredNorm": pruned.squared_norm,
            **({"bitmask": {"dtype": linear.dtype, "values": linear.bitmask}} if linear.bitmask is not None else {}),
        }

    def finish(self, unit: int, carry: Carry = NOTHING) -> None:
        """Commits the unit in the background, after the one before it."""
        following = self._plan.position(unit + 1)
        assert self._order.stands_at(following), f"unit {unit}: not all of its tensors have been written"
        futures, tail = self._uploads.cut(last=following.offset == 0 or unit + 1 == self._units)
        if futures:
            self._parts.append((len(self._uploaded) - 1, futures))
        # The next unit may open another shard before this commit runs: it counts the uploads of now.
        done = _Done(unit, len(self._uploaded), self._parts, tail, self._digests, self._linears, self._pruned, carry)
        self._parts, self._digests, self._linears, self._pruned = [], {}, {}, {}
        if self._committing:
            self._committing.result()
        self._committing = self._commits.submit(self._commit, done)

    def _pass_on(self, shard: int, data: memoryview) -> None:
        if shard != self._shard:
            self._open(shard)
        self._uploads.write(data)

    def _open(self, shard: int) -> None:
        if self._shard >= 0:
            self._parts.append((len(self._uploaded) - 1, self._uploads.cut(last=True)[0]))
        planned = self._plan.shards[shard]
        upload = Upload(planned.name, self._output.begin(planned.name, planned.size))
        self._uploaded.append(upload)
        self._shard = shard
        self._uploads.open(upload.name, upload.id, (), b"")
        self._uploads.write(memoryview(planned.header))

    def _commit(self, done: _Done) -> None:
        for number, futures in done.parts:
            upload = self._uploaded[number]
            self._uploaded[number] = replace(upload, parts=(*upload.parts, *results(futures)))
        record = {
            "digests": {k: v if isinstance(v, str) else v.result() for k, v in done.digests.items()},
            "linears": done.linears,
            **({"pruned": done.pruned} if done.pruned else {}),
            **done.carry.record,
        }
        for name, data in done.carry.objects():
            self._output.write(name, data)
        results(done.carry.written)
        self._journal.write_record(done.unit, record)
        before = self._journal.state
        snapshot = before.snapshot if done.carry.snapshot is None else done.carry.snapshot
        tail = self._journal.write_tail(done.unit, done.tail)
        uploads = tuple(self._uploaded[: done.uploads])
        self._journal.commit(replace(before, unit=done.unit + 1, uploads=uploads, tail=tail, snapshot=snapshot))
        stale = [*done.carry.stale, *([before.tail] if before.tail and before.tail != tail else [])]
        if stale:
            self._output.delete(stale)


def digest(data: memoryview) -> str:
    """xxh3-128 of a tensor's bytes: faster than the memory bus, so that it costs nothing beside the copy. It finds damage, not malice."""
    return xxhash.xxh3_128(data).hexdigest()
