"""A queue and the user of a job, both with a hand on it. Kueue's module is not served here: the test does what Kueue does to a Job."""

from __future__ import annotations

import pytest
from stage import GO_ON, Operator, Stage, eventually

from kompressor_api import names

pytestmark = pytest.mark.cluster


def admit(stage: Stage, uid: str, admitted: bool = True) -> str:
    """Toggles the Job's suspend, as Kueue does. Returns the Job's name."""
    (job,) = stage.jobs(uid)
    name = str(job["metadata"]["name"])
    stage.patch("jobs", name, {"spec": {"suspend": not admitted}})
    return name


def exit_codes(stage: Stage, since: str) -> list[int]:
    """Of all workers that ended since that version of the pods."""
    codes: dict[str, int] = {}
    for event in stage.api.watch(stage.path("pods") + f"?watch=1&resourceVersion={since}&timeoutSeconds=1"):
        for container in event["object"]["status"].get("containerStatuses", ()):
            if "terminated" in container["state"]:
                codes[event["object"]["metadata"]["uid"]] = container["state"]["terminated"]["exitCode"]
    return list(codes.values())


def test_the_queue_admits_and_takes_back_and_the_user_stops_it(stage: Stage, operator: Operator) -> None:
    uid = stage.play(GO_ON, queueName="gpu")
    stage.until("Queued")
    assert stage.conditions() == {"Ready": "False", "Reconciling": "True", "Validated": "True"}
    assert "queue gpu" in stage.message() and "no Kueue" in stage.message() and stage.pods(uid) == []
    (job,) = stage.jobs(uid)
    assert job["metadata"]["labels"][names.QUEUE_LABEL] == "gpu" and job["spec"]["suspend"]
    first = admit(stage, uid)
    pod = stage.acting(uid)
    assert names.QUEUE_LABEL not in pod["metadata"]["labels"]
    stage.until("Compressing")

    since = stage.version("pods")
    admit(stage, uid, admitted=False)
    stage.until("Queued")
    eventually(lambda: not stage.pods(uid))
    assert exit_codes(stage, since) == [75], "it was told, and committed"
    assert admit(stage, uid) == first, "the same Job goes on"
    stage.acting(uid)
    stage.until("Compressing")

    since = stage.version("pods")
    stage.patch("compressionjobs", "play", {"spec": {"suspend": True}})
    stage.until("Suspended")
    eventually(lambda: not stage.jobs(uid) and not stage.pods(uid))
    assert exit_codes(stage, since) == [75] and stage.reason() == "Suspended"
    operator.stop()
    with stage.operator():  # nothing is remembered
        stage.patch("compressionjobs", "play", {"spec": {"suspend": False}})
        stage.until("Queued")
        (job,) = stage.jobs(uid)
        assert job["metadata"]["labels"][names.LABEL_ATTEMPT] == "2" and job["spec"]["suspend"]
        assert stage.status()["attempt"] == 2 and stage.conditions()["Suspended"] == "False"
        admit(stage, uid)
        stage.acting(uid)
        stage.until("Compressing")
        eventually(lambda: stage.events() == ["Queued", "Compressing", "Queued", "Compressing", "Suspended", "Queued", "Compressing"])
