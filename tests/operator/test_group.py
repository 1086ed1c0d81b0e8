"""Pods that train together: the Job and the Service that make them a group, and what the status says of several pods at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from kcj_builders import NOW, SETTINGS, ago, child, complete, condition, failed, judge, kcj, pod

from kompressor_api import names
from kompressor_api.names import Reason
from kompressor_operator import manifests
from kompressor_operator.conditions import Verdict
from kompressor_operator.decide import Decision
from kompressor_operator.endings import ending_of
from kompressor_operator.manifests import Attempt
from kompressor_operator.observed import ChildJob, CompressionJob, Manifest
from kompressor_operator.pods import ChildPod

WORKER = {"parallelism": 2}
RUNNING = {"jobName": "llama-1", "attempt": 1}


def trained(name: str = "llama", **spec: Any) -> CompressionJob:
    return kcj(name, **({"passes": [{"distil": {}}], "worker": WORKER} | spec))


def job_of(job: CompressionJob, number: int = 1) -> Manifest:
    return manifests.worker_job(job, Attempt(number), SETTINGS)


def env_of(job: Manifest) -> dict[str, str]:
    container = job["spec"]["template"]["spec"]["containers"][0]
    return {entry["name"]: entry.get("value", "") for entry in container["env"]}


def verdict_of(decision: Decision) -> Verdict:
    assert decision.verdict is not None
    return decision.verdict


def going(**fields: Any) -> ChildJob:
    return child(pods=2, **fields)


def both(leader: dict[str, Any] | None = None, other: dict[str, Any] | None = None) -> tuple[ChildPod, ChildPod]:
    return pod(suffix="0", index=0, **(leader or {})), pod(suffix="1", index=1, **(other or {}))


def test_a_group_is_an_indexed_job_that_has_succeeded_when_its_leader_has() -> None:
    spec = job_of(trained())["spec"]
    assert (spec["parallelism"], spec["completions"], spec["completionMode"]) == (2, 2, "Indexed")
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    assert spec["backoffLimit"] == 4 and spec["backoffLimitPerIndex"] >= 100, "all pods together are what retry.limit counts"
    (ignored,) = [rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"][1:2]]
    assert ignored == [75, 76]
    assert ChildJob.parse(job_of(trained()) | {"metadata": _stored(job_of(trained()))}).pods == 2


def test_one_pod_is_what_it_always_was() -> None:
    for worker in ({}, {"parallelism": 1}):
        job = trained(worker=worker)
        made = job_of(job)
        assert not {"completionMode", "backoffLimitPerIndex", "successPolicy"} & made["spec"].keys()
        assert "subdomain" not in made["spec"]["template"]["spec"] and names.LABEL_GROUP not in made["metadata"]["labels"]
        assert not {names.ENV_PODS, names.ENV_LEADER, names.ENV_PORT} & env_of(made).keys()
        assert "Service" not in {one["kind"] for one in manifests.supports(job)}


@pytest.mark.parametrize("name", ["llama", "8b.distil.v2", "x" * 253])
def test_the_pods_find_their_leader_by_a_name_that_dns_takes(name: str) -> None:
    job = trained(name)
    (service,) = [one for one in manifests.supports(job) if one["kind"] == "Service"]
    made = job_of(job, 100)
    template, host = made["spec"]["template"], f"{made['metadata']['name']}-255"
    named = service["metadata"]["name"]
    assert template["spec"]["subdomain"] == named and named[0].isalpha() and "." not in named and len(named) <= 63
    assert "." not in host and len(host) <= 63 - len("-abcde"), "of a pod, whose host name it is without the suffix"
    assert env_of(made)[names.ENV_LEADER] == f"{made['metadata']['name']}-0.{named}"
    assert (env_of(made)[names.ENV_PODS], env_of(made)[names.ENV_PORT]) == ("2", "29500")
    spec = service["spec"]
    assert spec["clusterIP"] == "None" and spec["publishNotReadyAddresses"] is True
    assert spec["selector"].items() <= template["metadata"]["labels"].items()
    assert template["metadata"]["labels"][names.LABEL_GROUP] == "2"
    assert service["metadata"]["ownerReferences"] == made["metadata"]["ownerReferences"]


@pytest.mark.parametrize(
    ("worker", "processes"),
    [
        ({}, "1"),
        ({"processesPerPod": 3}, "3"),
        ({"resources": {"limits": {"nvidia.com/gpu": 8}}}, "8"),
        ({"resources": {"limits": {"nvidia.com/gpu": 8}}, "processesPerPod": 2}, "2"),
        ({"podTemplate": {"spec": {"containers": [{"name": "worker", "resources": {"limits": {"nvidia.com/gpu": 4}}}]}}}, "4"),
    ],
)
def test_a_process_for_each_gpu_unless_it_is_said(worker: dict[str, Any], processes: str) -> None:
    assert env_of(job_of(trained(worker=worker)))[names.ENV_PROCESSES_PER_POD] == processes


def test_nothing_is_said_of_processes_where_nothing_is_trained() -> None:
    limits = {"resources": {"limits": {"nvidia.com/gpu": 8}}}
    assert names.ENV_PROCESSES_PER_POD not in env_of(job_of(kcj(worker=limits)))


def test_training_asks_for_the_gpu_that_the_operator_knows() -> None:
    made = manifests.worker_job(trained(), Attempt(), replace(SETTINGS, worker_gpu_resource="nvidia.com/gpu"))
    assert made["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 1}


def test_a_pod_template_does_not_take_the_group_apart() -> None:
    env = [{"name": name, "value": "theirs"} for name in (names.ENV_LEADER, names.ENV_POD_INDEX, names.ENV_GROUP_PATIENCE)]
    theirs = {"spec": {"subdomain": "elsewhere", "containers": [{"name": "worker", "env": env}]}}
    made = job_of(trained(worker={**WORKER, "podTemplate": theirs}))
    assert made["spec"]["template"]["spec"]["subdomain"] != "elsewhere"
    assert env_of(made)[names.ENV_LEADER] != "theirs" and names.ENV_POD_INDEX not in env_of(made), "which the Job controller sets"
    assert env_of(made)[names.ENV_GROUP_PATIENCE] == "theirs"


def test_all_of_them_work() -> None:
    verdict = verdict_of(judge(trained(status=RUNNING), going(failed=1), *both()))
    assert verdict.reason == Reason.COMPRESSING
    assert verdict.message == "2 of 2 pods work together, pod llama-1-0 on node node-1 leads (attempt 1, after 1 failed)"


def test_the_name_by_which_they_meet_is_kept() -> None:
    """Whatever its pods do: those that train have met, and one that is started again has not."""
    job = trained(status=RUNNING)
    for pods in (both(), both(other={"phase": "Pending", "node": ""}), ()):
        (kept,) = judge(job, going(), *pods, warnings=[]).keep
        assert kept == manifests.service(job)
    assert judge(job, going(failing="PodFailurePolicy"), *both()).keep == ()
    assert judge(trained(status=RUNNING, worker={}), child(), pod()).keep == ()


def test_those_that_have_nothing_left_to_train_are_not_missed() -> None:
    verdict = verdict_of(judge(trained(status=RUNNING), going(), *both(other={"exit": 0})))
    assert verdict.reason == Reason.COMPRESSING and verdict.message.startswith("1 of 2 pods work together")


@pytest.mark.parametrize("other", [{"deletion_due": NOW}, {"exit": 75}])
def test_those_that_are_stopped_once_the_leader_is_through_are_no_news(other: dict[str, Any]) -> None:
    verdict = verdict_of(judge(trained(status=RUNNING), going(), *both(leader={"exit": 0}, other=other)))
    assert verdict.reason == Reason.COMPRESSING


@pytest.mark.parametrize(
    ("other", "reason", "says"),
    [
        ({"phase": "Pending", "node": "", "unschedulable": "0/3 nodes are available"}, Reason.UNSCHEDULABLE, "pod llama-1-1: 0/3 nodes"),
        ({"phase": "Pending", "waiting_reason": "ImagePullBackOff"}, Reason.IMAGE_PULL_FAILED, "pod llama-1-1: the image"),
        ({"phase": "Pending", "node": ""}, Reason.PENDING, "pod llama-1-1 waits for a node"),
        ({"silent": True}, Reason.NODE_LOST, "pod llama-1-1: its node node-1 does not answer"),
        ({"deletion_due": NOW}, Reason.RETRYING, "pod llama-1-1 is being stopped"),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_the_one_that_is_worst_off_is_told_about(other: dict[str, Any], reason: Reason, says: str, swapped: bool) -> None:
    pods = both(leader=other) if swapped else both(other=other)
    verdict = verdict_of(judge(trained(status=RUNNING), going(), *pods, warnings=[]))
    assert verdict.reason == reason
    assert says.replace("llama-1-1", "llama-1-0" if swapped else "llama-1-1") in verdict.message


def test_a_lost_pod_is_told_about_and_not_those_that_ended_for_it() -> None:
    killed = pod(suffix="1", index=1, exit=1, at=ago(3))
    stopped = pod(suffix="0", index=0, exit=76, at=ago(2))
    verdict = verdict_of(judge(trained(status=RUNNING), going(failed=1), killed, stopped))
    assert verdict.reason == Reason.RETRYING and "pod llama-1-1 crashed with exit code 1" in verdict.message
    back = pod(suffix="0b", index=0, created=ago(1))
    verdict = verdict_of(judge(trained(status=RUNNING), going(failed=1), killed, stopped, back))
    assert verdict.reason == Reason.RETRYING and "pod llama-1-1 crashed" in verdict.message, "until that one is back too"


def test_a_pod_that_cannot_be_made_is_told_about() -> None:
    warnings = [("FailedCreate", 'pods "llama-1-1-x" is forbidden: exceeded quota: small')]
    verdict = verdict_of(judge(trained(status=RUNNING), going(), pod(suffix="0", index=0, created=ago(50)), warnings=warnings))
    assert verdict.reason == Reason.QUOTA_EXCEEDED


def test_the_leader_speaks_for_a_group_that_is_complete() -> None:
    said = '{"reason": "Completed", "message": "done", "summary": {"ratio": "2.0x"}}'
    pods = both({"exit": 0, "said": said, "at": ago(9)}, {"exit": 0, "said": '{"message": "not mine"}', "at": ago(1)})
    verdict = verdict_of(judge(trained(status=RUNNING), complete(pods=2), *pods))
    assert verdict.message == "done" and verdict.facts["result"] == {"ratio": "2.0x"}


def test_whoever_failed_of_its_own_speaks_for_a_group_that_gave_up() -> None:
    pods = (pod(suffix="1", index=1, exit=74, said="no answer", at=ago(5)), pod(suffix="0", index=0, exit=76, at=ago(1)))
    assert ending_of(failed(reason="BackoffLimitExceeded", pods=2), pods).reason == Reason.STORAGE_FAILED


def test_those_that_are_stopped_with_a_group_do_not_count() -> None:
    """The Job controller counts every pod that it stops for the one that failed the Job."""
    message = "Container worker for pod team/llama-1-1 failed with exit code 137 matching FailJob rule at index 3"
    killed = pod(suffix="1", index=1, exit=137, at=ago(200))
    one = failed(pods=8, failed=8, ended_message=message, ended_at=killed.finished_at)
    decision = judge(trained(status=RUNNING, worker={"parallelism": 8}), one, killed)
    assert decision.start is not None and decision.start.failures_before == 1
    verdict = verdict_of(judge(trained(status=RUNNING, worker={"parallelism": 8}, retry={"limit": 0}), one, killed))
    assert verdict.phase == "Failed" and "gave up after 1 failures" in verdict.message and verdict.facts["retries"] == 1


def test_one_pod_out_of_memory_makes_the_next_attempt_smaller_for_all() -> None:
    message = "Container worker for pod team/llama-1-1 failed with exit code 71 matching FailJob rule at index 3"
    short = pod(suffix="1", index=1, exit=71)
    decision = judge(trained(status=RUNNING), failed(pods=2, failed=2, ended_message=message), short)
    assert decision.start is not None and (decision.start.memory_plan, decision.start.failures_before) == (1, 0)


def test_the_next_attempt_waits_for_every_pod_of_the_one_before() -> None:
    message = "Container worker for pod team/llama-1-1 failed with exit code 137 matching FailJob rule at index 3"
    before = failed(pods=2, ended_message=message)
    pods = (pod(suffix="1", index=1, exit=137), pod(suffix="0", index=0, silent=True), pod(suffix="0c", index=2))
    verdict = verdict_of(judge(trained(status=RUNNING), before, *pods))
    assert verdict.reason == Reason.NODE_LOST and "llama-1-0" in verdict.message, "whichever is the newest"


def test_all_of_a_group_is_stopped() -> None:
    job = trained(status=RUNNING | {"conditions": [condition("Suspended")]}, suspend=True)
    verdict = verdict_of(judge(job, going(), *both(other={"deletion_due": NOW})))
    assert verdict.reason == Reason.SUSPENDED and "pod llama-1-1 commits its last block and stops" in verdict.message


def _stored(made: Manifest) -> Manifest:
    return {**made["metadata"], "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"}
