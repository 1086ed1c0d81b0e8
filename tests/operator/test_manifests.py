"""The children as dicts: names, owners, least privilege, the pod's shape. The real API server judges them in test_on_stage.py."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from kcj_builders import SETTINGS, SPEC, UID, kcj

from kompressor_api import names
from kompressor_operator import manifests
from kompressor_operator.manifests import Attempt
from kompressor_operator.observed import CompressionJob, Manifest
from kompressor_operator.settings import Settings


def pod_of(job: CompressionJob, settings: Settings = SETTINGS, **attempt: Any) -> Manifest:
    spec: Manifest = manifests.worker_job(job, Attempt(**attempt), settings)["spec"]["template"]["spec"]
    return spec


def worker_of(job: CompressionJob, settings: Settings = SETTINGS, **attempt: int) -> Manifest:
    container: Manifest = pod_of(job, settings, **attempt)["containers"][0]
    return container


def env_of(container: Manifest) -> dict[str, Any]:
    return {entry.pop("name"): entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


def everything(job: CompressionJob) -> list[Manifest]:
    return [*manifests.supports(job), manifests.role_binding(job), manifests.worker_job(job, Attempt(), SETTINGS)]


@pytest.mark.parametrize("name", ["a", "x" * 253, "a" * 39 + ".-.-" + "b" * 100, "a.b.c"])
def test_names_leave_room_for_the_pods_suffix_and_are_valid(name: str) -> None:
    job = kcj(name)
    for child in everything(job):
        assert len(child["metadata"]["name"]) <= 63 - len("-abcde")
        assert all(part.strip("-") == part and part for part in child["metadata"]["name"].split("."))
    assert len(manifests.job_name(job, 100)) <= 63 - len("-abcde")
    assert 0 < len(manifests.labels(job)[names.LABEL_INSTANCE]) <= 63


def test_a_namesake_has_other_children() -> None:
    one, other = kcj(), replace(kcj(), uid="other")
    assert {c["metadata"]["name"] for c in everything(one)}.isdisjoint(c["metadata"]["name"] for c in everything(other))


def test_every_child_is_owned_and_labelled() -> None:
    for child in everything(kcj()):
        (owner,) = child["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == ("CompressionJob", UID, True, True)
        assert child["metadata"]["labels"][names.LABEL_JOB_UID] == UID
        assert child["metadata"]["namespace"] == "team"


def test_the_worker_reads_the_job_from_an_immutable_config_map() -> None:
    config = manifests.config_map(kcj(generation=3))
    assert config["immutable"] is True
    told = json.loads(config["data"][names.JOB_FILE])
    assert told["spec"] == SPEC and told["kind"] == "CompressionJob" and told["apiVersion"] == names.API_VERSION
    assert told["metadata"] == {"name": "llama", "namespace": "team", "uid": UID, "generation": 3}


def test_the_worker_may_touch_this_one_status_and_nothing_else() -> None:
    rules = manifests.role(kcj())["rules"]
    assert [(r["resources"], r["verbs"]) for r in rules] == [
        (["compressionjobs"], ["get"]),
        (["compressionjobs/status"], ["get", "patch"]),
    ]
    assert all(r["resourceNames"] == ["llama"] and r["apiGroups"] == ["kompressor.io"] for r in rules)


def test_the_token_is_mounted_by_the_worker_alone() -> None:
    assert manifests.service_account(kcj())["automountServiceAccountToken"] is False
    assert pod_of(kcj())["automountServiceAccountToken"] is True


def test_a_users_service_account_is_used_bound_and_not_made() -> None:
    job = kcj(worker={"serviceAccountName": "mine"})
    assert "ServiceAccount" not in {child["kind"] for child in everything(job)}
    assert pod_of(job)["serviceAccountName"] == "mine"
    assert manifests.role_binding(job)["subjects"] == [{"kind": "ServiceAccount", "name": "mine", "namespace": "team"}]


def test_the_pod_failure_policy_in_this_order() -> None:
    assert manifests.pod_failure_rules() == [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": {"containerName": "worker", "operator": "In", "values": [75, 76]}},
        {"action": "FailJob", "onExitCodes": {"containerName": "worker", "operator": "In", "values": [64, 65, 66, 67]}},
        {"action": "FailJob", "onExitCodes": {"containerName": "worker", "operator": "In", "values": [71, 137]}},
    ]


def test_the_job_retries_in_place_with_what_is_left() -> None:
    spec = manifests.worker_job(kcj(), Attempt(2, memory_plan=1, failures_before=3), SETTINGS)["spec"]
    assert spec["backoffLimit"] == 1 and spec["podReplacementPolicy"] == "Failed"
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert "ttlSecondsAfterFinished" not in spec and "suspend" not in spec
    assert manifests.backoff_limit(kcj(retry={"limit": 1}), 3) == 0
    assert manifests.backoff_limit(kcj(retry={"limit": 0}), 0) == 0
    assert manifests.backoff_limit(kcj(retry={}), 0) == 4


def test_the_attempt_is_readable_from_the_job_alone() -> None:
    meta = manifests.worker_job(kcj(), Attempt(2, memory_plan=1, failures_before=3), SETTINGS)["metadata"]
    assert meta["labels"][names.LABEL_ATTEMPT] == "2"
    assert meta["annotations"] == {names.ANNOTATION_MEMORY_PLAN: "1", names.ANNOTATION_FAILURES_BEFORE: "3"}


def test_the_smaller_plan_reaches_the_worker() -> None:
    assert names.ENV_MEMORY_PLAN not in env_of(worker_of(kcj()))
    assert env_of(worker_of(kcj(), memory_plan=2))[names.ENV_MEMORY_PLAN] == "2"


def test_command_and_environment() -> None:
    worker = worker_of(kcj(), replace(SETTINGS, worker_env={"HTTPS_PROXY": "http://proxy", "HOME": "/root", "POD_NAME": "x"}))
    assert worker["command"] == ["kompressor", "run", "/etc/kompressor/job/job.json", "--in-cluster"]
    assert len({entry["name"] for entry in worker["env"]}) == len(worker["env"])
    env = env_of(worker)
    assert env["HTTPS_PROXY"] == "http://proxy" and env["HOME"] == names.SCRATCH_DIRECTORY
    assert env[names.ENV_POD_UID] == {"fieldRef": {"fieldPath": "metadata.uid"}}
    assert env["POD_NAME"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    for name in ("XDG_CACHE_HOME", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert env[name].startswith(names.SCRATCH_DIRECTORY + "/")


def test_credentials_come_by_reference_with_one_key_named_so_that_its_absence_shows() -> None:
    worker = worker_of(kcj())
    assert worker["envFrom"] == [
        {"prefix": "SOURCE_", "secretRef": {"name": "models"}},
        {"prefix": "OUTPUT_", "secretRef": {"name": "results"}},
    ]
    env = env_of(worker)
    assert env["SOURCE_AWS_ACCESS_KEY_ID"] == {"secretKeyRef": {"name": "models", "key": "AWS_ACCESS_KEY_ID"}}
    assert env["OUTPUT_AWS_ACCESS_KEY_ID"] == {"secretKeyRef": {"name": "results", "key": "AWS_ACCESS_KEY_ID"}}


def test_a_hub_token_and_no_secret_at_all() -> None:
    hub = {"source": {"uri": "hf://meta/llama", "credentialsSecret": "hub"}}
    assert "SOURCE_HF_TOKEN" in env_of(worker_of(kcj(model=hub)))
    bare = worker_of(kcj(model={"source": {"uri": "s3://a/b"}}, output={"uri": "s3://a/c"}))
    assert "envFrom" not in bare and not any(name.startswith(("SOURCE_", "OUTPUT_")) for name in env_of(bare))


PRIVATE_CA = {"configMap": "data-ca", "key": "root.pem"}
DATASETS = {
    "calibration": {"dataset": {"uri": "s3://data/a.jsonl", "credentialsSecret": "data", "caBundle": PRIVATE_CA}, "samples": 8},
    "evaluation": {"dataset": {"uri": "hf://datasets/org/name", "credentialsSecret": "hub"}},
    "drift": {"dataset": {"uri": "pvc://logs/today"}},
}


def test_datasets_come_with_their_own_credentials_certificates_and_claims() -> None:
    job = kcj(**DATASETS)
    worker = worker_of(job)
    assert worker["envFrom"][2:] == [
        {"prefix": "DATA_", "secretRef": {"name": "data"}},
        {"prefix": "EVALUATION_", "secretRef": {"name": "hub"}},
    ]
    env = env_of(worker)
    assert env["DATA_AWS_ACCESS_KEY_ID"] == {"secretKeyRef": {"name": "data", "key": "AWS_ACCESS_KEY_ID"}}
    assert env["EVALUATION_HF_TOKEN"] == {"secretKeyRef": {"name": "hub", "key": "HF_TOKEN"}}
    assert not any(name.startswith("DRIFT_") for name in env)
    found = mounts_of(job)
    assert found["/etc/kompressor/ca/data"]["readOnly"] is True
    volume = next(v for v in pod_of(job)["volumes"] if v["name"] == found["/etc/kompressor/ca/data"]["name"])
    assert volume["configMap"] == {"name": "data-ca", "items": [{"key": "root.pem", "path": "root.pem"}]}
    assert found[f"{names.CLAIM_DIRECTORY}/logs"]["readOnly"] is True


def test_data_on_the_outputs_claim_does_not_make_it_read_only() -> None:
    job = kcj(output={"uri": "pvc://both/out"}, calibration={"dataset": {"uri": "pvc://both/data"}})
    assert "readOnly" not in mounts_of(job)[f"{names.CLAIM_DIRECTORY}/both"]


def mounts_of(job: CompressionJob) -> dict[str, Manifest]:
    return {mount["mountPath"]: mount for mount in worker_of(job)["volumeMounts"]}


def test_ca_bundles_are_mounted_where_the_worker_looks() -> None:
    bundle = {"configMap": "private-ca", "key": "root.pem"}
    job = kcj(output={"uri": "s3://a/c", "caBundle": bundle})
    assert mounts_of(job)["/etc/kompressor/ca/output"] == {
        "name": "ca-output",
        "mountPath": "/etc/kompressor/ca/output",
        "readOnly": True,
    }
    volume = next(v for v in pod_of(job)["volumes"] if v["name"] == "ca-output")
    assert volume["configMap"] == {"name": "private-ca", "items": [{"key": "root.pem", "path": "root.pem"}]}


def test_a_claim_that_is_only_read_is_mounted_read_only() -> None:
    job = kcj(model={"source": {"uri": "pvc://models/llama"}}, output={"uri": "pvc://results/llama"})
    found = mounts_of(job)
    assert found[f"{names.CLAIM_DIRECTORY}/models"]["readOnly"] is True
    assert "readOnly" not in found[f"{names.CLAIM_DIRECTORY}/results"]


def test_a_claim_that_is_source_and_output_is_mounted_once_and_writable() -> None:
    job = kcj(model={"source": {"uri": "pvc://both/in"}}, output={"uri": "pvc://both/out"})
    claims = [v for v in pod_of(job)["volumes"] if "persistentVolumeClaim" in v]
    assert [v["persistentVolumeClaim"]["claimName"] for v in claims] == ["both"]
    assert "readOnly" not in mounts_of(job)[f"{names.CLAIM_DIRECTORY}/both"]


def test_what_must_be_writable_is_and_nothing_else() -> None:
    found = mounts_of(kcj())
    assert found[names.JOB_DIRECTORY]["readOnly"] is True
    assert {path for path, mount in found.items() if not mount.get("readOnly")} == {"/tmp", "/dev/shm", names.SCRATCH_DIRECTORY}
    shared = {v["name"]: v for v in pod_of(kcj())["volumes"]}["shared-memory"]
    assert shared["emptyDir"] == {"medium": "Memory"}
    limited = pod_of(kcj(), replace(SETTINGS, worker_shared_memory="8Gi"))["volumes"]
    assert {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}} in limited
    assert worker_of(kcj())["securityContext"]["readOnlyRootFilesystem"] is True


def test_restricted_pod_security() -> None:
    pod, worker = pod_of(kcj()), worker_of(kcj())
    assert pod["securityContext"]["runAsNonRoot"] is True and isinstance(pod["securityContext"]["runAsUser"], int)
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert worker["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert worker["securityContext"]["allowPrivilegeEscalation"] is False


def test_a_termination_message_and_the_time_to_write_it() -> None:
    assert worker_of(kcj())["terminationMessagePolicy"] == "FallbackToLogsOnError"
    assert pod_of(kcj())["terminationGracePeriodSeconds"] == 60
    assert pod_of(kcj(), replace(SETTINGS, worker_grace_seconds=5))["terminationGracePeriodSeconds"] == 5


def test_the_shape_of_the_pod_is_the_users_then_the_operators() -> None:
    shape = {
        "image": "mine:2",
        "resources": {"limits": {"nvidia.com/gpu": 1}},
        "nodeSelector": {"gpu": "a100"},
        "tolerations": [{"operator": "Exists"}],
    }
    settings = replace(SETTINGS, worker_resources={"limits": {"memory": "1Gi"}}, worker_image_pull_secrets=("pull",))
    job = kcj(worker=shape)
    assert worker_of(job, settings)["image"] == "mine:2"
    assert worker_of(job, settings)["resources"] == {"limits": {"memory": "1Gi", "nvidia.com/gpu": 1}}
    assert pod_of(job, settings)["nodeSelector"] == shape["nodeSelector"]
    assert pod_of(job, settings)["tolerations"] == shape["tolerations"]
    assert pod_of(job, settings)["imagePullSecrets"] == [{"name": "pull"}]
    assert worker_of(kcj(), settings)["image"] == "worker:1"
    assert worker_of(kcj(), settings)["resources"] == {"limits": {"memory": "1Gi"}}


def test_the_digest_is_of_what_cannot_change() -> None:
    digest = manifests.spec_digest(SPEC)
    assert digest == manifests.spec_digest(SPEC | {"suspend": True, "retry": {"limit": 1}, "ttlSecondsAfterFinished": 5})
    assert digest != manifests.spec_digest(SPEC | {"passes": []})
    assert digest == manifests.spec_digest(dict(reversed(SPEC.items())))


def test_a_queued_job_waits_for_its_queue_and_its_pods_carry_no_queue() -> None:
    body = manifests.worker_job(kcj(queueName="gpu"), Attempt(), SETTINGS)
    assert body["spec"]["suspend"] is True and body["metadata"]["labels"][names.QUEUE_LABEL] == "gpu"
    assert names.QUEUE_LABEL not in body["spec"]["template"]["metadata"]["labels"]
    assert "suspend" not in manifests.worker_job(kcj(), Attempt(), SETTINGS)["spec"]


def test_an_attempt_keeps_the_image_of_the_one_before_and_has_its_own_deadline() -> None:
    job = kcj(worker={"image": "mine:2"})
    assert worker_of(job)["image"] == "mine:2" and worker_of(job, image="mine:1")["image"] == "mine:1"
    assert "activeDeadlineSeconds" not in manifests.worker_job(job, Attempt(), SETTINGS)["spec"]
    assert manifests.worker_job(job, Attempt(deadline=7), SETTINGS)["spec"]["activeDeadlineSeconds"] == 7


def test_every_child_job_says_which_step_it_is() -> None:
    body = manifests.worker_job(kcj(), Attempt(), SETTINGS)
    assert body["metadata"]["labels"][names.LABEL_STEP] == body["spec"]["template"]["metadata"]["labels"][names.LABEL_STEP] == "compress"
