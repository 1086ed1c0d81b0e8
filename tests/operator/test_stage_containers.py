"""Containers beside the worker's on a real node, and the pods of clean-ups: what they wait for is told while they wait."""

from __future__ import annotations

from typing import Any

import pytest
from stage import HELD, IMAGE, SUCCEED, Operator, Stage, eventually, gone

from kompressor_api import names

pytestmark = pytest.mark.cluster

RESTRICTED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def before(script: str, **fields: Any) -> dict[str, Any]:
    """spec.worker with an init container that does this."""
    one = {"name": "fetch", "image": "worker:1", "command": ["sh", "-c", script], "securityContext": RESTRICTED}
    return {"podTemplate": {"spec": {"initContainers": [one | fields]}}}


def test_an_init_container_that_holds_the_worker_up_is_named(stage: Stage, operator: Operator) -> None:
    key = [{"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}]
    crash = "echo no license > /dev/termination-log; exit 65"  # a code that is final for the worker, and for it alone
    stage.play(SUCCEED, name="pulls", worker=before("exit 0", image="nowhere:9"))
    stage.play(SUCCEED, name="waits", worker=before("exit 0", env=key))
    stage.play(SUCCEED, name="crashes", worker=before(crash))
    probe = {"exec": {"command": ["sh", "-c", "exit 1"]}, "periodSeconds": 1, "failureThreshold": 1000}
    stage.play(SUCCEED, name="loops", worker=before(crash, restartPolicy="Always", startupProbe=probe))
    for name, reason, words in (
        ("pulls", "ImagePullFailed", ("init container fetch", "nowhere:9")),
        ("waits", "SecretMissing", ("init container fetch", '"hub" not found', "create the Secret")),
        ("loops", "ContainerFailed", ("sidecar fetch ended with exit code 65; it said last: no license", "kubectl logs POD -c CONTAINER")),
        ("crashes", "Retrying", ("init container fetch ended with exit code 65; it said last: no license", "the next pod follows")),
    ):
        stage.until(reason, name)
        assert not [word for word in words if word not in stage.message(name)], stage.message(name)
        assert stage.conditions(name)["Reconciling"] == "True"
        eventually(lambda name=name, reason=reason: stage.events(name) == [reason])
    stage.create("secrets", {"metadata": {"name": "hub"}, "stringData": {"token": "a"}})
    stage.until("Completed", "waits")
    stage.patch("compressionjobs", "crashes", {"spec": {"retry": {"limit": 0}}})
    status = stage.until("ContainerFailed", "crashes")
    assert "(spec.retry.limit 0): pod " in stage.message("crashes") and "init container fetch ended" in stage.message("crashes")
    assert status["attempt"] == 1 and status["failures"] >= 1 and stage.conditions("crashes")["Failed"] == "True"


def test_a_container_that_outlives_the_worker_is_named_and_ends_with_the_job(stage: Stage, operator: Operator) -> None:
    logs = {"name": "logs", "image": "worker:1", "command": ["sh", "-c", f"{HELD}; held go"], "securityContext": RESTRICTED}
    ours = [{"name": n, "valueFrom": {"fieldRef": {"fieldPath": p}}} for n, p in {"POD_NAMESPACE": "metadata.namespace"}.items()]
    logs |= {"env": [*ours, {"name": "PLAY", "value": "play"}]}
    stage.play(SUCCEED, worker={"podTemplate": {"spec": {"containers": [logs]}}})
    stage.until("ContainerLingers")
    assert "exit code 0, and container logs still runs; end it" in stage.message() and stage.conditions()["Reconciling"] == "True"
    stage.cue("go")
    stage.until("Completed")


def test_what_the_pod_of_a_clean_up_waits_for_is_told_while_it_waits(stage: Stage, operator: Operator) -> None:
    """Of a job that never ran, for want of its image, and of one that has completed, whose Secret is gone since."""
    kept = {"deletionPolicy": "Delete"}
    secret = {"metadata": {"name": "results"}, "stringData": {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}}
    stage.create("secrets", secret)
    stage.play(SUCCEED, name="image", worker={"image": "late:1"}, output={"uri": "s3://models/image-0"}, **kept)
    stage.play(SUCCEED, name="secret", output={"uri": "s3://models/secret-0", "credentialsSecret": "results"}, **kept)
    ends = {"image": "ImagePullFailed", "secret": "Completed"}
    for name, reason in ends.items():
        stage.until(reason, name)
    stage.delete("secrets", "results")
    for name in ends:
        stage.delete("compressionjobs", name, propagationPolicy="Background")
    for name, reason, words in (("image", "ImagePullFailed", "late:1"), ("secret", "SecretMissing", '"results" not found')):
        blocked = eventually(lambda name=name: stage.condition(name, "CleanupBlocked"))
        assert (blocked["status"], blocked["reason"]) == ("True", reason)
        assert blocked["message"].startswith("the clean-up waits: pod ") and words in blocked["message"]
        assert stage.reason(name) == ends[name], "which goes on telling how the job ended, or stood"
        eventually(lambda name=name, words=words: any(words in e["message"] for e in stage.list("events") if clean_up_of(e, name)))
    stage.cluster.add_images({"late:1": IMAGE})
    stage.create("secrets", secret)
    for name in ends:
        eventually(lambda name=name: gone(stage, name))
        eventually(lambda name=name: stage.events(name)[-1] == "CleanedUp")


def clean_up_of(event: dict[str, Any], name: str) -> bool:
    about = event["involvedObject"]
    return about["kind"] == names.KIND and about["name"] == name and event["message"].startswith("the clean-up waits")
