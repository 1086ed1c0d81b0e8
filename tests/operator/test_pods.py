"""Containers beside the worker's, from statuses as a kubelet writes them: what is told of those that are in its way, and of no others."""

from __future__ import annotations

from typing import Any

import pytest
from kcj_builders import UID, ago, child, complete, failed, judge, kcj

from kompressor_api import names
from kompressor_api.failures import ADVICE
from kompressor_api.names import Reason
from kompressor_operator.conditions import Verdict
from kompressor_operator.object_meta import stamp
from kompressor_operator.pods import JOB_NAME_LABEL, ChildPod

Object = dict[str, Any]

QUEUED: Object = {"waiting": {"reason": "PodInitializing"}}
RUNS: Object = {"running": {"startedAt": stamp(ago(30))}}
PULL = 'failed to pull and unpack image "docker.io/library/nowhere:9": not found'


def waits(reason: str, message: str = "") -> Object:
    return {"waiting": {"reason": reason, "message": message}}


def ended(code: int, message: str = "", reason: str = "Error", at: float = 5) -> Object:
    told = {"exitCode": code, "reason": reason if code else "Completed", "startedAt": stamp(ago(30)), "finishedAt": stamp(ago(at))}
    return {"terminated": told | ({"message": message} if message else {}) | {"containerID": "containerd://4b1d"}}


def seen(name: str, state: Object, last: Object | None = None, started: bool = False) -> Object:
    image = {"image": "registry/x:1", "imageID": ""}
    return {
        "name": name,
        **image,
        "ready": False,
        "started": started,
        "restartCount": int(bool(last)),
        "state": state,
        "lastState": last or {},
    }


def pod(worker: Object = QUEUED, *inits: Object, phase: str = "Pending", beside: tuple[Object, ...] = (), **fields: Any) -> ChildPod:
    """Init containers called `proxy` are sidecars: restarted always, awaited until they have started."""
    specs = [{"name": one["name"], **({"restartPolicy": "Always"} if one["name"] == "proxy" else {})} for one in inits]
    labels = {names.LABEL_JOB_UID: UID, JOB_NAME_LABEL: "llama-1", names.LABEL_STEP: "compress"}
    meta = {"namespace": "team", "name": "llama-1-a", "uid": "p", "resourceVersion": "20", "labels": labels}
    status: Object = {"phase": phase, "conditions": [{"type": "PodScheduled", "status": "True"}]}
    status["containerStatuses"] = [*beside, seen("worker", worker)]
    if inits:
        status["initContainerStatuses"] = list(inits)
    meta |= {"creationTimestamp": stamp(ago(50))} | fields.pop("metadata", {})
    return ChildPod.parse({"metadata": meta, "spec": {"nodeName": "node-1", "initContainers": specs}, "status": status | fields})


def told(*pods: ChildPod, **fields: Any) -> Verdict:
    verdict = judge(kcj(), child(**fields), *pods).verdict
    assert verdict is not None
    return verdict


@pytest.mark.parametrize(
    ("state", "reason", "said"),
    [
        (waits("ErrImagePull", PULL), "ImagePullFailed", PULL),
        (waits("ImagePullBackOff", f'Back-off pulling image "nowhere:9": ErrImagePull: {PULL}'), "ImagePullFailed", PULL),
        (waits("CreateContainerConfigError", 'secret "hub" not found'), "SecretMissing", 'secret "hub" not found'),
        (waits("CreateContainerConfigError", 'configmap "hub" not found'), "ContainerNotStarted", 'configmap "hub" not found'),
    ],
)
def test_what_keeps_a_container_beside_the_workers_from_starting(state: Object, reason: str, said: str) -> None:
    """An init container that has its turn, a sidecar, and one beside a worker that runs: the pod stays Pending with each."""
    done = seen("first", ended(0))
    for who, one in (
        ("init container fetch", pod(QUEUED, done, seen("fetch", state), seen("later", QUEUED))),
        ("sidecar proxy", pod(QUEUED, done, seen("proxy", state))),
        ("container logs", pod(RUNS, beside=(seen("logs", state),))),
    ):
        verdict = told(one)
        assert (verdict.phase, verdict.reason) == ("Pending", reason)
        assert verdict.message.startswith(f"pod llama-1-a: {who}: ") and said in verdict.message
        assert verdict.message.endswith(ADVICE[Reason(reason)]) and "Back-off" not in verdict.message


def test_a_sidecar_that_crashes_before_the_worker_is_told_once_and_in_the_same_words() -> None:
    """Its states alternate for as long as that lasts, and each other text would be a write."""
    last = ended(3, "no license\n")
    loop = waits("CrashLoopBackOff", "back-off 10s restarting failed container=proxy")
    states = [(last, None), (loop, last), (RUNS, last)]
    first, *others = [told(pod(QUEUED, seen("proxy", state, before))) for state, before in states]
    assert (first.phase, first.reason) == ("Pending", "ContainerFailed")
    assert "sidecar proxy ended with exit code 3; it said last: no license; read its log" in first.message
    assert others == [first, first]


def test_a_sidecar_beside_a_running_worker_is_its_own_affair() -> None:
    """It is restarted there, and the exit code with which it is stopped in the end says nothing of the job."""
    alone = told(pod(RUNS, phase="Running"))
    last = ended(3)
    for state, before, started in ((RUNS, None, True), (waits("CrashLoopBackOff"), last, False), (last, None, False)):
        assert told(pod(RUNS, seen("proxy", state, before, started), phase="Running")) == alone
    stopped = seen("proxy", ended(143, at=0))
    done = judge(kcj(), complete(), pod(ended(0), stopped, phase="Succeeded"))
    assert done.verdict and done.verdict.reason == "Completed"
    broken = judge(kcj(), failed(), pod(ended(65), stopped, phase="Failed"))
    assert broken.verdict and broken.verdict.reason == "CorruptSource"


def test_an_init_container_that_runs_is_named_and_nobody_asks_for_events() -> None:
    decision = judge(kcj(), child(), pod(QUEUED, seen("fetch", RUNS)))
    assert decision.look is None and decision.again_after is None
    assert decision.verdict and decision.verdict.reason == "Pending"
    assert "the worker waits for init container fetch, which runs" in decision.verdict.message


def test_an_init_container_that_failed_is_told_after_the_first_pod_and_in_the_end() -> None:
    """No rule of the Job looks at its exit code, be it one that the worker's has a meaning for: it counts, and the next pod follows."""
    one = pod(QUEUED, seen("fetch", ended(65, "curl: (6) could not resolve hub")), seen("later", QUEUED), phase="Failed")
    words = "pod llama-1-a: init container fetch ended with exit code 65; it said last: curl: (6) could not resolve hub; read its log"
    between = judge(kcj(), child(failed=1), one)
    assert between.verdict and (between.verdict.phase, between.verdict.reason) == ("Retrying", "Retrying")
    assert between.verdict.message.startswith(words) and between.verdict.message.endswith("; the next pod follows")
    assert between.again_after == 25, "counted from its end"
    last = judge(kcj(), failed(reason="BackoffLimitExceeded", failed=5), one)
    assert last.verdict and (last.verdict.phase, last.verdict.reason) == ("Failed", "ContainerFailed") and last.start is None
    assert last.verdict.message.startswith(f"gave up after 5 failures (spec.retry.limit 4): {words}")
    killed = told(pod(QUEUED, seen("fetch", ended(137, reason="OOMKilled")), phase="Failed"), failed=1)
    assert "init container fetch was killed because it used more memory than its limit" in killed.message


def test_a_container_that_fails_the_pod_of_a_worker_that_succeeded() -> None:
    """Without it the job would fail with the reason Completed."""
    one = pod(ended(0), beside=(seen("logs", ended(2)),), phase="Failed")
    decision = judge(kcj(), failed(reason="BackoffLimitExceeded", failed=5), one)
    assert decision.verdict and (decision.verdict.phase, decision.verdict.reason) == ("Failed", "ContainerFailed")
    assert "container logs ended with exit code 2" in decision.verdict.message
    own = judge(kcj(), failed(), pod(ended(65), beside=(seen("logs", ended(2)),), phase="Failed"))
    assert own.verdict and own.verdict.reason == "CorruptSource", "where the worker failed too, it has the word"


def test_a_container_that_goes_on_after_the_worker_is_named_after_a_while() -> None:
    def verdict(at: float, *beside: Object, worker: int = 0) -> tuple[str, str, float | None]:
        one = pod(ended(worker, at=at), beside=beside, phase="Running")
        decision = judge(kcj(), child(), one)
        assert decision.verdict
        return decision.verdict.reason, decision.verdict.message, decision.again_after

    assert verdict(4, seen("logs", RUNS))[::2] == ("Compressing", 6)
    for code in (0, 65):
        reason, said, _ = verdict(10, seen("done", ended(2)), seen("logs", RUNS), worker=code)
        assert reason == "ContainerLingers" and f"exit code {code}, and container logs still runs; end it, such as with" in said
    assert verdict(60, seen("logs", ended(0)))[::2] == ("Compressing", None), "the pod is about to end"
    running = judge(kcj(), child(), pod(RUNS, beside=(seen("logs", RUNS),), phase="Running")).verdict
    assert running and running.reason == "Compressing"


def test_a_pod_that_was_taken_away_while_it_initialised_is_not_its_containers_fault() -> None:
    stopped = seen("fetch", ended(143))
    deleted = pod(QUEUED, stopped, phase="Failed", metadata={"deletionTimestamp": stamp(ago(1))})
    assert "pod llama-1-a was removed before the worker ran" in told(deleted, failed=1).message
    disruption = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
    preempted = told(pod(QUEUED, stopped, phase="Failed", conditions=[disruption]))
    assert "ended without its worker: PreemptionByScheduler" in preempted.message and "fetch" not in preempted.message


def test_a_pod_that_the_kubelet_refused_says_why() -> None:
    """It has no container statuses at all."""
    why = "Pod was rejected: Allocate failed due to requested number of devices unavailable for nvidia.com/gpu. Requested: 1, Available: 0"
    made = {"creationTimestamp": stamp(ago(5))}
    refused = pod(phase="Failed", reason="UnexpectedAdmissionError", message=why, containerStatuses=None, metadata=made)
    assert f"pod llama-1-a ended without its worker: UnexpectedAdmissionError: {why}" in told(refused, failed=1).message
