"""What may go wrong around the operator: it is killed, there are two of it, the API server goes away, names are taken."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter

import pytest
from stage import GO_ON, HELD, SUCCEED, Operator, Stage, eventually

from kompressor_api import names
from kompressor_operator.manifests import job_name
from kompressor_operator.observed import CompressionJob

pytestmark = pytest.mark.cluster


def test_killed_at_any_moment_it_neither_doubles_nor_forgets(stage: Stage) -> None:
    """SIGKILL at eight random moments while jobs come in; each must get its five children once, and end."""
    chance, jobs = random.Random(20260102), dict[str, str]()
    for life in range(8):
        with stage.operator() as running:
            for number in range(2):
                name = f"play-{life}-{number}"
                jobs[name] = stage.play(HELD, "held end", SUCCEED, name=name)  # one that ended before would need no more children
            time.sleep(chance.uniform(0.0, 0.7))
            running.stop(signal.SIGKILL)
    with stage.operator():
        for name, uid in jobs.items():
            stage.cue("end", name)
            stage.until("Completed", name)
            assert len(stage.jobs(uid)) == 1, name
            kinds = Counter(child["metadata"]["name"] for child in stage.children(uid))
            assert len(kinds) == 3 and max(kinds.values()) == 4, kinds  # four of one name, the Job, the pod


def test_two_operators_at_once_are_harmless(stage: Stage) -> None:
    """Every change of the status (but Pending) is told once, by the one of the two that made it; which there are is a matter of timing."""
    since = stage.version("compressionjobs")
    with stage.operator() as one, stage.operator() as other:
        jobs = {f"play-{n}": stage.play(SUCCEED, name=f"play-{n}", ttlSecondsAfterFinished=3600) for n in range(12)}
        jobs["oom"] = stage.play('[ "$KOMPRESSOR_MEMORY_PLAN" = 1 ] || exit 71', SUCCEED, name="oom")
        for name, uid in jobs.items():
            stage.until("Completed", name)
            assert len(stage.jobs(uid)) == (2 if name == "oom" else 1)
        for running in (one, other):
            running.stop()  # what they still have to tell is told
            assert [entry for entry in running.entries if entry["level"] == "error"] == []
            assert running.said("event lost") == []
    changes = stage.changes(since)
    for name in jobs:
        assert sorted(stage.events(name)) == sorted(reason for reason in changes[name] if reason != "Pending"), name
        assert changes[name][-1] == "Completed" and changes[name].count("Completed") == 1


def test_a_restart_changes_nothing(stage: Stage) -> None:
    with stage.operator():
        uid = stage.play(GO_ON)
        stage.until("Compressing")
    before = stage.get("compressionjobs", "play")
    with stage.operator() as again:
        time.sleep(1.5)
        assert stage.get("compressionjobs", "play") == before, "a status that is right is not written again"
        assert len(stage.jobs(uid)) == 1
        assert again.stop() < 30, "the chart's grace period"
        made = str(again.said("stopping")[0]["detail"])
        assert "POST" not in made and "PATCH" not in made, made


def test_an_end_that_came_while_the_operator_was_down_is_told(stage: Stage) -> None:
    with stage.operator():
        uid = stage.play(HELD, "held end", SUCCEED, ttlSecondsAfterFinished=0)
        stage.until("Compressing")
    stage.cue("end")
    eventually(lambda: stage.jobs(uid)[0].get("status", {}).get("succeeded"))
    time.sleep(1)
    assert stage.jobs(uid), "without the TTL on it the Job waits for us, however long"
    with stage.operator():
        stage.until("Completed")
        eventually(lambda: not stage.jobs(uid))
        time.sleep(0.5)
        assert stage.jobs(uid) == [] and stage.reason() == "Completed"


def test_the_api_server_goes_away_and_comes_back(stage: Stage, operator: Operator) -> None:
    stage.play("sleep 0.1", SUCCEED, name="before")
    stage.until("Completed", "before")
    stage.cluster.stop_component("kube-apiserver")
    time.sleep(3)
    assert operator.probe("/healthz") == 200, "a restart would not bring the API server back"
    stage.cluster.start_component("kube-apiserver")
    stage.play(SUCCEED, name="after")
    stage.until("Completed", "after")
    assert operator.process.poll() is None and operator.probe("/readyz") == 200


def test_a_node_that_is_lost_is_named_and_nothing_is_forced(stage: Stage, operator: Operator) -> None:
    """The node's agent is frozen. It is the only node, so Kubernetes takes the fault for its own and evicts nothing; the truth is told."""
    uid = stage.play(GO_ON)
    pod = stage.acting(uid)
    agent = stage.cluster.processes["node-1"].pid
    os.kill(agent, signal.SIGSTOP)
    try:
        stage.until("NodeLost")
        assert "node-1" in stage.message() and "out-of-service" in stage.message()
        assert [p["metadata"]["uid"] for p in stage.pods(uid)] == [pod["metadata"]["uid"]], "no second worker beside it"
    finally:
        os.kill(agent, signal.SIGCONT)
        eventually(lambda: not stage.api.call("GET", "/api/v1/nodes/node-1")["spec"].get("taints"))
    stage.until("Compressing")
    assert stage.status()["retries"] == 0, "a lost node is nobody's failure"


def test_all_namespaces_is_the_default(stage: Stage) -> None:
    with stage.operator(namespaces=""):
        stage.play(SUCCEED)
        stage.until("Completed")


def test_a_name_that_is_taken_is_said_and_cured_by_itself(stage: Stage) -> None:
    uid = stage.play(SUCCEED)
    body = stage.get("compressionjobs", "play")
    assert body["metadata"]["uid"] == uid
    name = job_name(CompressionJob.parse(body), 1)
    pod = {"restartPolicy": "Never", "containers": [{"name": "x", "image": "x"}]}
    stage.create("jobs", {"metadata": {"name": name}, "spec": {"suspend": True, "template": {"spec": pod}}})
    with stage.operator():
        stage.until("NameConflict")
        assert name in stage.message() and "kubectl" in stage.message()
        assert stage.conditions()["Reconciling"] == "True"
        stage.delete("jobs", name, propagationPolicy="Background")
        stage.until("Completed")


def test_a_stranger_who_writes_the_status_is_put_right(stage: Stage, operator: Operator) -> None:
    stage.play(GO_ON)
    stage.until("Compressing")
    wrong = {"conditions": [{"type": "Ready", "status": "True", "reason": "X", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}
    stage.patch("compressionjobs", "play", {"status": wrong}, sub="status")
    stage.until("Compressing")
    assert stage.conditions() == {"Ready": "False", "Reconciling": "True", "Validated": "True"}


def test_someone_elses_job_with_our_label_is_left_alone(stage: Stage, operator: Operator) -> None:
    uid = stage.play(GO_ON)
    stage.until("Compressing")
    pod = {"restartPolicy": "Never", "containers": [{"name": "x", "image": "x"}]}
    labels = {names.LABEL_JOB_UID: uid, names.LABEL_ATTEMPT: "9"}
    stage.create("jobs", {"metadata": {"name": "stranger", "labels": labels}, "spec": {"suspend": True, "template": {"spec": pod}}})
    stage.patch("compressionjobs", "play", {"spec": {"retry": {"limit": 7}}})
    eventually(lambda: stage.status()["observedGeneration"] == 2)  # it has been looked at since
    assert stage.status()["attempt"] == 1 and stage.reason() == "Compressing"
    assert stage.get("jobs", "stranger")["spec"].get("ttlSecondsAfterFinished") is None
