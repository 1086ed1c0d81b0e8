"""deletionPolicy Delete: the finalizer first, the clean-up only after the worker, and in the end it goes whatever happened."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from kcj_builders import NOW, PASSES, SETTINGS, UID, ago, child, complete, condition, ended_status, failed, judge, kcj, pod

from kompressor_api import names
from kompressor_api.names import Step
from kompressor_operator.cleanup import cleanup_job, given_up
from kompressor_operator.decide import NOTHING, Decision, Involved, View
from kompressor_operator.observed import ChildJob, CompressionJob, Observed, ours
from kompressor_operator.pods import ChildPod

RUNNING = {"jobName": "llama-2", "attempt": 2, "phase": "Compressing", "conditions": [condition("Ready", "False", reason="Compressing")]}
OUTPUT = {"uri": "s3://models/llama-w4", "credentialsSecret": "results", "caBundle": {"configMap": "ca", "key": "store.pem"}}


def doomed(*finalizers: str, **fields: Any) -> CompressionJob:
    job = kcj(deleting=True, deletionPolicy="Delete", output=OUTPUT, **fields)
    return replace(job, finalizers=finalizers or (names.FINALIZER,))


def cleaning(**fields: Any) -> ChildJob:
    return replace(child(), name="llama-cleanup", uid="cleanup", step=Step.CLEANUP, **fields)


def said(message: str, code: int) -> Any:
    told = json.dumps({"reason": "X", "message": message, "exitCode": code})
    return replace(pod(exit=code, said=told), name="p", job="llama-cleanup", step=Step.CLEANUP)


@pytest.mark.parametrize(
    ("job", "wanted"),
    [
        (kcj(deletionPolicy="Delete"), True),
        (replace(kcj(deletionPolicy="Delete"), finalizers=(names.FINALIZER,)), None),
        (kcj(deletionPolicy="Retain"), None),
        (kcj(), None),
        (kcj(deletionPolicy="Delete", status=ended_status()), None),
    ],
)
def test_a_finalizer_is_put_on_before_the_first_child_and_only_for_delete(job: CompressionJob, wanted: bool | None) -> None:
    decision = judge(job)
    assert decision.finalizer is wanted
    if wanted:
        assert decision == Decision(finalizer=True), "nothing else is done in the same look"


def test_without_our_finalizer_nothing_is_done_about_a_deletion() -> None:
    assert judge(doomed("foregroundDeletion"), child(), pod()) == NOTHING
    assert judge(kcj(deleting=True), child(), pod()) == NOTHING


def test_the_worker_is_stopped_then_waited_for_then_comes_the_clean_up() -> None:
    job = doomed(status={"jobName": "llama-1"})
    preflight = replace(child(), name="llama-preflight", step=Step.PREFLIGHT)
    assert judge(job, child(), pod(), live=False).confirm, "what cannot be taken back is asked anew"
    assert judge(job, child(), pod()).deletes == (child(),)
    assert judge(job, child(), preflight, pod()).deletes == (child(), preflight)
    for children in ([child(deleting=True), pod()], [pod(deletion_due=NOW)], [failed(), pod()]):
        decision = judge(job, *children)
        assert decision.again_after and not decision.create and not decision.deletes, "two on one output, never"
    for children in ([complete(), pod(exit=0)], [], [failed()], [child(deleting=True)]):
        (made,) = judge(job, *children).create
        assert made["metadata"]["name"].endswith("-cleanup")


def test_a_pod_on_a_lost_node_is_not_waited_for() -> None:
    job = doomed(status={"jobName": "llama-1"})
    gone = pod(deletion_due=ago(60))
    assert judge(job, gone).create and judge(job, pod(silent=True)).create
    assert not judge(job, gone, pod(suffix="b")).create


def test_what_never_had_a_worker_has_nothing_to_clean_up() -> None:
    refused = {"conditions": [condition("Failed")], "observedGeneration": 1}
    assert judge(doomed(status=refused)) == Decision(finalizer=False)
    assert judge(doomed(status=refused | {"jobName": "llama-1"})).create
    assert judge(doomed(status={})).create, "a Job that went before its name was written is not seen any more"


def its_pod(**fields: Any) -> ChildPod:
    return replace(pod(**fields), name="p", job="llama-cleanup", step=Step.CLEANUP)


def test_a_clean_up_that_goes_on_is_left_alone() -> None:
    assert judge(doomed(), cleaning(created=ago(60)), its_pod(), live=False) == Decision(again_after=600), "until it is overdue"
    young = judge(doomed(status=RUNNING), failed(1), child(2), cleaning(created=ago(1)), live=False)
    assert young == Decision(again_after=2), "no word about the worker's Jobs"
    assert judge(doomed(), cleaning(ended="Complete"), child(), pod()).finalizer is False, "it began after the worker, so it was right"


@pytest.mark.parametrize(
    ("fields", "reason", "named"),
    [
        ({"waiting_reason": "ErrImagePull", "waiting_message": "nowhere:9: not found"}, "ImagePullFailed", "nowhere:9"),
        ({"waiting_reason": "CreateContainerConfigError", "waiting_message": 'secret "results" not found'}, "SecretMissing", "results"),
        ({"node": "", "unschedulable": "0/3 nodes are available: 3 Insufficient memory."}, "Unschedulable", "Insufficient memory"),
    ],
)
def test_what_its_pod_waits_for_is_told_while_it_waits(fields: dict[str, Any], reason: str, named: str) -> None:
    """On a condition of its own: Ready keeps telling how the job ended. Two minutes before it is overdue."""
    for status in (ended_status(), RUNNING):
        decision = judge(doomed(status=status), cleaning(created=ago(540)), its_pod(phase="Pending", **fields), live=False)
        assert decision.verdict is None and decision.finalizer is None and decision.again_after == 120
        assert decision.blocked and (decision.blocked.reason, decision.blocked.warning) == (reason, True)
        assert decision.blocked.message.startswith("the clean-up waits: pod p: ") and named in decision.blocked.message


def test_why_it_has_no_pod_is_asked_and_told() -> None:
    stuck = cleaning(created=ago(60))
    assert judge(doomed(), stuck, live=False).look == Involved("Job", "llama-cleanup", "cleanup")
    full = judge(doomed(), stuck, warnings=[("FailedCreate", 'pods "x" is forbidden: exceeded quota: pods')])
    assert full.blocked and full.blocked.reason == "QuotaExceeded" and full.again_after == 60
    kept = judge(doomed(), replace(stuck, suspended=True), live=False)
    assert kept.blocked and kept.blocked.reason == "Queued" and "suspended by something else" in kept.blocked.message


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"suspended": True}, "suspended by something else"),
        ({"failing": "DeadlineExceeded", "active": 1}, "still not over"),
        ({"deleting": True}, "still not over"),
    ],
)
def test_one_that_never_ends_is_deleted_and_holds_the_job_no_longer(state: dict[str, Any], said: str) -> None:
    """Suspended by a queue that admits all Jobs, or on a node that is dead: neither is ended by its deadline."""
    stuck = cleaning(created=ago(661), **state)
    assert judge(doomed(), stuck, live=False).confirm, "what cannot be taken back is asked anew"
    decision = judge(doomed(), stuck)
    assert decision.finalizer is False and decision.deletes == (stuck,) and not decision.create
    assert decision.event and (decision.event.reason, decision.event.warning) == ("CleanupFailed", True)
    assert said in decision.event.message and "`kompressor clean s3://models/llama-w4`" in decision.event.message
    due = judge(doomed(), replace(stuck, created=ago(600), deleting=False), its_pod())
    assert replace(due, blocked=None) == Decision(again_after=60), "its own deadline has the first word"


def test_how_it_ended_is_told_and_the_finalizer_goes() -> None:
    done = judge(doomed(), cleaning(ended="Complete"), said("12 files deleted", 0), live=False)
    assert done.finalizer is False and done.event and (done.event.reason, done.event.warning) == ("CleanedUp", False)
    assert done.event.message == "12 files deleted" and done.verdict is None, "its status keeps telling how it ended"
    lost = cleaning(ended="Failed", ended_reason="BackoffLimitExceeded")
    assert judge(doomed(), lost, live=False).confirm
    failed_ = judge(doomed(), lost, said("bucket models: access denied", 64))
    assert failed_.finalizer is False and failed_.event and (failed_.event.reason, failed_.event.warning) == ("CleanupFailed", True)
    assert "access denied" in failed_.event.message and "`kompressor clean s3://models/llama-w4`" in failed_.event.message


def test_one_that_cannot_be_created_is_given_up_with_a_warning() -> None:
    decision = given_up(View(doomed(), Observed(), NOW, SETTINGS, PASSES), "exceeded quota: " + "x" * 2000)
    assert decision.finalizer is False and decision.event and decision.event.warning
    assert "exceeded quota" in decision.event.message and "s3://models/llama-w4" in decision.event.message
    assert len(decision.event.message) < 1024, "what to do about it is not cut off"


def test_the_job_has_no_owner_and_sees_the_output_alone() -> None:
    made = cleanup_job(doomed(worker={"serviceAccountName": "mine", "image": "custom:1"}), replace(SETTINGS, planner_image="slim:1"))
    assert "ownerReferences" not in made["metadata"] and ours(made, kcj())
    spec = made["spec"]
    assert spec["ttlSecondsAfterFinished"] and spec["activeDeadlineSeconds"]
    assert spec["template"]["metadata"]["labels"][names.LABEL_JOB_UID] == UID, "by which the watch sees its pods"
    pod_spec = spec["template"]["spec"]
    assert pod_spec["serviceAccountName"] == "mine" and pod_spec["automountServiceAccountToken"] is False
    (container,) = pod_spec["containers"]
    env = {entry["name"]: entry for entry in container["env"]}
    assert container["image"] == "slim:1" and container["command"] == ["kompressor", "clean", "--in-cluster"]
    assert json.loads(env[names.ENV_OUTPUT]["value"]) == OUTPUT and env[names.ENV_JOB_UID]["value"] == UID
    assert env["OUTPUT_AWS_ACCESS_KEY_ID"]["valueFrom"]["secretKeyRef"] == {"name": "results", "key": "AWS_ACCESS_KEY_ID"}
    assert container["envFrom"] == [{"prefix": "OUTPUT_", "secretRef": {"name": "results"}}]
    assert {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]} == {
        "/tmp": False,
        "/etc/kompressor/ca/output": True,
    }
    assert "models" not in json.dumps(pod_spec).replace("s3://models", ""), "nothing of the source's Secret"


def test_podtemplate_holds_for_it_as_for_the_preflight() -> None:
    keys = {"name": "OUTPUT_AWS_SESSION_TOKEN", "valueFrom": {"secretKeyRef": {"name": "mine", "key": "token"}}}
    container = {
        "name": "worker",
        "image": "theirs:1",
        "command": ["sh"],
        "env": [keys, {"name": names.ENV_OUTPUT, "value": "{}"}, {"name": names.ENV_JOB_UID, "value": "other"}],
        "envFrom": [{"secretRef": {"name": "mine"}}],
        "resources": {"limits": {"nvidia.com/gpu": 1}},
    }
    spec = {
        "serviceAccount": "mine",
        "imagePullSecrets": [{"name": "pull"}],
        "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["store"]}],
        "securityContext": {"runAsUser": 1000, "fsGroup": 2000},
        "nodeSelector": {"gpu": "h100"},
        "containers": [container],
    }
    labels = {"azure.workload.identity/use": "true", names.LABEL_STEP: "compress"}
    worker = {"podTemplate": {"metadata": {"labels": labels}, "spec": spec}, "tolerations": [{"operator": "Exists"}]}
    template = cleanup_job(doomed(worker=worker), SETTINGS)["spec"]["template"]
    pod_spec, marks = template["spec"], template["metadata"]["labels"]
    (made,) = pod_spec["containers"]
    env = {entry["name"]: entry for entry in made["env"]}
    assert made["image"] == "theirs:1" and env["OUTPUT_AWS_SESSION_TOKEN"] == keys
    assert {"secretRef": {"name": "mine"}} in made["envFrom"] and {"prefix": "OUTPUT_", "secretRef": {"name": "results"}} in made["envFrom"]
    assert pod_spec["imagePullSecrets"] == [{"name": "pull"}] and pod_spec["hostAliases"] and pod_spec["tolerations"]
    assert pod_spec["securityContext"]["runAsUser"] == 1000 and pod_spec["securityContext"]["runAsNonRoot"] is True
    assert pod_spec["serviceAccountName"] == "mine" and "nodeSelector" not in pod_spec
    assert marks["azure.workload.identity/use"] == "true" and marks[names.LABEL_STEP] == "cleanup"
    assert made["command"] == ["kompressor", "clean", "--in-cluster"] and "gpu" not in json.dumps(made["resources"])
    assert json.loads(env[names.ENV_OUTPUT]["value"]) == OUTPUT and env[names.ENV_JOB_UID]["value"] == UID


def test_a_claim_is_mounted_where_the_worker_had_it() -> None:
    job = replace(doomed(), spec={**doomed().spec, "output": {"uri": "pvc://models/llama-w4"}})
    pod_spec = cleanup_job(job, SETTINGS)["spec"]["template"]["spec"]
    assert pod_spec["serviceAccountName"] == "default", "the one made for the job may be gone"
    mounts = {mount["mountPath"] for mount in pod_spec["containers"][0]["volumeMounts"]}
    assert "/var/run/kompressor/claims/models" in mounts
    assert {"name": "claim", "persistentVolumeClaim": {"claimName": "models"}} in pod_spec["volumes"]
