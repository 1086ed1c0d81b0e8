"""Reading a container's log back, as `kubectl logs` asks for it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.clock import epoch

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class LogQuery:
    """The options of the kubelet's containerLogs; `since` is seconds since the epoch."""

    follow: bool = False
    tail: int | None = None
    timestamps: bool = False
    limit_bytes: int | None = None
    since: float = 0.0

    @classmethod
    def parse(cls, query: dict[str, str], now: float) -> "LogQuery":
        """ValueError for a number that is none."""
        since = epoch(query["sinceTime"]) if "sinceTime" in query else 0.0
        if "sinceSeconds" in query:
            since = now - int(query["sinceSeconds"])
        number = {name: int(query[name]) if name in query else None for name in ("tailLines", "limitBytes")}
        return cls(
            query.get("follow") in ("true", "1"), number["tailLines"], query.get("timestamps") in ("true", "1"),
            number["limitBytes"], since,
        )  # fmt: skip


def read(file: Path, query: LogQuery, running: Callable[[], bool]) -> Iterator[bytes]:
    """The log in pieces. Follows until `running` says no and the rest is read; an empty piece means nothing new."""
    left = query.limit_bytes
    for line in _lines(file, query, running):
        text = _shown(line, query) if line else b""
        if left is not None:
            text = text[:left]
            left -= len(text)
        yield text
        if left == 0:
            return


def _lines(file: Path, query: LogQuery, running: Callable[[], bool]) -> Iterator[bytes]:
    while not file.exists():
        if not (query.follow and running()):
            return
        time.sleep(_POLL_SECONDS)
        yield b""
    with file.open("rb") as reader:
        if query.tail is not None:
            _seek_tail(reader, query.tail)
        rest = b""
        while True:
            alive = query.follow and running()  # asked before the read: what is written meanwhile is read below
            while data := reader.read(1 << 16):
                *lines, rest = (rest + data).split(b"\n")
                yield from lines
            if not alive:
                return
            yield b""
            time.sleep(_POLL_SECONDS)


def _seek_tail(reader, lines: int) -> None:  # type: ignore[no-untyped-def]
    """To the start of the last `lines` lines."""
    end = position = reader.seek(0, 2)
    found = 0
    while position > 0 and found <= lines:
        position = max(0, position - (1 << 16))
        reader.seek(position)
        block = reader.read(min(1 << 16, end - position))
        for offset in range(len(block) - 1, -1, -1):
            if block[offset] == 10:
                found += 1
                if found > lines:
                    reader.seek(position + offset + 1)
                    return
        end = position
    reader.seek(0)


def _shown(line: bytes, query: LogQuery) -> bytes:
    when, _, rest = line.partition(b" ")
    _, _, tagged = rest.partition(b" ")
    tag, _, text = tagged.partition(b" ")
    if query.since and epoch(when.decode()) < query.since:
        return b""
    end = b"" if tag == b"P" else b"\n"
    return (when + b" " if query.timestamps else b"") + text + end
