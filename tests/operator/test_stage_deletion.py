"""deletionPolicy Delete on the real control plane; what `kompressor clean` does is an actor's exit code here. And what is counted."""

from __future__ import annotations

import urllib.request
from datetime import datetime
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from stage import GO_ON, HELD, SUCCEED, Operator, Stage, eventually, gone, report

from kompressor_api import names

pytestmark = pytest.mark.cluster


def scrape(operator: Operator) -> dict[str, dict[str, float]]:
    """Sample name -> label values joined by / -> value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{operator.port()}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})["/".join(sample.labels[name] for name in sorted(sample.labels))] = sample.value
    return found


def play(stage: Stage, *script: str, name: str, code: int = 0) -> str:
    return stage.play(*script, name=name, deletionPolicy="Delete", output={"uri": f"s3://models/{name}-{code}"})


def cleanups(stage: Stage, uid: str) -> list[dict[str, Any]]:
    return [job for job in stage.jobs(uid) if job["metadata"]["labels"].get(names.LABEL_STEP) == "cleanup"]


def test_the_output_goes_before_the_resource_at_any_moment_and_with_any_propagation(stage: Stage) -> None:
    uids: dict[str, str] = {}
    with stage.operator() as operator:
        for name in ("background", "foreground", "refusing"):
            uids[name] = play(stage, SUCCEED, name=name, code=64 if name == "refusing" else 0)
        for name in ("middle", "down"):
            uids[name] = play(stage, "trap 'sleep 3; exit 75' TERM; echo acting; while :; do sleep 0.05; done", name=name)
        uids["retained"] = stage.play(SUCCEED, name="retained")
        for name in ("background", "foreground", "refusing", "retained"):
            stage.until("Completed", name)
        for name, uid in uids.items():
            kept = stage.get("compressionjobs", name)["metadata"].get("finalizers", [])
            assert kept == ([] if name == "retained" else [names.FINALIZER])
            assert not cleanups(stage, uid)
        stage.acting(uids["middle"]), stage.acting(uids["down"])
        for name in ("background", "foreground", "refusing", "middle", "retained"):
            stage.delete("compressionjobs", name, propagationPolicy="Foreground" if name == "foreground" else "Background")
        since = datetime.fromisoformat(stage.get("compressionjobs", "middle")["metadata"]["deletionTimestamp"])
        for name in ("background", "foreground", "refusing", "middle", "retained"):
            eventually(lambda name=name: gone(stage, name))
        (made,) = cleanups(stage, uids["middle"])
        waited = datetime.fromisoformat(made["metadata"]["creationTimestamp"]) - since
        assert waited.total_seconds() >= 2, "the worker takes three seconds to commit, and two on one output would be one too many"
        assert not cleanups(stage, uids["retained"])
        eventually(lambda: len(stage.events("refusing")) > 2)
        for name in ("background", "foreground", "middle"):
            assert stage.events(name)[-1] == "CleanedUp" and len(cleanups(stage, uids[name])) == 1
        assert stage.events("refusing")[-1] == "CleanupFailed"
        assert scrape(operator)["kompressor_cleanup_total"] == {"cleaned": 3, "failed": 1}
    stage.delete("compressionjobs", "down", propagationPolicy="Background")
    assert not gone(stage, "down") and not cleanups(stage, uids["down"]), "it waits for the operator"
    with stage.operator():
        eventually(lambda: gone(stage, "down"))
        eventually(lambda: stage.events("down")[-1] == "CleanedUp")


def test_nothing_hangs_where_no_clean_up_job_can_be_made(stage: Stage) -> None:
    """A full quota: a warning, and the finalizer goes. A namespace that is deleted: it goes at once."""
    mine = stage.namespace
    with stage.operator(backoff_maximum_seconds="0.2"):
        play(stage, SUCCEED, name="play")
        stage.until("Completed")
        stage.create("resourcequotas", {"metadata": {"name": "none"}, "spec": {"hard": {"count/jobs.batch": "0"}}})
        eventually(lambda: stage.get("resourcequotas", "none").get("status", {}).get("hard"))
        stage.delete("compressionjobs", "play", propagationPolicy="Background")
        eventually(lambda: gone(stage, "play"))
        eventually(lambda: stage.events()[-1] == "CleanupFailed")
        (warning,) = [event for event in stage.list("events") if event["reason"] == "CleanupFailed"]
        assert "exceeded quota" in warning["message"] and "s3://models/play-0" in warning["message"]
    stage.enter_namespace()
    doomed = stage.namespace
    try:
        with stage.operator() as operator:
            uid = play(stage, GO_ON, name="play")
            stage.acting(uid)
            stage.leave_namespace()
            eventually(lambda: doomed not in [ns["metadata"]["name"] for ns in stage.api.call("GET", "/api/v1/namespaces")["items"]])
            assert scrape(operator)["kompressor_cleanup_total"] == {"failed": 1}, "what is left behind is counted"
    finally:
        stage.namespace = mine


def test_three_jobs_are_counted_as_they_were(stage: Stage, operator: Operator) -> None:
    worker = {"resources": {"limits": {"memory": "64Mi"}}}
    stage.play(SUCCEED, name="one", worker=worker)
    stage.play('[ "$KOMPRESSOR_MEMORY_PLAN" = 1 ] || exit 71', SUCCEED, name="two")
    stage.play(report("SourceNotFound", "no such bucket", 64), name="three")
    stage.play(HELD, "held end", SUCCEED, name="held")
    for name, reason in (("one", "Completed"), ("two", "Completed"), ("three", "SourceNotFound"), ("held", "Compressing")):
        stage.until(reason, name)
    found = scrape(operator)
    assert found["kompressor_jobs_finished_total"] == {"complete/Completed": 2, "failed/SourceNotFound": 1}
    assert found["kompressor_jobs"] == {"Complete/Completed": 2, "Failed/SourceNotFound": 1, "Compressing/Compressing": 1}
    assert found["kompressor_attempts_total"] == {"first": 4, "next": 1}
    assert found["kompressor_job_seconds_count"] == {"complete": 2, "failed": 1} and found["kompressor_leader"] == {"": 1}
    assert found["kompressor_bytes_compressed_total"] == {"": 200} and found["kompressor_reconciles_total"]["error"] == 0
    assert found["kompressor_api_requests_total"]["201/Job/POST"] == 5
    entry = operator.said("SourceNotFound")[0]
    about = {name: entry[name] for name in ("namespace", "job", "reason", "attempt")}
    assert about == {"namespace": stage.namespace, "job": "three", "reason": "SourceNotFound", "attempt": 1}
