"""Trouble that lasts for a while: an API server that refuses, fails, forgets to answer, watches that break or fall silent, conflicts, two
operators, clocks an hour off. Several jobs live through each at once, and end as if the sky were blue.

Seeds 1 to $SEEDS, of which the usual run has one.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from scenarios import SCENARIOS
from scene import Scene, Theatre

pytestmark = pytest.mark.cluster

SEEDS = range(1, 1 + int(os.environ.get("SEEDS", "1")))
LIVES = ("preflight", "out of memory", "suspended", "queued and suspended", "deletion policy", "time to live", "corrupt")
"""What is played in each storm, side by side."""
PAUSING = ("killed",)
"""What waits by the clock, where it is the clock that storms."""
SHARE = 0.3
DESCRIPTORS = 200
"""Open in this process at most, however many storms there were."""
SECONDS = 8.0
"""Of a storm, unless everything is over before."""
Weather = Callable[[Scene, random.Random, threading.Event], None]
"""Makes it in one scene, until the event is set."""


def refusals(scene: Scene, chance: random.Random, over: threading.Event) -> None:
    """Too many requests, it says, and when to come back."""
    scene.proxy.answer(429, retry_after=1, share=SHARE, seed=chance.randrange(2**31))


def failures(scene: Scene, chance: random.Random, over: threading.Event) -> None:
    scene.proxy.answer(500, share=SHARE, seed=chance.randrange(2**31))


def lost_answers(scene: Scene, chance: random.Random, over: threading.Event) -> None:
    """The server does what it is asked, and says that it has failed."""
    scene.proxy.answer(500, share=SHARE, seed=chance.randrange(2**31), after=True)


def cut_watches(scene: Scene, chance: random.Random, over: threading.Event) -> None:
    while not over.wait(chance.uniform(0.3, 0.7)):
        scene.proxy.cut_watches()


def conflicts(scene: Scene, chance: random.Random, over: threading.Event) -> None:
    scene.proxy.conflict(share=0.5, seed=chance.randrange(2**31))


def slowness(scene: Scene, chance: random.Random, over: threading.Event) -> None:
    scene.proxy.delay = 0.3


def silence(scene: Scene, chance: random.Random, over: threading.Event) -> None:
    """Watches stay open and tell nothing, now and then. The kubelet restarts an operator whose probe says so."""
    while not over.wait(chance.uniform(1.0, 2.0)):
        scene.proxy.stall_watches()
        over.wait(chance.uniform(2.0, 12.0))
        scene.proxy.stall_watches(False)


def two_of_it(scene: Scene, chance: random.Random, over: threading.Event) -> None:
    """Another operator beside it, which comes and goes."""
    while not over.is_set():
        with scene.nursery.operator(scene.stage, None, scene.clock, **scene.settings):
            over.wait(chance.uniform(1.0, 3.0))


def deaths(scene: Scene, chance: random.Random, over: threading.Event) -> None:
    """SIGKILL again and again, also while it starts."""
    while not over.wait(chance.uniform(0.2, 2.0)):
        assert scene.operator is not None
        if scene.operator.process.poll() is None:
            scene.operator.stop(signal.SIGKILL)
        scene.operator = scene.nursery.start(scene.stage, scene.proxy, scene.clock, **scene.settings)


def clock_jumps(scene: Scene, chance: random.Random, over: threading.Event) -> None:
    """An hour forth, an hour back, by what the server's answers say."""
    while not over.wait(chance.uniform(0.2, 1.5)):
        scene.proxy.skew = chance.choice((-3600.0, 0.0, 3600.0))


STORMS: dict[str, Weather] = {
    "429": refusals,
    "500": failures,
    "answers lost": lost_answers,
    "watches cut": cut_watches,
    "watches silent": silence,
    "conflicts": conflicts,
    "slow": slowness,
    "two operators": two_of_it,
    "killed again and again": deaths,
    "clock jumps": clock_jumps,
}


@contextmanager
def storm(scene: Scene, weather: Weather, chance: random.Random) -> Iterator[None]:
    over = threading.Event()
    trouble: list[BaseException] = []

    def blow() -> None:
        try:
            weather(scene, chance, over)
        except BaseException as error:
            trouble.append(error)

    wind, lull = threading.Thread(target=blow), threading.Timer(SECONDS, lambda: (over.set(), scene.proxy.calm()))
    wind.start(), lull.start()
    try:
        yield
    finally:
        lull.cancel()
        over.set()
        wind.join()
        scene.proxy.calm()
    assert not trouble, trouble


@contextmanager
def kubelet(scene: Scene) -> Iterator[None]:
    """Starts the operator anew when it has ended, or when its liveness probe has failed three times."""
    over, failed = threading.Event(), 0

    def look() -> None:
        nonlocal failed
        while not over.wait(0.5):
            running = scene.operator
            assert running is not None
            if running.process.poll() is None:
                failed = failed + 1 if running.ready() and running.probe("/healthz") != 200 else 0
                if failed < 3:
                    continue
                running.stop(signal.SIGKILL)
            failed = 0
            scene.operator = scene.nursery.start(scene.stage, scene.proxy, scene.clock, **scene.settings)

    keeper = threading.Thread(target=look)
    keeper.start()
    try:
        yield
    finally:
        over.set()
        keeper.join()


def live_through(theatre: Theatre, name: str, weather: Weather, seed: str) -> str:
    """What is wrong with how it ended, if anything."""
    try:
        with theatre.scene(relist_seconds="5", stale_seconds="5") as scene:
            scene.raise_operator()
            scenario = SCENARIOS[name]
            keeper = kubelet(scene) if weather is silence else storm(scene, lambda *_: None, random.Random())
            with keeper, storm(scene, weather, random.Random(seed)):
                scenario.begin(scene)
                scenario.end(scene)
            scene.witness.check_events()
            if scene.operator is not None and scene.operator.process.poll() is not None:
                scene.raise_operator()
            if scene.witness.job("play"):
                assert scene.witness.reason("play") == scenario.ends
                scene.strike()
                scene.witness.until(lambda: not scene.witness.job("play"), what="the resource is gone")
            theatre.swept({scene.stage.namespace})
        return ""
    except Exception as error:
        return f"{name}, seed {seed}: {error}"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", STORMS)
def test_every_life_ends_as_it_must(name: str, seed: int, theatre: Theatre) -> None:
    began, lives = time.monotonic(), LIVES + (PAUSING if STORMS[name] is clock_jumps else ())
    with ThreadPoolExecutor(len(lives)) as pool:
        wrong = [said for said in pool.map(lambda life: live_through(theatre, life, STORMS[name], f"{seed} {life}"), lives) if said]
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    print(f"{name}, seed {seed}: {len(lives)} lives in {time.monotonic() - began:.0f} s; {descriptors} descriptors open")
    assert not wrong, "\n".join(wrong)
    assert descriptors < DESCRIPTORS, "what storms open is closed after them"
