"""What is wrong with the children of a namespace, by the warnings told about them: one question for all who ask.

The API server keeps events without an index or a cache, so for those about one object it reads all of the namespace's: ten seconds where
thousands of jobs come at once, for each job whose pod is late. So one answer serves everybody who asks about that kind of child, nobody
waits for it but whoever has asked first, and the longer it took the later it is asked for again.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from kompressor_operator.cluster import Cluster
from kompressor_operator.decide import Involved
from kompressor_operator.observed import Warned
from kompressor_operator.troubles import CREATION_REASONS, MOUNT_REASONS

FRESH_SECONDS = 1.0
"""An answer is good for so long at least,"""
PAUSE = 10.0
"""and for so many times as long as it took to come."""
FORGET_SECONDS = 600.0
SOON_SECONDS = 3.0
"""Whoever comes while nothing is known yet comes again after this."""
_SOUGHT = CREATION_REASONS | MOUNT_REASONS


@dataclass
class _Board:
    """About one kind of child in one namespace."""

    told: dict[str, tuple[Warned, ...]] | None = None
    """uid -> its warnings, newest first; None before the first answer."""
    since: float | None = None
    """When it was asked for, while the answer is awaited."""
    due: float = 0.0
    """When it may be asked for again."""


@dataclass
class Bulletin:
    clock: Callable[[], float] = time.monotonic
    chance: Callable[[], float] = random.random
    _boards: dict[tuple[str, str], _Board] = field(default_factory=dict)

    async def about(self, cluster: Cluster, namespace: str, child: Involved) -> tuple[Warned, ...] | float:
        """Warnings about this child, newest first; or seconds after which to ask again. Raises ApiError."""
        board = self._boards.setdefault((namespace, child.kind), _Board())
        if board.since is None and self.clock() >= board.due:
            await self._ask(board, cluster, namespace, child.kind)
        if board.told is not None:
            return board.told.get(child.uid, ())
        wait = self.clock() - board.since if board.since is not None else board.due - self.clock()
        return max(SOON_SECONDS, wait) * (1.0 + self.chance())

    async def _ask(self, board: _Board, cluster: Cluster, namespace: str, kind: str) -> None:
        began = board.since = self.clock()
        try:
            found: dict[str, list[Warned]] = defaultdict(list)
            for event in await cluster.warnings(namespace, kind):
                warned = Warned.parse(event)
                if warned.reason in _SOUGHT:
                    found[event["involvedObject"].get("uid", "")].append(warned)
            board.told = {uid: tuple(sorted(about, key=lambda warned: warned.seen, reverse=True)) for uid, about in found.items()}
        finally:
            now, board.since = self.clock(), None
            board.due = now + max(FRESH_SECONDS, PAUSE * (now - began))
            self._boards = {
                place: kept for place, kept in self._boards.items() if kept.since is not None or now - kept.due < FORGET_SECONDS
            }
