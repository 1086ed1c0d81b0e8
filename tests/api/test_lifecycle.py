"""What the API server does to a CompressionJob that exists: what may change, who may say what, what kubectl shows."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from api_server import Server, manifest

from kompressor_api import names
from kompressor_api.names import MUTABLE

pytestmark = pytest.mark.cluster

Job = dict[str, Any]


@pytest.fixture
def job(server: Server, request: pytest.FixtureRequest) -> Iterator[Job]:
    """A CompressionJob in `open`, with all that may be absent left out."""
    name = request.node.name.split("[")[0].replace("_", "-")[-50:].strip("-")
    job = manifest("open", name)
    answer = server.create(job, keep=True)
    assert answer.refusal == ""
    yield job
    server.patch(job, {"metadata": {"finalizers": None}})
    server.delete(job)


CHANGES: dict[str, dict[str, Any]] = {
    "the source": {"model": {"source": {"uri": "s3://models/other"}}},
    "a revision, added": {"model": {"source": {"revision": "v2"}}},
    "the output": {"output": {"uri": "s3://models/other"}},
    "an endpoint, added": {"output": {"endpoint": "https://s3.example.org"}},
    "a pass": {"passes": [{"rtn": {"scheme": "W8A8"}}]},
    "a pass, added": {"passes": [{"rtn": {"scheme": "W4A16", "groupSize": 128}}, {"rtn": {"scheme": "W8A8"}}]},
    "a parameter, removed": {"passes": [{"rtn": {"scheme": "W4A16"}}]},
    "a parameter nobody knows, added": {"passes": [{"rtn": {"scheme": "W4A16", "groupSize": 128, "groupsize": 64}}]},
    "the worker, added": {"worker": {"image": "other"}},
    "a pod template, added": {"worker": {"podTemplate": {"spec": {"priorityClassName": "low"}}}},
    "the preflight": {"preflight": "Skip"},
    "a queue, added": {"queueName": "gpu"},
    "a deadline, added": {"activeDeadlineSeconds": 60},
    "what becomes of the output": {"deletionPolicy": "Delete"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_spec_is_immutable(server: Server, job: Job, change: str) -> None:
    refusal = server.patch(job, {"spec": CHANGES[change]}).refusal
    assert "cannot change once the job exists; create another (only suspend, retry and" in refusal
    assert f'"field":"spec.{next(iter(CHANGES[change]))}"' in refusal
    assert refusal.startswith("422 ") and '"reason":"Invalid"' in refusal, "what kubectl and Flux take for an immutable field"


def test_what_is_there_cannot_be_removed(server: Server) -> None:
    worker = {"image": "worker:dev", "nodeSelector": {"zone": "a"}}
    job = manifest("open", "removal", worker=worker)
    assert server.create(job, keep=True).refusal == ""
    for change in ({"worker": None}, {"worker": {"nodeSelector": None}}, {"worker": {"image": "other"}}):
        assert "spec.worker" in server.patch(job, {"spec": change}).refusal
    without = manifest("open", "removal")
    assert "spec.worker" in server.replace(without).refusal
    server.delete(job)


def test_what_may_change_can_come_change_and_go(server: Server, job: Job) -> None:
    values: dict[str, list[Any]] = {"suspend": [True, False, None], "retry": [{"limit": 9}, {"limit": 0}, None]}
    values["ttlSecondsAfterFinished"] = [60, 0, None]
    assert set(values) == set(MUTABLE)
    for name, steps in values.items():
        for value in steps:
            assert server.patch(job, {"spec": {name: value}}).refusal == ""
    again = server.apply(job)
    assert again.refusal == "", "server-side apply of the same manifest is no change"


def test_defaults_are_written_into_the_resource(server: Server) -> None:
    created = server.create(manifest("open")).object
    assert created["spec"]["output"]["format"] == "compressed-tensors"
    assert created["spec"]["suspend"] is False
    assert created["spec"]["retry"] == {"limit": 4}
    assert "worker" not in created["spec"], "an empty object says nothing"
    later = {"preflight", "deletionPolicy"} & created["spec"].keys() | {"sparseStorage"} & created["spec"]["output"].keys()
    assert not later, "an operator from before a field must not meet it where nobody wrote it"
    bundle = {"uri": "s3://a/b", "caBundle": {"configMap": "ca"}}
    assert server.create(manifest("open", output=bundle)).object["spec"]["output"]["caBundle"]["key"] == "ca.crt"


def test_a_new_job_does_not_look_finished(server: Server, job: Job) -> None:
    """kstatus calls an object without conditions Current, unless observedGeneration differs from generation."""
    found = server.cluster.get("kcj", "-n", "open", job["metadata"]["name"])
    assert found["status"] == {"observedGeneration": -1}
    assert found["metadata"]["generation"] == 1


def test_status_of_operator_and_worker_survive(server: Server, job: Job) -> None:
    now = "2030-01-01T00:00:00Z"
    ready = {"type": "Ready", "status": "False", "reason": "Compressing", "message": "", "lastTransitionTime": now}
    progress = {"percent": 40, "unit": "model.layers.7", "bytesRead": 2**40, "updatedAt": now}
    assert server.patch(job, {"status": {"observedGeneration": 1, "conditions": [ready]}}, status=True).refusal == ""
    patched = server.patch(job, {"status": {"progress": progress, "result": {"ratio": "3.6x"}}}, status=True)
    assert patched.object["status"]["progress"] == progress
    assert patched.object["status"]["conditions"] == [ready]
    listed = server.cluster.kubectl("get", "kcj", "-n", "open", job["metadata"]["name"])
    assert [line.split() for line in listed.splitlines()] == [
        ["NAME", "READY", "STATUS", "PROGRESS", "RATIO", "AGE"],
        [job["metadata"]["name"], "False", "Compressing", "40", "3.6x", listed.split()[-1]],
    ]
    twice = {"status": {"conditions": [ready, ready]}}
    assert "Duplicate value" in server.patch(job, twice, status=True).refusal


def test_kubectl_names(server: Server) -> None:
    for name in (names.SHORT_NAME, names.PLURAL, names.KIND.lower(), "kompressor"):
        server.cluster.kubectl("get", name, "-n", "open")
    wide = server.cluster.kubectl("get", "kcj", "-A", "-o", "wide", "--show-kind")
    assert wide == "" or "SOURCE" in wide


def test_kubectl_explains_down_to_a_parameter(server: Server) -> None:
    def known() -> bool:
        return "rtn" in server.cluster.kubectl("get", "--raw", f"/openapi/v3/apis/{names.API_VERSION}")

    wait_until(known)
    explained = server.cluster.kubectl("explain", "kcj.spec.passes.rtn")
    assert "scheme\t<string> -required-" in explained
    assert "W8A8: INT8, activations per token" in explained
    assert "exactly one key, the" in server.cluster.kubectl("explain", "kcj.spec.passes")
    assert "Secret in the job's namespace" in server.cluster.kubectl("explain", "kcj.spec.model.source")


# -- the admission policies


@contextlib.contextmanager
def unguarded(server: Server) -> Iterator[None]:
    """Takes the binding of the policy on names away for a while."""
    binding = "validatingadmissionpolicybinding/guarded-guard-kompressor-known-names"
    saved = server.cluster.get(binding)
    server.cluster.kubectl("delete", binding)
    probe = manifest("guarded", "probe", probe=True)
    wait_until(lambda: not server.create(probe, validation="Ignore").refusal)
    try:
        yield
    finally:
        meta = {"name": saved["metadata"]["name"], "labels": saved["metadata"]["labels"], "annotations": saved["metadata"]["annotations"]}
        server.cluster.apply(saved | {"metadata": meta})
        wait_until(lambda: bool(server.create(probe, validation="Ignore").refusal))


def wait_until(true: Callable[[], bool], seconds: float = 120) -> None:
    """Policies, discovery and the authorizer follow a moment after the object, a long one where the cores are busy."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.2)


def test_a_job_from_before_the_policy_can_still_be_labelled_and_deleted(server: Server) -> None:
    """Otherwise a finalizer could never be taken off it."""
    job = manifest("guarded", "old", retry={"limit": 3, "limits": 3})
    with unguarded(server):
        assert server.create(job, validation="Ignore", keep=True).refusal == ""
    assert "no such name: limits" in server.patch(job, {"spec": {"suspend": True}}).refusal
    assert "no such name: limits" in server.patch(job, {"suspend": True}).refusal, "nor may anything be put beside its spec"
    assert server.patch(job, {"metadata": {"labels": {"a": "b"}, "finalizers": ["example.org/hold"]}}).refusal == ""
    assert server.patch(job, {"metadata": {"finalizers": None}}).refusal == ""
    server.delete(job)


def test_a_worker_writes_progress_and_result_only(server: Server) -> None:
    job = manifest("guarded", "written")
    assert server.create(job, keep=True).refusal == ""
    assert server.patch(job, {"status": {"jobName": "written-abc-1", "phase": "Compressing"}}, status=True).refusal == ""
    server.grant("guarded", "worker", "get,patch", f"{names.PLURAL}.{names.GROUP}/status")
    worker = server.as_account("guarded", "worker", pod="written-abc-1-x7f2p")
    wait_until(lambda: not worker.patch(job, {"status": {"progress": {"percent": 3}}}, status=True).refusal)
    assert worker.patch(job, {"status": {"result": {"ratio": "2x"}}}, status=True).refusal == ""
    ready = {"type": "Ready", "status": "True", "reason": "Mine", "lastTransitionTime": "2030-01-01T00:00:00Z"}
    for change in ({"phase": "Done"}, {"conditions": [ready]}, {"jobName": None}, {"observedGeneration": 7}):
        assert "only the operator writes status.observedGeneration" in worker.patch(job, {"status": change}, status=True).refusal
    namesake = server.as_account("elsewhere", "worker", pod="written-abc-1-x7f2p")
    server.grant("guarded", "elsewhere", "get,patch", f"{names.PLURAL}.{names.GROUP}/status", subject="elsewhere:worker")
    wait_until(lambda: "not of this CompressionJob" in namesake.patch(job, {"status": {"progress": {"percent": 4}}}, status=True).refusal)
    stranger = server.as_account("guarded", "worker", pod="another-job-1-x7f2p")
    assert "not of this CompressionJob" in stranger.patch(job, {"status": {"progress": {"percent": 4}}}, status=True).refusal
    minted = server.as_account("guarded", "worker", pod="")
    assert "with the token of its pod" in minted.patch(job, {"status": {"progress": {"percent": 4}}}, status=True).refusal
    unstarted = manifest("guarded", "unstarted")
    assert server.create(unstarted, keep=True).refusal == ""
    assert "not of this CompressionJob" in worker.patch(unstarted, {"status": {"progress": {"percent": 4}}}, status=True).refusal
    server.delete(unstarted)
    operator = server.as_account("guarded", "guard-kompressor", pod="guard-kompressor-5d9c-abcde")
    assert operator.patch(job, {"status": {"conditions": [ready], "phase": "Done"}}, status=True).refusal == ""
    assert operator.get(job)["status"]["progress"] == {"percent": 3}
    server.delete(job)


@pytest.mark.parametrize("policy", ["known-names", "status-writers"])
def test_policies_pass_the_type_checker(server: Server, policy: str) -> None:
    """The controller manager checks CEL against the CRD's types, and would warn in the policy's status."""
    name = f"guarded-guard-kompressor-{policy}"

    def status() -> dict[str, Any]:
        found: dict[str, Any] = server.cluster.get("validatingadmissionpolicy", name).get("status", {})
        return found

    wait_until(lambda: "typeChecking" in status())
    assert status()["typeChecking"] == {}


def test_an_administrator_in_a_pod_is_not_locked_out(server: Server) -> None:
    job = manifest("guarded", "mended")
    assert server.create(job, keep=True).refusal == ""
    server.cluster.kubectl("create", "clusterrolebinding", "toolbox", "--clusterrole=cluster-admin", "--serviceaccount=open:toolbox")
    admin = server.as_account("open", "toolbox", pod="toolbox-0")
    wait_until(lambda: not admin.patch(job, {"status": {"jobName": "mended-abc-1", "phase": "Failed"}}, status=True).refusal)
    server.cluster.kubectl("delete", "clusterrolebinding", "toolbox")
    server.delete(job)
