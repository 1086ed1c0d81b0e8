"""An operator whose machine has the wrong time: ages are told from the time stamps of the API server, so its clock counts."""

from __future__ import annotations

from datetime import datetime

import pytest
from scenarios import CLEANED, SAY, acting
from scene import Scene, Theatre
from stage import HELD

pytestmark = pytest.mark.cluster

SLOW_TO_STOP = (HELD, SAY, "trap 'sleep 3; exit 75' TERM", "acting; while :; do sleep 0.05; done")


def ended(scene: Scene) -> list[str]:
    """Reasons of the events about the clean-up."""
    said = [event["reason"] for event in scene.witness.ever["events"].values()]
    return [reason for reason in said if reason in ("CleanedUp", "CleanupFailed")]


@pytest.mark.parametrize("hours", [-1, 1], ids=["behind", "ahead"])
def test_a_clock_that_is_an_hour_off_changes_nothing(hours: int, theatre: Theatre) -> None:
    """Ahead, a worker that is being stopped would pass for one on a lost node, and its clean-up for overdue; behind, neither ever would."""
    with theatre.scene() as scene:
        scene.clock.set(3600.0 * hours)
        scene.raise_operator()
        scene.play(*SLOW_TO_STOP, deletionPolicy="Delete", output={"uri": CLEANED})
        acting(scene)
        job = scene.witness.job("play")
        stamps = job["metadata"]["creationTimestamp"], job["status"]["startTime"]
        created, started = map(datetime.fromisoformat, stamps)
        assert abs((started - created).total_seconds()) < 600, stamps
        scene.strike()
        scene.witness.until(lambda: not scene.witness.job("play"), what="the resource is gone")
        (cleanup,) = scene.witness.children("jobs", scene.uid, step="cleanup", ever=True)
        gone = scene.witness.ever["compressionjobs"][scene.uid]["metadata"]["deletionTimestamp"]
        waited = datetime.fromisoformat(cleanup["metadata"]["creationTimestamp"]) - datetime.fromisoformat(gone)
        assert waited.total_seconds() >= 2, "the worker takes three seconds to commit, and two on one output would be one too many"
        assert scene.witness.until(lambda: ended(scene), what="the clean-up is told") == ["CleanedUp"]
