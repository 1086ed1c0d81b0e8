"""What time it is by the API server, whose time stamps ages are told from.

The machine's clock may be an hour off, or jump: then what was just created would be overdue, and what is overdue would never be.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

__all__ = ["ServerClock", "utc_now"]


def utc_now() -> datetime:
    """By the machine's clock."""
    return datetime.now(UTC)


class ServerClock:
    """The machine's clock as it was at first, then a clock that cannot jump, put right by each answer's Date.

    A Date has whole seconds and was written at some time between question and answer, so it says only that the server's clock is between
    two values. Ours is moved no further than into that range: one that was right is left alone.
    """

    def __init__(self, wall: Callable[[], datetime] = utc_now, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._ahead = wall().timestamp() - monotonic()

    def __call__(self) -> datetime:
        return datetime.fromtimestamp(self._ahead + self._monotonic(), UTC)

    def heard(self, date: str | None, asked: float) -> None:
        """An answer's Date (RFC 9110, 5.6.7), and when it was asked for, by `monotonic`. Nothing happens for one that cannot be read."""
        try:
            told = parsedate_to_datetime(date or "").timestamp()
        except ValueError:
            return
        earliest, latest = told - self._monotonic(), told + 1 - asked
        self._ahead = min(max(self._ahead, earliest), latest)
