"""Bodies of HTTP messages without copies: answers received straight into a buffer, uploads sent straight from chunks."""

from __future__ import annotations

import contextlib
import http.client
import io
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from kompressor_worker.errors import KompressorError
from kompressor_worker.storage.patience import Patience

SLICE = 1 << 20
"""Bytes asked for or sent at a time: what a broken connection can lose, and what one network timeout allows for."""


def fill(
    buffer: memoryview,
    open_at: Callable[[int], Any],
    patience: Patience,
    given_up: Callable[[BaseException, int, int], KompressorError],
) -> None:
    """Fills `buffer` from answers that break off: `open_at(done)` gives a urllib3 response with the bytes from there to the end.

    Attempts are counted anew after progress. Raises what open_at does, Terminated, and given_up(cause, done, attempts).
    """
    done = failures = 0
    while done < len(buffer):
        count, problem = receive(open_at(done), buffer[done:])
        done += count
        if problem is None:
            return
        failures = 1 if count >= SLICE else failures + 1
        if failures >= patience.attempts:
            raise given_up(problem, done, failures) from problem
        patience.pause(failures, problem)


def receive(raw: Any, buffer: memoryview) -> tuple[int, Exception | None]:
    """Fills `buffer` from a urllib3 response; returns the bytes received and what stopped it short, if anything did.

    urllib3's own readinto reads into a temporary and copies; the http.client response inside it receives in place.
    The connection goes back to its pool after a whole body, and is closed after anything else.
    """
    inner = getattr(raw, "_fp", None)
    direct = isinstance(inner, http.client.HTTPResponse) and not inner.chunked and not raw.headers.get("content-encoding")
    stream: Any = inner if direct else raw
    done = 0
    problem: Exception | None = None
    try:
        while done < len(buffer):
            count = stream.readinto(buffer[done : done + SLICE])
            if not count:
                problem = EOFError(f"the answer ended {len(buffer) - done} bytes early")
                break
            done += count
    except Exception as error:  # whatever the network libraries raise: what came before it is good
        problem = error
    if problem is None and (not direct or stream.isclosed()):
        raw.release_conn()
    else:
        with contextlib.suppress(Exception):
            raw.close()
    return done, problem


class Chunks(io.RawIOBase):
    """A file made of buffers, for an upload: it hands out slices of them, so that nothing is joined or copied."""

    def __init__(self, chunks: Sequence[memoryview]) -> None:
        self._chunks = [chunk.cast("B") for chunk in chunks if chunk.nbytes]
        self._size = sum(len(chunk) for chunk in self._chunks)
        self._index = 0
        self._offset = 0

    def __len__(self) -> int:
        return self._size

    def crc32(self) -> int:
        value = 0
        for chunk in self._chunks:
            value = zlib.crc32(chunk, value)
        return value

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return sum(len(chunk) for chunk in self._chunks[: self._index]) + self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and offset == 0:
            self._index, self._offset = len(self._chunks), 0
            return self._size
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation("an upload is sent from its start")
        self._index, self._offset = 0, offset
        while self._index < len(self._chunks) and self._offset >= len(self._chunks[self._index]):
            self._offset -= len(self._chunks[self._index])
            self._index += 1
        return offset

    def read(self, size: int | None = -1) -> Any:
        """The next slice, of at most SLICE bytes. `size` is not kept to: senders ask for 16 KiB, and each piece costs them a call."""
        if self._index == len(self._chunks):
            return b""
        chunk = self._chunks[self._index]
        piece = chunk[self._offset : self._offset + SLICE]
        self._offset += len(piece)
        if self._offset == len(chunk):
            self._index, self._offset = self._index + 1, 0
        return piece
