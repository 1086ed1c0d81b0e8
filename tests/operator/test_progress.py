"""Early truth as a table: what people would otherwise hunt for in pods and events."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from kcj_builders import NOW, ago, child, condition, failed, judge, kcj, pod

from kompressor_api.failures import ADVICE
from kompressor_api.names import Reason
from kompressor_operator.decide import Involved
from kompressor_operator.pods import ChildPod

WAITING: list[tuple[dict[str, Any], str, str]] = [
    ({"waiting_reason": "ErrImagePull", "waiting_message": "pull access denied"}, "ImagePullFailed", "spec.worker.image"),
    ({"waiting_reason": "InvalidImageName", "waiting_message": "couldn't parse"}, "ImagePullFailed", "couldn't parse"),
    ({"waiting_reason": "SignatureValidationFailed", "waiting_message": "no signature"}, "ImagePullFailed", "no signature"),
    (
        {"waiting_reason": "CreateContainerConfigError", "waiting_message": 'secret "models" not found'},
        "SecretMissing",
        "create the Secret",
    ),
    (
        {"waiting_reason": "CreateContainerConfigError", "waiting_message": "couldn't find key HF_TOKEN in Secret team/models"},
        "SecretMissing",
        "HF_TOKEN",
    ),
    (
        {"waiting_reason": "CreateContainerConfigError", "waiting_message": "container has runAsNonRoot and image will run as root"},
        "ContainerNotStarted",
        "runAsNonRoot",
    ),
    (
        {"waiting_reason": "CreateContainerConfigError", "waiting_message": 'configmap "secret-settings" not found'},
        "ContainerNotStarted",
        "secret-settings",
    ),
    ({"node": "", "unschedulable": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."}, "Unschedulable", "add a node"),
    (
        {"node": "", "unschedulable": '0/3 nodes are available: persistentvolumeclaim "models" not found. preemption: not helpful.'},
        "VolumeNotMounted",
        "create what is named",
    ),
    (
        {"node": "", "unschedulable": "0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims."},
        "VolumeNotMounted",
        "bind its claim",
    ),
]


@pytest.mark.parametrize(("fields", "reason", "named"), WAITING)
def test_a_pod_that_cannot_start_says_why_and_what_to_do(fields: dict[str, Any], reason: str, named: str) -> None:
    decision = judge(kcj(), child(), pod(phase="Pending", **fields))
    assert decision.verdict and (decision.verdict.phase, decision.verdict.reason) == ("Pending", reason)
    assert named in decision.verdict.message and "llama-1-a" in decision.verdict.message
    assert decision.verdict.message.endswith(ADVICE[Reason(reason)]), "as docs/failures.md has it"


def test_error_and_back_off_of_a_pull_read_alike() -> None:
    """They alternate for as long as it lasts; the status should not be written each time."""
    error = judge(kcj(), child(), pod(phase="Pending", waiting_reason="ErrImagePull", waiting_message="not found"))
    text = 'Back-off pulling image "worker:9": ErrImagePull: not found'
    backing = judge(kcj(), child(), pod(phase="Pending", waiting_reason="ImagePullBackOff", waiting_message=text))
    assert error.verdict == backing.verdict


def test_a_running_pod_compresses() -> None:
    decision = judge(kcj(), child(failed=2), pod())
    assert decision.verdict and decision.verdict.reason == "Compressing"
    assert "node-1" in decision.verdict.message and "after 2 failed" in decision.verdict.message
    assert decision.again_after is None


@pytest.mark.parametrize("code", [0, 64, 65, 67, 71, 137])
def test_a_pod_that_ends_its_job_is_no_news_until_the_job_says_so(code: int) -> None:
    assert judge(kcj(), child(), pod(exit=code)).verdict == judge(kcj(), child(), pod()).verdict
    evicted = judge(kcj(), child(), pod(exit=code or 75, disrupted="EvictionByEvictionAPI"))
    assert evicted.verdict and evicted.verdict.reason == "Retrying"


def test_the_smaller_plan_is_said_while_it_runs() -> None:
    decision = judge(kcj(), child(2, memory_plan=1), pod(2))
    assert decision.verdict and "smaller memory plan, step 1" in decision.verdict.message


def test_a_lost_node_is_named_with_its_remedy_and_only_after_the_grace_period() -> None:
    stopping = judge(kcj(), child(), pod(deletion_due=NOW + timedelta(seconds=5), disrupted="DeletionByTaintManager"))
    assert stopping.verdict and stopping.verdict.reason == "Retrying" and "DeletionByTaintManager" in stopping.verdict.message
    assert stopping.again_after == 20
    gone = judge(kcj(), child(), pod(deletion_due=ago(16)))
    assert gone.verdict and gone.verdict.reason == "NodeLost" and "out-of-service" in gone.verdict.message


def test_a_node_that_falls_silent_is_named_before_anything_is_evicted() -> None:
    """The node controller takes Ready from its pods; what the kubelet last said of the containers stays."""
    body = {
        "metadata": {"namespace": "team", "name": "llama-1-a", "uid": "p", "labels": {}},
        "spec": {"nodeName": "node-1"},
        "status": {
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": "False"}, {"type": "ContainersReady", "status": "True"}],
        },
    }
    assert ChildPod.parse(body).silent
    decision = judge(kcj(), child(), pod(silent=True))
    assert decision.verdict and decision.verdict.reason == "NodeLost" and "node-1" in decision.verdict.message
    assert judge(kcj(), child(), pod(silent=True, exit=75)).verdict != decision.verdict
    body["status"]["conditions"][0]["reason"] = "ReadinessGatesNotReady"
    assert not ChildPod.parse(body).silent, "the kubelet itself says so"


def test_what_follows_a_lost_node_is_no_new_job() -> None:
    """Its pod may be gone from our eyes at once: Kubernetes deletes it without waiting for anybody."""
    lost = kcj(status={"conditions": [condition("Ready", "False", reason="NodeLost")]})
    for children in ([child(created=ago(1))], [child(), pod(suffix="b", phase="Pending", node="", created=ago(1))]):
        decision = judge(lost, *children)
        assert decision.verdict and decision.verdict.reason == "Retrying" and "goes on at the last" in decision.verdict.message


def test_a_job_without_a_pod_is_looked_into_after_a_moment() -> None:
    young = judge(kcj(), child(created=ago(1)))
    assert young.look is None and young.again_after == 2
    assert judge(kcj(), child()).look == Involved("Job", "llama-1", "job-1")


@pytest.mark.parametrize(
    ("warning", "reason", "named"),
    [
        ('pods "x" is forbidden: exceeded quota: gpus, requested: 1', "QuotaExceeded", "ResourceQuota"),
        ('pods "x" is forbidden: failed quota: cpu: must specify limits.cpu for: worker', "PodRefused", "LimitRange"),
        ('error looking up service account team/me: serviceaccount "me" not found', "PodRefused", "serviceAccountName"),
        ('pods "x" is forbidden: violates PodSecurity "restricted"', "PodRefused", "policy"),
    ],
)
def test_why_the_job_controller_makes_no_pod(warning: str, reason: str, named: str) -> None:
    decision = judge(kcj(), child(), warnings=[("FailedCreate", warning)])
    assert decision.verdict and decision.verdict.reason == reason
    assert named in decision.verdict.message and decision.again_after == 60


def test_an_old_warning_says_nothing_about_now() -> None:
    decision = judge(kcj(), child(failed=1), pod(exit=74, at=NOW + timedelta(seconds=1)), warnings=[("FailedCreate", "exceeded quota")])
    assert decision.verdict and decision.verdict.reason == "Retrying"


def test_between_two_pods_it_says_what_the_last_one_said() -> None:
    decision = judge(kcj(), child(failed=1), pod(exit=74, said="no route to host"))
    assert decision.verdict and decision.verdict.reason == "Retrying"
    assert "no route to host" in decision.verdict.message


def test_until_the_next_pod_runs_it_keeps_saying_so() -> None:
    """Each other text would be a write, each other reason an event."""
    ended = pod(exit=74, said="no route to host")
    between = judge(kcj(), child(failed=1), ended)
    assert judge(kcj(), child(failed=1), ended, pod(suffix="b", phase="Pending", node="", created=ago(1))).verdict == between.verdict
    follows = judge(kcj(), failed(1), pod(1, exit=71))
    started = judge(kcj(), failed(1), pod(1, exit=71), child(2, memory_plan=1, created=ago(1)))
    assert follows.verdict and started.verdict
    assert follows.verdict.message == started.verdict.message and started.verdict.reason == "Retrying"


def test_a_pod_that_is_gone_without_a_trace_does_not_make_it_a_new_job() -> None:
    running = kcj(status={"conditions": [condition("Ready", "False", reason="Compressing")]})
    for job, attempt in ((running, child(created=ago(1))), (kcj(), child(created=ago(1), failed=1))):
        decision = judge(job, attempt)
        assert decision.verdict and decision.verdict.reason == "Retrying"


def test_a_volume_that_does_not_come_is_looked_into_after_a_while() -> None:
    waiting = pod(phase="Pending", waiting_reason="ContainerCreating", created=ago(4))
    assert judge(kcj(), child(), waiting).again_after == 6
    stuck = pod(phase="Pending", waiting_reason="ContainerCreating")
    assert judge(kcj(), child(), stuck).look == Involved("Pod", "llama-1-a", "pod-1-a")
    text = 'MountVolume.SetUp failed for volume "ca-source" : configmap "ca" not found'
    decision = judge(kcj(), child(), stuck, warnings=[("FailedMount", text)])
    assert decision.verdict and decision.verdict.reason == "VolumeNotMounted" and 'configmap "ca"' in decision.verdict.message


def test_a_look_that_finds_nothing_is_repeated_ever_more_rarely() -> None:
    assert [judge(kcj(), child(created=ago(age)), warnings=[]).again_after for age in (4, 20, 500)] == [4, 20, 60]
