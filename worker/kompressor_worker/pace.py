"""A unit's source bytes, told piece by piece while it is worked on: progress moves inside a block, and a signal is heard there."""

from __future__ import annotations

from collections.abc import Callable


class Pace:
    """Splits `total` bytes over about `expected` of work, in any unit; the pieces add up to `total` exactly, however wrong that was."""

    def __init__(self, total: int, expected: float, tell: Callable[[int], None]) -> None:
        """`tell` is called with bytes that are newly done, often 0; what it raises (Terminated) goes through."""
        self._total, self._expected, self._tell = total, expected, tell
        self._work, self._told = 0.0, 0

    def __call__(self, work: float) -> None:
        """So much more is done."""
        self._work += work
        share = min(1.0, self._work / self._expected) if self._expected else 0.0
        self._advance(int(self._total * share))

    def finish(self) -> None:
        """All of it is done."""
        self._advance(self._total)

    def _advance(self, done: int) -> None:
        fresh, self._told = done - self._told, done
        self._tell(fresh)


def unheard(nbytes: int) -> None:
    """For whoever has nobody to tell."""
