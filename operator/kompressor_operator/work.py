"""A work queue like client-go's: each key at most once, never twice at the same time, failures with a growing delay.

Level-based: a key says "look again", never what happened, so nothing is lost if many events become one. Looking at everything again (a
sweep) stands behind what there is news of, and gets one turn in ten: thousands of jobs that are done do not keep one that waits.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable

from kompressor_operator.observed import Key

log = logging.getLogger(__name__)

SWEEP_TURN = 10
"""One key in so many is taken from the sweep while there is news."""


class RetryLater(Exception):
    """Raised by a reconcile that wants to be called again: after its backoff, or not before `after` seconds."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


class WorkQueue:
    """Keys waiting, in work, and due later. `handle` gets one key at a time; an exception means again, later."""

    def __init__(
        self,
        handle: Callable[[Key], Awaitable[float | None]],
        *,
        initial: float,
        maximum: float,
        jitter: Callable[[], float] = random.random,
        waited: Callable[[float], None] = lambda seconds: None,
        looked: Callable[[str, float], None] = lambda outcome, seconds: None,
    ) -> None:
        self._handle = handle
        self._waited, self._looked = waited, looked
        self._initial, self._maximum, self._jitter = initial, maximum, jitter
        self._ready: deque[Key] = deque()
        self._sweep: dict[Key, None] = {}
        """In the order in which they came."""
        self._turns = 0
        self._waiting: dict[Key, float] = {}
        self._working: set[Key] = set()
        self._dirty: set[Key] = set()
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._failures: dict[Key, int] = {}
        self._wake = asyncio.Semaphore(0)
        self._stopping = False
        self._workers: list[asyncio.Task[None]] = []

    def add(self, key: Key, sweep: bool = False) -> None:
        """Look at this one as soon as possible; `sweep`: because all are looked at."""
        if self._stopping:
            return
        if key in self._waiting:
            if not sweep and key in self._sweep:
                del self._sweep[key]
                self._ready.append(key)
            return
        if key in self._working:
            self._dirty.add(key)
            return
        self._waiting[key] = time.monotonic()
        if sweep:  # a timer stays: it is news when it is due
            self._sweep[key] = None
        else:
            self._cancel_timer(key)
            self._ready.append(key)
        self._wake.release()

    def add_after(self, key: Key, seconds: float) -> None:
        """Look at this one later; the earlier of two wins."""
        if self._stopping:
            return
        loop = asyncio.get_running_loop()
        timer = self._timers.get(key)
        if timer is not None and timer.when() <= loop.time() + seconds:
            return
        self._cancel_timer(key)
        self._timers[key] = loop.call_later(seconds, self._due, key)

    def start(self, workers: int) -> None:
        self._workers = [asyncio.create_task(self._work(), name=f"reconcile-{n}") for n in range(workers)]

    async def stop(self, grace: float) -> None:
        """No new work; what is under way may finish within the grace period."""
        self._stopping = True
        for key in list(self._timers):
            self._cancel_timer(key)
        for _ in self._workers:
            self._wake.release()
        if self._workers:
            _, late = await asyncio.wait(self._workers, timeout=grace)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def tries(self, key: Key) -> int:
        """How often this one has failed since it last succeeded."""
        return self._failures.get(key, 0)

    @property
    def depth(self) -> int:
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """All workers are still there; one that died would slow the others down unseen."""
        return bool(self._workers) and not any(task.done() for task in self._workers)

    async def _work(self) -> None:
        while True:
            await self._wake.acquire()
            if self._stopping:
                return
            key = self._next()
            self._waited(time.monotonic() - self._waiting.pop(key))
            self._working.add(key)
            try:
                await self._once(key)
            finally:
                self._working.discard(key)
                if key in self._dirty:
                    self._dirty.discard(key)
                    self.add(key)

    def _next(self) -> Key:
        self._turns = (self._turns + 1) % SWEEP_TURN
        if self._ready and (self._turns or not self._sweep):
            return self._ready.popleft()
        key = next(iter(self._sweep))
        del self._sweep[key]
        return key

    async def _once(self, key: Key) -> None:
        began, outcome = time.monotonic(), "ok"
        try:
            again = await self._handle(key)
        except RetryLater as wish:
            outcome = "retry"
            self._retry(key, str(wish), wish.after)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            outcome = "retry"
            self._retry(key, "cancelled from outside", 0.0)  # a task that it waited for, not this worker
        except Exception:
            outcome = "error"
            log.exception("reconciling %s/%s", *key, extra={"namespace": key[0], "job": key[1]})
            self._retry(key, "unexpected error", 0.0)
        else:
            self._failures.pop(key, None)
            if again is not None:
                self.add_after(key, again)
        self._looked(outcome, time.monotonic() - began)

    def _retry(self, key: Key, why: str, at_least: float) -> None:
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        delay = min(self._maximum, self._initial * 2 ** min(failures, 30)) * (0.5 + self._jitter())
        delay = max(delay, at_least)
        log.info("%s/%s again in %.2fs: %s", *key, delay, why, extra={"namespace": key[0], "job": key[1]})
        self.add_after(key, delay)

    def _due(self, key: Key) -> None:
        self._timers.pop(key, None)
        self.add(key)

    def _cancel_timer(self, key: Key) -> None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
