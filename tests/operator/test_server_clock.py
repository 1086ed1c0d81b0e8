"""Time by the API server: Dates have whole seconds and take a while to arrive, and the machine's clock may be anywhere."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from kompressor_operator.cluster import ApiError, Cluster
from kompressor_operator.server_clock import ServerClock

TRUTH = datetime(2026, 1, 2, 3, 4, 5, 900_000, tzinfo=UTC)


class World:
    """Time goes on by itself nowhere: `true` for the server, `mine` for a machine that is `off` by so many seconds."""

    def __init__(self, off: float) -> None:
        self.off, self.true, self.mine = off, TRUTH, 1000.0
        self.clock = ServerClock(lambda: self.true + timedelta(seconds=self.off), lambda: self.mine)

    def passes(self, seconds: float) -> None:
        self.true += timedelta(seconds=seconds)
        self.mine += seconds

    def asks(self, there: float = 0.01, back: float = 0.01) -> None:
        asked = self.mine
        self.passes(there)
        date = format_datetime(self.true.replace(microsecond=0), usegmt=True)
        self.passes(back)
        self.clock.heard(date, asked)

    @property
    def error(self) -> float:
        return (self.clock() - self.true).total_seconds()


@pytest.mark.parametrize("off", [0.0, 0.3, -0.3])
def test_a_clock_that_may_be_right_is_left_alone(off: float) -> None:
    world = World(off)
    for _ in range(20):
        world.asks(there=0.5, back=0.5)
        world.passes(0.05)
        assert world.error == pytest.approx(off, abs=1e-6)


@pytest.mark.parametrize("off", [3600.0, -3600.0, 5.0])
def test_one_answer_is_enough_and_more_are_better(off: float) -> None:
    world = World(off)
    world.asks()
    assert abs(world.error) <= 1.02
    for _ in range(100):
        world.passes(0.37)
        world.asks()
    assert abs(world.error) < 0.06


def test_between_answers_it_goes_on_whatever_the_machines_clock_does() -> None:
    world = World(3600.0)
    world.asks()
    before = world.error
    world.off = -86400.0
    world.passes(7200)
    assert world.error == pytest.approx(before, abs=1e-6)


@pytest.mark.parametrize("step", [3600.0, -3600.0])
def test_it_follows_a_server_whose_clock_is_put_right(step: float) -> None:
    world = World(0.0)
    world.asks()
    world.true += timedelta(seconds=step)
    world.asks(back=4.0)  # an answer that takes long says less, never something wrong
    assert abs(world.error) <= 5.02


@pytest.mark.parametrize("date", [None, "", "soon", "Fri, 99 Jan 2026 00:00:00 GMT"])
def test_what_is_no_date_changes_nothing(date: str | None) -> None:
    world = World(0.0)
    world.clock.heard(date, world.mine)
    assert world.error == pytest.approx(0.0, abs=1e-6)


async def test_every_answer_of_the_server_tells_and_no_refusal_of_a_gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = [("503 Service Unavailable", -86400), ("200 OK", 3600)]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        status, off = told.pop(0)
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=off), usegmt=True)
        writer.write(f"HTTP/1.1 {status}\r\nDate: {date}\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        config = {
            "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"}}],
            "users": [{"name": "u", "user": {"token": "secret"}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        }
        (tmp_path / "kubeconfig").write_text(json.dumps(config))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        async with await Cluster.connect(5, pool=1) as cluster:
            with pytest.raises(ApiError):
                await cluster.get("Pod", "a", "b")
            assert abs((cluster.now() - datetime.now(UTC)).total_seconds()) < 5
            await cluster.get("Pod", "a", "b")
            assert abs((cluster.now() - datetime.now(UTC)).total_seconds() - 3600) < 5
