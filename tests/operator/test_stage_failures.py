"""How attempts fail, on real nodes: every class of failures, what is nobody's fault, and deadlines."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from math import ceil
from typing import Any

import pytest
from stage import GO_ON, HELD, SUCCEED, Operator, Stage, eventually

from kompressor_api.failures import FAILURES, KILLED, Failure, Retry
from kompressor_api.names import ExitCode

pytestmark = pytest.mark.cluster

EATS = "x = []\nwhile True: x.append(bytearray(1 << 20))"


def test_every_class_of_failures_is_told_and_real_want_of_memory_cured(stage: Stage, operator: Operator) -> None:
    """All at once. What is killed, but not for memory, has to wait for ten seconds and has a test of its own."""
    cases: dict[str, tuple[Failure, str]] = {}
    for failure in FAILURES:
        for code in set(failure.codes) - {KILLED, ExitCode.TERMINATED, ExitCode.PEER_LOST}:
            cases[f"code-{code}"] = failure, stage.play(f"exit {code}", name=f"code-{code}", retry={"limit": 0})
    memory = {"limits": {"memory": "100Mi"}}
    eats = stage.play(f"[ $KOMPRESSOR_MEMORY_PLAN ] || exec python -c '{EATS}'", SUCCEED, name="eats", worker={"resources": memory})
    for name, (failure, uid) in cases.items():
        status = stage.until(str(failure.reason), name)
        smaller = failure.retry is Retry.SMALLER
        assert stage.conditions(name) == {"Ready": "False", "Validated": "True", "Stalled": "True", "Failed": "True"}
        assert failure.advice in stage.message(name), name
        eventually(lambda name=name, failure=failure: stage.events(name)[-1] == failure.reason)
        assert len(stage.jobs(uid)) == (3 if smaller else 1), name
        assert (status["memoryPlan"], status["failures"]) == ((2, 0) if smaller else (0, 1)), name
    status = stage.until("Completed", "eats")
    assert (status["attempt"], status["memoryPlan"], status["failures"]) == (2, 1, 0) and len(stage.jobs(eats)) == 2
    first, _ = sorted(stage.pods(eats), key=lambda pod: str(pod["metadata"]["name"]))
    assert first["status"]["containerStatuses"][0]["state"]["terminated"]["reason"] == "OOMKilled", "by the kubelet, not by its own word"


# ---- nobody's fault


@contextmanager
def urgent_pod(stage: Stage, resources: dict[str, Any]) -> Iterator[str]:
    """A pod that the scheduler makes room for. Gives its path.

    Its grace period is not 0: an API server forgets such a pod before the node has stopped it, and the next one finds its devices in use.
    """
    name = f"urgent-{uuid.uuid4().hex[:6]}"
    stage.cluster.apply({"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name}, "value": 1000})
    container = {"name": "c", "image": "worker:1", "command": ["sleep", "600"], "resources": resources}
    spec = {"priorityClassName": name, "terminationGracePeriodSeconds": 1, "restartPolicy": "Never", "containers": [container]}
    stage.cluster.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default"}, "spec": spec})
    path = f"/api/v1/namespaces/default/pods/{name}"
    try:
        yield path
    finally:
        stage.api.call("DELETE", path)
        stage.api.call("DELETE", f"/apis/scheduling.k8s.io/v1/priorityclasses/{name}")


def evict(stage: Stage, pod: str) -> None:
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": stage.namespace}}
    stage.api.call("POST", stage.path("pods", pod, "eviction"), body)


STUBBORN = (HELD, "trap 'exit 65' TERM; echo acting; held end", SUCCEED)
"""Goes on until its cue, and ends with a final code when it is stopped before."""


def completes_again(stage: Stage, name: str, uid: str, before: dict[str, Any]) -> dict[str, Any]:
    """A new pod of the same Job runs, and completes the job; nothing has been counted. Returns that pod."""
    pod = stage.acting(uid, after=before["metadata"]["uid"])
    stage.until("Compressing", name)
    stage.cue("end", name)
    status = stage.until("Completed", name)
    assert (status["attempt"], status["retries"], status["failures"], len(stage.jobs(uid))) == (1, 0, 0, 1), name
    return pod


def test_eviction_and_preemption_are_nobodys_failure(stage: Stage, operator: Operator) -> None:
    """Workers that end with a final code when they are stopped, and may not fail even once: only what came from outside excuses them.

    Lost nodes: test_stage_held_up.py.
    """
    gpu = {"limits": {"nvidia.com/gpu": "1"}}
    with stage.node("node-2", "--capacity=nvidia.com/gpu=1"):
        workers = {"evicted": {}, "preempted": {"resources": gpu}}
        jobs = {name: stage.play(*STUBBORN, name=name, worker=worker, retry={"limit": 0}) for name, worker in workers.items()}
        before = {name: stage.acting(uid) for name, uid in jobs.items()}
        evict(stage, before["evicted"]["metadata"]["name"])
        with urgent_pod(stage, gpu) as urgent:
            stage.until("Unschedulable", "preempted")  # its next pod waits
            eventually(lambda: stage.api.call("GET", urgent)["status"]["phase"] == "Running")
        for name in jobs:
            completes_again(stage, name, jobs[name], before[name])


# ---- deadlines


def took(job: dict[str, Any]) -> int:
    end = next(c["lastTransitionTime"] for c in job["status"]["conditions"] if c["type"] == "Failed")
    return ceil((datetime.fromisoformat(end) - datetime.fromisoformat(job["status"]["startTime"])).total_seconds())


def test_a_deadline_holds_while_the_operator_is_down_and_over_all_attempts(stage: Stage) -> None:
    with stage.operator():
        runs = stage.play(GO_ON, name="runs", activeDeadlineSeconds=3)
        fails = stage.play("exit 74", name="fails", activeDeadlineSeconds=5)  # the next pod would come after ten seconds
        twice = stage.play("[ $KOMPRESSOR_MEMORY_PLAN ] || { sleep 1; exit 71; }", GO_ON, name="twice", activeDeadlineSeconds=15)
        eventually(lambda: stage.status("runs").get("jobName") and stage.status("fails").get("jobName") and stage.jobs(twice))
        eventually(lambda: stage.jobs(fails)[0]["status"].get("failed"))
    for uid in (runs, fails):
        eventually(lambda uid=uid: any(c["type"] == "Failed" for c in stage.jobs(uid)[0]["status"].get("conditions", [])))
    with stage.operator() as again:
        for name in ("runs", "fails", "twice"):
            stage.until("DeadlineExceeded", name)
            assert "raise spec.activeDeadlineSeconds" in stage.message(name) and stage.conditions(name)["Failed"] == "True"
        first, second = stage.jobs(twice)
        assert second["spec"]["activeDeadlineSeconds"] == 15 - took(first)
        again.stop()  # what it has to tell is told
    assert stage.events("twice")[-1] == "DeadlineExceeded"
