"""The bodies of HTTP messages without copies: answers received straight into a buffer, uploads sent straight from chunks."""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Sequence
from typing import Any

SLICE = 1 << 20
"""Bytes asked for or sent at a time: what a broken connection can lose, and what one network timeout allows for."""


def receive(raw: Any, buffer: memoryview) -> tuple[int, Exception | None]:
    """Fills `buffer` from a urllib3 response; returns the bytes received and what stopped it short, if anything did.

    urllib3's own readinto reads into a temporary and copies; the http.client response inside it receives in place.
    The connection goes back to its pool after a whole body, and is closed after anything else.
    """
    inner = getattr(raw, "_fp", None)
    direct = isinstance(inner, io.BufferedIOBase) and not getattr(inner, "chunked", True) and not raw.headers.get("content-encoding")
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
    except Exception as error:  # whatever the network libraries raise, what came before it is good
        problem = error
    if problem is None and (not direct or inner.isclosed()):
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
        """The next slice of at most SLICE bytes. `size` is not kept to: senders ask for 16 KiB, which would cost as much as sending."""
        if self._index == len(self._chunks):
            return b""
        chunk = self._chunks[self._index]
        piece = chunk[self._offset : self._offset + SLICE]
        self._offset += len(piece)
        if self._offset == len(chunk):
            self._index, self._offset = self._index + 1, 0
        return piece
