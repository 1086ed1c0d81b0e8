"""The queue: each key once, never twice at the same time, failures ever later, nothing lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from kompressor_operator.observed import Key
from kompressor_operator.work import RetryLater, WorkQueue

A, B = ("team", "a"), ("team", "b")


def queue_of(handle: Callable[[Key], Awaitable[float | None]], initial: float = 0.01, maximum: float = 0.05) -> WorkQueue:
    return WorkQueue(handle, initial=initial, maximum=maximum, jitter=lambda: 0.5)


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not done():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_many_events_become_one_look() -> None:
    seen: list[Key] = []

    async def handle(key: Key) -> None:
        seen.append(key)

    queue = queue_of(handle)
    for _ in range(5):
        queue.add(A)
        queue.add(B)
    queue.start(2)
    await until(lambda: len(seen) == 2)
    await queue.stop(1)
    assert sorted(seen) == [A, B]


async def test_a_sweep_stands_behind_news_and_still_gets_its_turns() -> None:
    swept, news = [("team", f"old-{n}") for n in range(40)], [("team", f"new-{n}") for n in range(40)]
    seen: list[Key] = []

    async def handle(key: Key) -> None:
        seen.append(key)

    queue = queue_of(handle)
    for key in swept:
        queue.add(key, sweep=True)
    for key in news:
        queue.add(key)
    queue.add(swept[7])  # there is news of it now
    assert queue.depth == 80
    queue.start(1)
    await until(lambda: len(seen) == 80)
    await queue.stop(1)
    assert sorted(seen) == sorted(swept + news), "each once"
    assert [key for key in seen[:45] if key in news] == news, "news first, in order"
    assert seen.index(swept[7]) < 46 and [key for key in seen if key in swept and key != swept[7]] == swept[:7] + swept[8:]
    assert 3 <= sum(key in swept for key in seen[:40]) <= 5, "one turn in ten"


async def test_what_is_due_does_not_wait_for_the_sweep() -> None:
    others = [("team", f"old-{n}") for n in range(30)]
    seen: list[Key] = []

    async def handle(key: Key) -> None:
        seen.append(key)
        await asyncio.sleep(0.01)

    queue = queue_of(handle)
    queue.add_after(A, 0.03)
    for key in [*others, A]:
        queue.add(key, sweep=True)
    queue.start(1)
    await until(lambda: len(seen) >= 31)
    await queue.stop(1)
    assert seen.index(A) < 15


async def test_a_key_is_never_in_work_twice_and_an_event_meanwhile_is_not_lost() -> None:
    running, most, runs, finish = 0, 0, 0, asyncio.Event()

    async def handle(_: Key) -> None:
        nonlocal running, most, runs
        running, runs = running + 1, runs + 1
        most = max(most, running)
        await finish.wait()
        running -= 1

    queue = queue_of(handle)
    queue.start(4)
    queue.add(A)
    await until(lambda: running == 1)
    for _ in range(3):
        queue.add(A)
    finish.set()
    await until(lambda: runs == 2 and running == 0)
    await asyncio.sleep(0.05)
    await queue.stop(1)
    assert (most, runs) == (1, 2)


async def test_failures_come_again_ever_later_and_success_forgets_them() -> None:
    runs, pauses = 0, list[float]()

    async def handle(_: Key) -> None:
        nonlocal runs
        runs += 1
        if runs < 6:
            raise RetryLater("not yet")

    queue = queue_of(handle, initial=0.02, maximum=0.1)
    later = queue.add_after

    def noted(key: Key, seconds: float) -> None:
        pauses.append(seconds)
        later(key, seconds)

    queue.add_after = noted  # type: ignore[method-assign]
    queue.start(1)
    queue.add(A)
    await until(lambda: runs == 6 and not queue._failures)
    await queue.stop(1)
    assert pauses == pytest.approx([0.02, 0.04, 0.08, 0.1, 0.1])


async def test_an_error_of_ours_is_logged_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    runs = 0

    async def handle(_: Key) -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            raise ZeroDivisionError

    queue = queue_of(handle)
    queue.start(1)
    queue.add(A)
    await until(lambda: runs == 2)
    await queue.stop(1)
    assert "ZeroDivisionError" in caplog.text


async def test_a_cancelled_helper_does_not_end_the_worker() -> None:
    """Kopf cancels every task that it takes for its own when it stops."""
    runs = 0

    async def handle(_: Key) -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            helper = asyncio.create_task(asyncio.sleep(1))
            helper.cancel()
            await helper

    queue = queue_of(handle)
    queue.start(1)
    queue.add(A)
    await until(lambda: runs == 2)
    assert queue.alive
    await queue.stop(1)


async def test_the_server_may_ask_for_a_longer_pause() -> None:
    runs = 0

    async def handle(_: Key) -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            raise RetryLater("busy", after=3600)

    queue = queue_of(handle)
    queue.start(1)
    queue.add(A)
    await until(lambda: A in queue._timers)
    assert runs == 1 and queue._timers[A].when() - asyncio.get_running_loop().time() > 3000
    queue.add(A)  # an event does not wait for the timer
    await until(lambda: runs == 2)
    await queue.stop(1)


async def test_look_again_after_a_while() -> None:
    runs = 0

    async def handle(_: Key) -> float | None:
        nonlocal runs
        runs += 1
        return 0.02 if runs < 3 else None

    queue = queue_of(handle)
    queue.start(1)
    queue.add(A)
    await until(lambda: runs == 3)
    await asyncio.sleep(0.05)
    await queue.stop(1)
    assert runs == 3


async def test_stopping_lets_work_under_way_finish_and_starts_none() -> None:
    begun: list[Key] = []
    done: list[Key] = []

    async def handle(key: Key) -> None:
        begun.append(key)
        await asyncio.sleep(0.05)
        done.append(key)

    queue = queue_of(handle)
    queue.start(1)
    queue.add(A)
    await until(lambda: begun == [A])
    queue.add(B)
    await queue.stop(60)
    assert begun == done == [A]


async def test_stopping_does_not_wait_for_ever() -> None:
    begun = asyncio.Event()

    async def handle(_: Key) -> None:
        begun.set()
        await asyncio.sleep(3600)

    queue = queue_of(handle)
    queue.start(1)
    queue.add(A)
    await begun.wait()
    async with asyncio.timeout(60):
        await queue.stop(0.05)
