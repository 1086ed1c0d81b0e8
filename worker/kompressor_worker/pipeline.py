"""Bytes in and bytes out beside the compute: the next stages download while one is compressed and the last ones upload.

Memory is bounded by bytes, not by blocks: the prefetcher keeps at most `lookahead` source bytes ahead of the consumer (but
always one load), the uploader at most `pending` encoded bytes behind it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

from kompressor_worker.layout import StoredTensor
from kompressor_worker.memory import Buffers
from kompressor_worker.storage import Output, Part, Source

READ_BYTES = 8 << 20
"""One ranged read; several run at once."""
PART_BYTES = 16 << 20
"""One part of an upload. S3 allows 10,000 of them, so 160 GB a shard."""


@dataclass(frozen=True)
class Limits:
    """How much the worker holds besides the stage in work; the smaller plans are for a retry after an out-of-memory."""

    lookahead: int = 128 << 20
    pending: int = 64 << 20
    slice: int = 32 << 20
    """Plain tensors pass through in slices of this many bytes."""
    threads: int = 4
    activations: int = 8 << 30
    """Hidden states and what flows between the steps of a block; beyond it they live in files."""
    snapshot_seconds: float = 30.0
    """Between two snapshots of the activations: what a restart makes again takes about this long at most."""

    def smaller(self, times: int) -> Limits:
        return replace(
            self,
            lookahead=self.lookahead >> 2 * times,
            pending=self.pending >> times,
            slice=self.slice >> times,
            threads=max(1, self.threads >> times),
            activations=self.activations >> 2 * times,
        )


@dataclass(frozen=True)
class Load:
    """Byte ranges that are read together: the stored tensors of a stage, or a slice of one."""

    ranges: tuple[tuple[StoredTensor, int, int], ...]
    """(tensor, first byte, last byte + 1), relative to the tensor."""

    @property
    def nbytes(self) -> int:
        return sum(stop - start for _, start, stop in self.ranges)


@dataclass
class Loaded:
    load: Load
    views: dict[str, memoryview]
    """Stored tensor name to its bytes (of the slice)."""
    futures: list[Future[None]] = field(default_factory=list)

    def wait(self) -> Loaded:
        for f in self.futures:
            f.result()
        self.futures.clear()
        return self


class Prefetcher:
    """Reads `loads` in order, ahead of the consumer. Iterate it inside `with`."""

    def __init__(self, source: Source, loads: Iterable[Load], limits: Limits) -> None:
        self._source = source
        self._loads = iter(loads)
        self._limits = limits
        self._pool = ThreadPoolExecutor(limits.threads, "prefetch")
        self._buffers = Buffers()
        self._ahead: deque[Loaded] = deque()
        self._next: Load | None = next(self._loads, None)
        self._bytes = 0

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[Loaded]:
        while True:
            self._schedule()
            if not self._ahead:
                return
            loaded = self._ahead.popleft().wait()
            self._bytes -= loaded.load.nbytes
            self._schedule()
            yield loaded

    def _schedule(self) -> None:
        while self._next and (not self._ahead or self._bytes + self._next.nbytes <= self._limits.lookahead):
            self._bytes += self._next.nbytes
            self._ahead.append(self._start(self._next))
            self._next = next(self._loads, None)

    def _start(self, load: Load) -> Loaded:
        """Ranges that follow each other in a file are one run: read in large pieces, straight into place."""
        loaded = Loaded(load, {})
        ranges = sorted(load.ranges, key=lambda r: (r[0].file, r[0].start + r[1]))
        runs: list[list[tuple[StoredTensor, int, int]]] = []
        for r in ranges:
            tensor, start, _ = r
            if runs and runs[-1][-1][0].file == tensor.file and _end(runs[-1][-1]) == tensor.start + start:
                runs[-1].append(r)
            else:
                runs.append([r])
        for run in runs:
            file, base = run[0][0].file, run[0][0].start + run[0][1]
            buffer = self._buffers.take(_end(run[-1]) - base)
            for tensor, start, stop in run:
                offset = tensor.start + start - base
                loaded.views[tensor.name] = buffer[offset : offset + stop - start]
            for offset in range(0, len(buffer), READ_BYTES):
                piece = buffer[offset : offset + READ_BYTES]
                loaded.futures.append(self._pool.submit(self._source.read_into, file, base + offset, piece))
        return loaded


def _end(r: tuple[StoredTensor, int, int]) -> int:
    return r[0].start + r[2]


class Uploader:
    """Cuts a stream of bytes into parts and uploads them behind the producer.

    The cuts follow from the stream alone, never from timing, so that a resumed upload makes the same parts. `cut` ends a unit: what has
    gathered becomes a part if the store takes parts that small, and stays pending otherwise.
    """

    def __init__(self, output: Output, limits: Limits) -> None:
        self._output = output
        self._pool = ThreadPoolExecutor(limits.threads, "upload")
        self._limit = limits.pending
        self._room = threading.Condition()
        self._in_flight = 0
        self._futures: list[Future[Part]] = []
        self._pending: list[memoryview] = []
        self._size = 0
        self._name = self._upload = ""
        self._number = self._offset = 0

    def __enter__(self) -> Uploader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=error is not None)

    def open(self, name: str, upload: str, parts: Sequence[Part], tail: bytes) -> None:
        """Goes on with an upload after `parts`; `tail` is what had gathered behind them."""
        assert not self._pending
        self._name, self._upload = name, upload
        self._number = len(parts)
        self._offset = parts[-1].offset + parts[-1].size if parts else 0
        if tail:
            self._append(memoryview(tail))

    def write(self, data: memoryview) -> None:
        self._append(data.cast("B") if data.format != "B" or data.ndim != 1 else data)

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """Runs something else in the upload threads: checksums."""
        return self._pool.submit(work, *args)

    def cut(self, last: bool = False) -> tuple[list[Future[Part]], bytes]:
        """Ends a unit, or the shard: the parts since the previous cut, and the bytes that stay pending."""
        if self._size and (last or self._size >= self._output.minimum_part):
            self._send(self._size)
        futures, self._futures = self._futures, []
        return futures, b"".join(self._pending)

    def _append(self, data: memoryview) -> None:
        while len(data):
            take = min(len(data), PART_BYTES - self._size)
            self._pending.append(data[:take])
            self._size += take
            data = data[take:]
            if self._size == PART_BYTES:
                self._send(PART_BYTES)

    def _send(self, size: int) -> None:
        with self._room:
            while self._in_flight and self._in_flight + size > self._limit:
                self._room.wait()
            self._in_flight += size
        chunks, self._pending, self._size = self._pending, [], 0
        self._number += 1
        future = self._pool.submit(self._output.write_part, self._name, self._upload, self._number, self._offset, chunks)
        future.add_done_callback(lambda _: self._freed(size))
        self._futures.append(future)
        self._offset += size

    def _freed(self, size: int) -> None:
        with self._room:
            self._in_flight -= size
            self._room.notify_all()


def results(futures: Sequence[Future[Any]]) -> list[Any]:
    """Results in order; the first error ends the wait."""
    wait(futures, return_when=FIRST_EXCEPTION)
    return [f.result() for f in futures]
