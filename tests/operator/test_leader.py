"""Who leads: one of several, judged by what each has seen change and never by the times in the Lease."""

from __future__ import annotations

import asyncio
import copy
from typing import Any, cast

import pytest

from kompressor_operator.cluster import ApiError, Cluster
from kompressor_operator.leader import Leader, LeaseLost
from kompressor_operator.observed import Manifest


class FakeLeases:
    """One Lease with the API server's rules: a version that every write moves and must know. `away`: nobody answers."""

    def __init__(self) -> None:
        self.body: Manifest | None = None
        self.version = 0
        self.away = False
        self.lose_answer = False

    async def get(self, kind: str, namespace: str, name: str) -> Manifest:
        self._reach()
        if self.body is None:
            raise ApiError("reading", 404, "NotFound", "")
        return copy.deepcopy(self.body)

    async def create(self, body: Manifest) -> Manifest:
        self._reach()
        if self.body is not None:
            raise ApiError("creating", 409, "AlreadyExists", "")
        return self._store(body)

    async def replace(self, body: Manifest) -> Manifest:
        self._reach()
        if self.body is None:
            raise ApiError("replacing", 404, "NotFound", "")
        if body["metadata"]["resourceVersion"] != self.body["metadata"]["resourceVersion"]:
            raise ApiError("replacing", 409, "Conflict", "")
        return self._store(body)

    def _reach(self) -> None:
        if self.away:
            raise ApiError("asking", 0, "TimeoutError", "no answer")

    def _store(self, body: Manifest) -> Manifest:
        self.version += 1
        self.body = copy.deepcopy(body)
        self.body["metadata"]["resourceVersion"] = str(self.version)
        if self.lose_answer:
            raise ApiError("writing", 0, "TimeoutError", "no answer")
        return copy.deepcopy(self.body)

    @property
    def holder(self) -> str:
        return str((self.body or {}).get("spec", {}).get("holderIdentity"))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def leases() -> FakeLeases:
    return FakeLeases()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def candidate(leases: FakeLeases, clock: Clock, identity: str, **fields: Any) -> Leader:
    return Leader(cast(Cluster, leases), "system", "lease", identity, clock=clock, **fields)


async def tries(leader: Leader) -> bool:
    return await leader._try(1.0)


async def test_the_first_takes_it_and_the_second_waits(leases: FakeLeases, clock: Clock) -> None:
    one, two = candidate(leases, clock, "one"), candidate(leases, clock, "two")
    assert await tries(one) and not await tries(two)
    assert one.leading and not two.leading and leases.holder == "one"
    for _ in range(20):  # renewed again and again, it stays its own
        clock.now += 2
        assert await tries(one) and not await tries(two)


async def test_another_takes_over_only_when_it_saw_nothing_change_for_the_duration(leases: FakeLeases, clock: Clock) -> None:
    one, two = candidate(leases, clock, "one"), candidate(leases, clock, "two")
    await tries(one)
    clock.now += 1000  # however old: `two` has only just seen it
    assert not await tries(two)
    clock.now += one.duration - 0.1
    assert not await tries(two) and not one.leading, "who does not renew stops before another may start"
    clock.now += 0.2
    assert await tries(two) and leases.holder == "two"
    assert leases.body and leases.body["spec"]["leaseTransitions"] == 1
    assert not await tries(one), "seen anew: it is another's"


async def test_times_in_the_lease_decide_nothing(leases: FakeLeases, clock: Clock) -> None:
    """A clock that is an hour ahead or behind: renewTime is for people."""
    one, two = candidate(leases, clock, "one"), candidate(leases, clock, "two")
    await tries(one)
    assert leases.body
    for renewed in ("2999-01-01T00:00:00.000000Z", "1970-01-01T00:00:00.000000Z"):
        leases.body["spec"]["renewTime"] = renewed
        leases.version += 1
        leases.body["metadata"]["resourceVersion"] = str(leases.version)
        assert not await tries(two)
        clock.now += two.duration - 1
        assert not await tries(two), "a change was seen: somebody is alive"
    clock.now += two.duration
    assert await tries(two), "nothing changed since: nobody is, whatever the time says"


async def test_a_lease_that_is_let_go_is_taken_at_once(leases: FakeLeases, clock: Clock) -> None:
    one, two = candidate(leases, clock, "one"), candidate(leases, clock, "two")
    await tries(one)
    assert not await tries(two)
    await one.release()
    assert not one.leading and await tries(two)
    await one.release()
    assert leases.holder == "two", "who has it no more lets nothing go"


async def test_a_lease_that_cannot_be_renewed_is_lost_before_another_may_take_it(leases: FakeLeases, clock: Clock) -> None:
    one = candidate(leases, clock, "one", retry=0.01)
    await tries(one)
    holding = asyncio.create_task(one.hold())
    leases.away = True
    clock.now += one.renew - 0.1
    await asyncio.sleep(0.1)
    assert not holding.done() and one.leading, "an API server that is away for seconds ends nobody"
    clock.now += 0.2
    assert not one.leading
    with pytest.raises(LeaseLost, match="system/lease could not be renewed"):
        await asyncio.wait_for(holding, 5)
    assert one.renew < one.duration


async def test_an_outage_that_ends_in_time_is_survived(leases: FakeLeases, clock: Clock) -> None:
    one = candidate(leases, clock, "one", retry=0.01)
    await tries(one)
    holding = asyncio.create_task(one.hold())
    for lose in (False, True):  # not reached; and reached, but the answer is lost, so that the version is one that it does not know
        leases.away, leases.lose_answer = not lose, lose
        clock.now += one.renew - 0.5
        await asyncio.sleep(0.05)
        leases.away = leases.lose_answer = False
        await asyncio.sleep(0.1)
        clock.now += one.renew - 0.5
        assert one.leading and not holding.done()
        await asyncio.sleep(0.1)
    holding.cancel()


async def test_one_that_slept_while_another_took_it_has_lost_it(leases: FakeLeases, clock: Clock) -> None:
    one, two = candidate(leases, clock, "one", retry=0.01), candidate(leases, clock, "two")
    await tries(one)
    assert not await tries(two)
    clock.now += one.duration
    assert not one.leading, "known at once after waking, without asking: that is what fences its writes"
    assert await tries(two)
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(one.hold(), 5)
    assert leases.holder == "two"


async def test_of_two_that_try_at_once_one_wins(leases: FakeLeases, clock: Clock) -> None:
    both = [candidate(leases, clock, "one"), candidate(leases, clock, "two")]
    assert sorted(await asyncio.gather(*map(tries, both))) == [False, True]
    clock.now += 100
    await asyncio.gather(*map(tries, both))
    assert [leader.leading for leader in both].count(True) == 1
