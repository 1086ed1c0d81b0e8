"""An operator killed between any two of its API calls, in every scenario. Another one goes on at once, and the job ends as if nothing had
been.

The calls are not written down here: each scenario is played once undisturbed, and what the operator then asks for are the points. All that
outlives an operator is in the API server, so there is one point before the first call, and one after each call that has changed something
there: killed before the next one reaches the server, whichever that is, it has left the same behind. CHAOS_EVERY_SIDE=1 visits both sides
of every call, reads and refused ones too.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from calls import AFTER, BEFORE, Call, Point
from scenarios import SCENARIOS, Scenario
from scene import Scene, Theatre

pytestmark = pytest.mark.cluster

EVERY_SIDE = bool(os.environ.get("CHAOS_EVERY_SIDE"))
COMMON = ("POST configmaps", "POST serviceaccounts", "POST roles", "POST rolebindings", "POST events")
"""How every life begins: visited in one of them."""
TOGETHER = 8
"""Scenes that are played side by side; most of the time they wait."""
TRIES = 3
"""A status that comes together with another is one write less: a point that was not met is tried again."""
QUIET = 1.0
"""Seconds within which the last event of an end is told."""


def calls_of(theatre: Theatre, scenario: Scenario) -> list[Call]:
    """What an operator that lives asks for, in order."""
    with theatre.scene() as scene:
        scene.raise_operator()
        scenario.begin(scene)
        scenario.end(scene)
        threading.Event().wait(QUIET)
        scene.witness.check_events()
        return list(scene.proxy.calls)


def points_of(name: str, calls: list[Call]) -> list[Point]:
    if EVERY_SIDE:
        return [Point(call.what, call.turn, side) for call in calls for side in (BEFORE, AFTER)]
    changes = [call for call in calls if call.code < 300 and not call.what.startswith(("GET ", "LIST ", "DRY-RUN "))]
    points = [Point(calls[0].what, 1, BEFORE), *(Point(call.what, call.turn, AFTER) for call in changes)]
    return points if name == "life" else [point for point in points if not _as_in_any_life(name, point)]


def _as_in_any_life(name: str, point: Point) -> bool:
    """A recipe's ConfigMap is another one."""
    return point.turn == 1 and point.what in COMMON and not (name == "recipe" and point.what == "POST configmaps")


def killed_at(theatre: Theatre, scenario: Scenario, point: Point, namespaces: set[str]) -> bool:
    """Plays the scenario, with the operator killed there. Whether the point was met."""
    with theatre.scene() as scene:
        namespaces.add(scene.stage.namespace)
        scene.proxy.kill(point, scene.raise_operator().process.pid)
        over = threading.Event()
        successor = threading.Thread(target=take_over, args=(scene, over))
        successor.start()
        try:
            scenario.begin(scene)
            scenario.end(scene)
            met = scene.proxy.killed.wait(QUIET)
        finally:
            over.set()
            successor.join()
        threading.Event().wait(QUIET)  # whoever goes on has nothing more to do
        scene.witness.check_events()
        if scene.witness.job("play"):
            assert scene.witness.reason("play") == scenario.ends
            scene.strike()
            scene.witness.until(lambda: not scene.witness.job("play"), what="the resource is gone")
        return met


def take_over(scene: Scene, over: threading.Event) -> None:
    while not over.is_set() or scene.proxy.killed.is_set():
        if scene.proxy.killed.wait(0.05):
            scene.raise_operator()
            return


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_between_any_two_calls(name: str, theatre: Theatre) -> None:
    scenario, namespaces = SCENARIOS[name], set[str]()
    points = points_of(name, calls_of(theatre, scenario))

    def visit(point: Point) -> str:
        try:
            return "" if any(killed_at(theatre, scenario, point, namespaces) for _ in range(TRIES)) else f"not met: {point}"
        except Exception as error:
            return f"{point}: {error}"

    with ThreadPoolExecutor(TOGETHER) as pool:
        wrong = [said for said in pool.map(visit, points) if said]
    print(f"{name}: {len(points)} points")
    missed = [said for said in wrong if said.startswith("not met")]
    assert wrong == missed, "\n".join(said for said in wrong if said not in missed)
    assert len(points) >= 2 and len(missed) <= len(points) // 10, missed
    theatre.swept(namespaces)
