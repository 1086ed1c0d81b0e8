"""Thousands of jobs that wait for a pod ask few questions, and none of them waits for the answer of another."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kompressor_operator.bulletin import FRESH_SECONDS, PAUSE, SOON_SECONDS, Bulletin
from kompressor_operator.cluster import ApiError
from kompressor_operator.decide import Involved


class Server:
    """Takes its time for an answer, on a clock of its own."""

    def __init__(self) -> None:
        self.now, self.takes = 100.0, 0.0
        self.asked: list[tuple[str, str]] = []
        self.events: list[dict[str, Any]] = []
        self.answers = asyncio.Event()
        self.answers.set()
        self.away = False

    async def warnings(self, namespace: str, kind: str) -> list[dict[str, Any]]:
        self.asked.append((namespace, kind))
        await self.answers.wait()
        self.now += self.takes
        if self.away:
            raise ApiError("reading", 0, "TimeoutError", "no answer")
        return self.events


def warned(number: int, minute: int, reason: str = "FailedCreate") -> dict[str, Any]:
    return {
        "involvedObject": {"uid": f"job-{number}"},
        "reason": reason,
        "message": f"at {minute}",
        "lastTimestamp": f"2026-01-02T03:{minute:02}:00Z",
    }


@pytest.fixture
async def server() -> Server:
    return Server()


def told(bulletin: Bulletin, server: Any, number: int, kind: str = "Job", namespace: str = "team") -> Any:
    return bulletin.about(server, namespace, Involved(kind, f"llama-{number}", f"job-{number}"))


async def test_one_answer_serves_all_until_it_is_old(server: Server) -> None:
    """The longer it took, the longer it serves: the question costs the server at most a tenth of one connection's time."""
    bulletin = Bulletin(clock=lambda: server.now)
    server.events = [warned(1, 5), warned(2, 4), warned(1, 7), warned(1, 6, "BackoffLimitExceeded")]
    assert [event.message for event in await told(bulletin, server, 1)] == ["at 7", "at 5"]
    assert [len(await told(bulletin, server, number)) for number in range(1000)] == [0, 2, 1, *[0] * 997]
    assert server.asked == [("team", "Job")]
    await told(bulletin, server, 1, kind="Pod")
    await told(bulletin, server, 1, namespace="other")
    assert len(server.asked) == 3

    server.now, server.takes, server.events = server.now + FRESH_SECONDS, 8.0, []
    assert await told(bulletin, server, 1) == () and len(server.asked) == 4
    server.now += PAUSE * 8.0 - 0.1
    await told(bulletin, server, 1)
    assert len(server.asked) == 4
    server.now += 0.2
    await told(bulletin, server, 1)
    assert len(server.asked) == 5


async def test_nobody_waits_for_the_answer_of_another(server: Server) -> None:
    """What was told before holds until then; where nothing was, they come again one after the other."""
    bulletin = Bulletin(clock=lambda: server.now, chance=lambda: 0.5)
    server.answers.clear()
    first = asyncio.ensure_future(told(bulletin, server, 1))
    await asyncio.sleep(0)
    assert await told(bulletin, server, 2) == SOON_SECONDS * 1.5
    server.now += 10.0
    assert await told(bulletin, server, 2) == 10.0 * 1.5
    server.events = [warned(2, 5)]
    server.answers.set()
    assert await first == () and len(await told(bulletin, server, 2)) == 1

    server.now += 1000.0
    server.answers.clear()
    server.events = []
    again = asyncio.ensure_future(told(bulletin, server, 1))
    await asyncio.sleep(0)
    assert len(await told(bulletin, server, 2)) == 1
    server.answers.set()
    assert await again == () and await told(bulletin, server, 2) == ()


async def test_a_server_that_does_not_answer_is_left_in_peace(server: Server) -> None:
    bulletin = Bulletin(clock=lambda: server.now, chance=lambda: 0.0)
    server.away, server.takes = True, 15.0
    with pytest.raises(ApiError):
        await told(bulletin, server, 1)
    assert await told(bulletin, server, 2) == PAUSE * 15.0 and len(server.asked) == 1
    server.now, server.away = server.now + PAUSE * 15.0, False
    assert await told(bulletin, server, 2) == () and len(server.asked) == 2
