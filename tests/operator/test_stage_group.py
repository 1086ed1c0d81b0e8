"""Pods that train together, on real nodes: how they find one another, what a lost one costs, how they are stopped."""

from __future__ import annotations

from typing import Any

import pytest
from stage import SUCCEED, Operator, Stage, eventually

from kompressor_api import names

pytestmark = pytest.mark.cluster

MEET = "until getent hosts $KOMPRESSOR_LEADER; do sleep 0.1; done"
UNIT = (
    "S=/var/run/secrets/kubernetes.io/serviceaccount; unit() { "
    'curl -s --cacert $S/ca.crt -H "Authorization: Bearer $(cat $S/token)" '
    f"https://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT/apis/{names.API_VERSION}/namespaces/$POD_NAMESPACE/{names.PLURAL}/$PLAY "
    '| sed -n \'s/.*"unit": *"\\([a-z]*\\)".*/\\1/p\'; }'
)
"""A line of shell after which `unit` prints the test's last cue."""
TRAIN = 'trap "exit 75" TERM; while :; do sleep 0.05; done'


def group(stage: Stage, *script: str, name: str = "play", **spec: Any) -> str:
    passes = [{"rtn": {"scheme": "W8A8", "ignore": list(script)}}, {"distil": {}}]
    return stage.play(name=name, passes=passes, worker={"parallelism": 2}, **spec)


def on_cue(cue: str, follower: str, leader: str) -> str:
    """What each of them does at that cue; at `go` they train, and the leader is done."""
    ends = f"[ $JOB_COMPLETION_INDEX = 0 ] && {{ {leader}; }}; {follower}"
    goes = f"[ $JOB_COMPLETION_INDEX = 0 ] && {{ {SUCCEED}; }}; {TRAIN}"
    return f"while :; do case $(unit) in {cue}) {ends};; go) {goes};; esac; sleep 0.2; done"


def running(stage: Stage, uid: str) -> list[dict[str, Any]]:
    """Pods of a job that run, once there are two."""

    def both() -> list[dict[str, Any]] | None:
        found = [pod for pod in stage.pods(uid) if pod["status"]["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"]]
        return found if len(found) == 2 else None

    return eventually(both)


def test_a_pod_that_fails_counts_once_and_the_group_goes_on(stage: Stage, operator: Operator) -> None:
    """In place, and as a next attempt: the others end for it, or are stopped for it."""
    crashes = group(stage, MEET, UNIT, on_cue("fail", "exit 1", "exit 76"), name="crashes", retry={"limit": 1})
    killed = group(stage, MEET, UNIT, on_cue("fail", "exit 137", TRAIN), name="killed", retry={"limit": 1})
    for name, uid in (("crashes", crashes), ("killed", killed)):
        hosts = {pod["spec"]["hostname"] for pod in running(stage, uid)}
        assert hosts == {f"{stage.jobs(uid)[0]['metadata']['name']}-{index}" for index in (0, 1)}
        stage.until("Compressing", name)
        eventually(lambda name=name: stage.message(name).startswith("2 of 2 pods work together"))
        stage.cue("fail", name)
    for name in ("crashes", "killed"):
        stage.until("Retrying", name)
        eventually(lambda name=name: "exit code 1" in stage.message(name) or "SIGKILL" in stage.message(name))
        stage.cue("go", name)
    status = stage.until("Completed", "crashes")
    (job,) = stage.jobs(crashes)
    assert (status["attempt"], status["retries"], status["failures"], job["status"]["failed"]) == (1, 1, 1, 1)
    assert status["result"]["ratio"] == "4.0x", "by the leader"
    assert {c["type"]: c["reason"] for c in job["status"]["conditions"]}["Complete"] == "SuccessPolicy", "its follower was still there"
    status = stage.until("Completed", "killed")
    first, _ = stage.jobs(killed)
    assert (status["attempt"], status["failures"]) == (2, 1), "though the Job controller has counted the one that it stopped"
    assert first["status"]["failed"] == 2
    for uid in (crashes, killed):
        (service,) = stage.list("services", f"{names.LABEL_JOB_UID}={uid}")
        assert service["spec"]["clusterIP"] == "None" and service["metadata"]["ownerReferences"][0]["uid"] == uid
    assert stage.events("crashes") == ["Compressing", "Retrying", "Compressing", "Completed"]


def test_a_group_is_stopped_and_goes_on_as_one(stage: Stage, operator: Operator) -> None:
    """By its user; and where a queue admits it, all of it at once."""
    uid = group(stage, MEET, UNIT, on_cue("none", TRAIN, TRAIN), retry={"limit": 0})
    queued = group(stage, MEET, UNIT, on_cue("none", TRAIN, TRAIN), name="queued", queueName="gpus")
    running(stage, uid)
    stage.until("Queued", "queued")
    (job,) = stage.jobs(queued)
    assert (job["spec"]["suspend"], job["spec"]["parallelism"], stage.pods(queued)) == (True, 2, [])
    stage.patch("jobs", job["metadata"]["name"], {"spec": {"suspend": False}})
    before = {pod["metadata"]["uid"] for pod in running(stage, uid)}
    (service,) = stage.list("services", f"{names.LABEL_JOB_UID}={uid}")
    stage.delete("services", service["metadata"]["name"])
    stage.patch("compressionjobs", "play", {"spec": {"retry": {"limit": 1}}})
    eventually(lambda: stage.list("services", f"{names.LABEL_JOB_UID}={uid}"))
    stage.patch("compressionjobs", "play", {"spec": {"suspend": True}})
    stage.until("Suspended")
    eventually(lambda: not stage.pods(uid))
    stage.cue("go", "queued")
    stage.cue("go")
    stage.patch("compressionjobs", "play", {"spec": {"suspend": False}})
    status = stage.until("Completed")
    assert (status["attempt"], status["retries"], status["failures"]) == (1, 0, 0)
    assert not before & {pod["metadata"]["uid"] for pod in stage.pods(uid)}
    stage.until("Completed", "queued")
