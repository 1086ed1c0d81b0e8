"""What Prometheus is told, read back by its client's own parser."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from kcj_builders import NOW, PASSES, SETTINGS, ago, child, child_body, condition, job_body, kcj, pod
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families

from kompressor_operator.cluster import ApiError, Cluster
from kompressor_operator.conditions import Event, Phase, Verdict
from kompressor_operator.decide import Decision, View
from kompressor_operator.health import Health, Watchdog, serve_probes
from kompressor_operator.metrics import Metrics, Moment, bounded
from kompressor_operator.object_meta import stamp
from kompressor_operator.observed import ChildJob
from kompressor_operator.pods import Terminated
from kompressor_operator.reconcile import Reconciler
from kompressor_operator.store import Store, observe
from kompressor_operator.usage import with_usage
from kompressor_operator.work import RetryLater, WorkQueue

DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def read(metrics: Metrics) -> dict[str, dict[tuple[str, ...], float]]:
    """Sample name -> label values, in the order of their names -> value."""
    body, content_type = metrics.exposition("text/plain;version=0.0.4")
    assert content_type.startswith("text/plain")
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels[name] for name in sorted(sample.labels))] = sample.value
    return found


def now(**fields: Any) -> Moment:
    nothing: dict[str, Any] = {"depth": lambda: 0, "jobs": dict, "requests": {}, "leading": lambda: True, "owed": lambda: 0.0}
    return Moment(**(nothing | {"training": dict} | fields))


def complete(**facts: Any) -> Verdict:
    return Verdict(Phase.COMPLETE, "Completed", "done", facts={"completionTime": stamp(NOW), "startTime": stamp(ago(90)), **facts})


def test_the_documented_metrics_are_the_ones_that_are_served() -> None:
    metrics = Metrics()
    metrics.add(now(jobs=lambda: {("Pending", "Pending"): 1}, requests={("GET", "Job", 200): 1}))
    body, _ = metrics.exposition("application/openmetrics-text; version=1.0.0")
    kinds = {family.name: family.type for family in open_metrics(body.decode()) if family.name.startswith("kompressor_")}
    documented = {name.removesuffix("_total"): kind for name, kind in re.findall(r"^\| `(\w+)` \| (\w+) \|", DOCS.read_text(), re.M)}
    assert kinds == documented
    assert {family.name for family in open_metrics(body.decode())} >= {"process_resident_memory_bytes", "process_cpu_seconds"}


def test_a_life_is_counted_by_what_was_written() -> None:
    metrics, job = Metrics(), kcj()
    metrics.told(job, Verdict(Phase.PENDING, "Pending", "", facts={"jobName": "llama-1", "attempt": 1}))
    named = kcj(status={"jobName": "llama-1", "startTime": stamp(ago(90))})
    metrics.told(named, Verdict(Phase.COMPRESSING, "Compressing", "", facts={"jobName": "llama-1", "attempt": 1}))
    metrics.told(named, Verdict(Phase.RETRYING, "Retrying", "", facts={"jobName": "llama-2", "attempt": 2}))
    metrics.told(named, complete(gpuSeconds=40, result={"sourceBytes": 100}))
    found = read(metrics)
    assert found["kompressor_attempts_total"] == {("first",): 1, ("next",): 1}
    assert found["kompressor_jobs_finished_total"] == {("complete", "Completed"): 1}
    assert found["kompressor_job_seconds_sum"] == {("complete",): 90} and found["kompressor_bytes_compressed_total"] == {(): 100}
    assert found["kompressor_gpu_seconds_total"] == {(): 40}


def test_an_end_is_counted_once_and_bytes_only_where_something_was_compressed() -> None:
    metrics = Metrics()
    over = kcj(status={"conditions": [condition("Complete")], "result": {"sourceBytes": 100}})
    metrics.told(over, complete())  # the same end in other words
    assert "kompressor_jobs_finished_total" not in read(metrics)
    metrics.told(kcj(status={"result": {"sourceBytes": 100}}), Verdict(Phase.COMPLETE, "AlreadyCompressed", ""))
    metrics.told(kcj(), Verdict(Phase.FAILED, "InvalidSpec", "", facts={"completionTime": stamp(NOW)}))
    metrics.told(kcj(), Verdict(Phase.FAILED, "TheWorkersOwn7", ""))
    metrics.told(kcj(status={"result": {"sourceBytes": "many"}}), complete())
    found = read(metrics)
    assert found["kompressor_bytes_compressed_total"] == {(): 0}
    assert found["kompressor_jobs_finished_total"] == {
        ("complete", "AlreadyCompressed"): 1,
        ("failed", "InvalidSpec"): 1,
        ("failed", "Other"): 1,
        ("complete", "Completed"): 1,
    }
    assert bounded("") == "New" and bounded("Nonsense") == "Other" and bounded("OutOfMemory") == "OutOfMemory"


async def test_only_what_was_written_is_counted() -> None:
    """Of two operators that see the same end, the one whose conditional write succeeds."""
    store, refusing = Store(), [True]

    class OneAnswer:
        async def patch(self, kind: str, namespace: str, name: str, body: Any, status: bool = False) -> Any:
            if refusing[0]:
                raise ApiError("patching", 409, "Conflict", "the object has been modified")
            return job_body(version=2, status=body["status"])

        async def create(self, body: Any) -> Any:
            return body

    store.tell_resource(job_body())
    decided = Decision(verdict=complete(jobName="llama-1"))
    reconciler = Reconciler(cast(Cluster, OneAnswer()), store, SETTINGS, PASSES, policies=(lambda view: decided,))
    with pytest.raises(RetryLater):
        await reconciler.reconcile(("team", "llama"))
    assert "kompressor_jobs_finished_total" not in read(reconciler.metrics)
    refusing[0] = False
    for _ in range(2):
        await reconciler.reconcile(("team", "llama"))
    found = read(reconciler.metrics)
    assert found["kompressor_jobs_finished_total"] == {("complete", "Completed"): 1}
    assert found["kompressor_attempts_total"] == {("first",): 1}


def test_jobs_by_phase_and_reason_come_from_what_the_watches_told() -> None:
    store, metrics = Store(), Metrics()
    metrics.add(now(jobs=store.tally))

    def tell(name: str, phase: str, reason: str, deleted: bool = False) -> None:
        meta = {"namespace": "team", "name": name, "uid": name, "resourceVersion": str(len(store.keys) + 1 + 100 * deleted)}
        status = {"phase": phase, "conditions": [condition("Ready", "False", reason=reason)]} if phase else {"observedGeneration": -1}
        store.tell_resource({"metadata": meta, "spec": {}, "status": status}, deleted)

    for name in "abc":
        tell(name, "Compressing", "Compressing")
    tell("d", "Failed", "Mine1")
    tell("e", "Failed", "Mine2")
    tell("f", "", "")
    tell("a", "Compressing", "Compressing", deleted=True)
    assert read(metrics)["kompressor_jobs"] == {("Compressing", "Compressing"): 2, ("Failed", "Other"): 2, ("New", "New"): 1}


def test_gpu_seconds_are_those_of_containers_that_ran() -> None:
    def ran(suffix: str, seconds: float, **fields: Any) -> Any:
        ended = Terminated(74, "Error", "", finished_at=stamp(ago(5)), started_at=stamp(ago(5 + seconds)))
        return pod(suffix=suffix, phase="Failed", terminated=ended, **fields)

    job = child(gpus=2, ended="Failed", started=ago(5000))
    unknown = pod(suffix="d", phase="Failed", terminated=Terminated(137, "ContainerStatusUnknown", "", finished_at=stamp(ago(5))))
    pods = [ran("a", 30), ran("b", 12), pod(suffix="c", phase="Failed"), unknown]
    view = View(kcj(), observe([job], pods), NOW, SETTINGS, PASSES)
    assert with_usage(view, complete()).facts["gpuSeconds"] == 84, "not the hour that it waited for a node"
    assert "gpuSeconds" not in with_usage(view, Verdict(Phase.COMPRESSING, "Compressing", "")).facts
    without = View(kcj(), observe([child(gpus=0)], pods), NOW, SETTINGS, PASSES)
    assert "gpuSeconds" not in with_usage(without, complete()).facts


@pytest.mark.parametrize(("limits", "gpus"), [({"nvidia.com/gpu": "2", "cpu": "8"}, 2), ({"memory": "1Gi"}, 0), (None, 0)])
def test_a_child_job_says_how_many_gpus_it_asks_for(limits: dict[str, str] | None, gpus: int) -> None:
    container = {"name": "worker", "image": "x"} | ({"resources": {"limits": limits}} if limits else {})
    body = child_body(spec={"template": {"spec": {"containers": [{"name": "sidecar"}, container]}}})
    assert ChildJob.parse(body).gpus == gpus


def test_jobs_that_train_are_told_one_by_one_for_as_long_as_they_do() -> None:
    metrics, store = Metrics(), Store()
    metrics.add(now(training=store.training))
    progress = {"step": 40, "stepsTotal": 100, "loss": "2.125", "tokensPerSecond": 900}
    store.tell_resource(job_body(status={"phase": "Compressing", "progress": progress}))
    store.tell_resource(_named("early", 2, progress={"unit": "model.layers.0"}))
    store.tell_resource(_named("odd", 2, progress={"step": 1, "stepsTotal": "many", "loss": "nan", "tokensPerSecond": -1}))
    found = read(metrics)
    mine, odd = ("llama", "team"), ("odd", "team")
    assert found["kompressor_training_step"] == {mine: 40, odd: 1}
    assert found["kompressor_training_steps"] == {mine: 100, odd: 0}
    assert found["kompressor_training_loss"] == {mine: 2.125}, "what is no number is not told"
    assert found["kompressor_training_tokens_per_second"] == {mine: 900, odd: 0}
    store.tell_resource(job_body(version=5, status={"phase": "Complete", "progress": progress}))
    assert read(metrics)["kompressor_training_step"] == {odd: 1}


def _named(name: str, version: int, progress: dict[str, Any]) -> dict[str, Any]:
    body = job_body(uid=name, version=version, status={"phase": "Compressing", "progress": progress})
    body["metadata"]["name"] = name
    return body


async def test_the_queue_tells_how_long_it_took_and_how_it_went() -> None:
    metrics, left = Metrics(), [RetryLater("again"), ValueError("x"), None]

    async def handle(_: tuple[str, str]) -> None:
        await asyncio.sleep(0.02)
        problem = left.pop(0) if left else None
        if problem:
            raise problem

    queue = WorkQueue(handle, initial=0.001, maximum=0.01, waited=metrics.waited, looked=metrics.looked)
    queue.add(("team", "a"))
    await asyncio.sleep(0.05)
    queue.start(1)
    async with asyncio.timeout(30):
        while left or not read(metrics)["kompressor_reconciles_total"][("ok",)]:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    await queue.stop(1)
    found = read(metrics)
    assert found["kompressor_reconciles_total"] == {("ok",): 1, ("retry",): 1, ("error",): 1}
    assert found["kompressor_reconcile_seconds_sum"][()] >= 0.06 and found["kompressor_queue_wait_seconds_sum"][()] >= 0.05


async def test_what_blocks_the_loop_shows_as_lag() -> None:
    metrics = Metrics()
    task = asyncio.create_task(metrics.measure_lag())
    await asyncio.sleep(0.1)
    time.sleep(0.6)  # noqa: ASYNC251
    await asyncio.sleep(0.01)
    task.cancel()
    assert read(metrics)["kompressor_loop_lag_seconds_sum"][()] >= 0.3


async def test_it_is_served_beside_the_probes_with_what_is_true_now() -> None:
    metrics, clock = Metrics(), [100.0]
    dog = Watchdog(stale_seconds=100, clock=lambda: clock[0])
    owed = frozenset({("jobs", ("team", "a"), 5)})
    requests: Counter[tuple[str, str, int]] = Counter()
    metrics.add(now(depth=lambda: 3, requests=requests, leading=lambda: False, owed=lambda: dog.longest(owed, clock[0])))
    runner, port = await serve_probes(Health(lambda: "", standby=True, exposition=metrics.exposition), "127.0.0.1", 0)
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            await session.get("/metrics")
            requests["POST", "Job", 201] += 4
            clock[0] += 7
            metrics.cleaned(Event(False, "CleanedUp", ""))
            metrics.cleaned(Event(True, "CleanupFailed", ""))
            metrics.cleaned(None)
            async with session.get("/metrics") as answer:
                assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/plain")
                text = await answer.text()
            async with session.get("/readyz") as answer:
                assert (answer.status, await answer.text()) == (200, "standby")
    finally:
        await runner.cleanup()
    found = {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}
    assert (found["kompressor_queue_depth"], found["kompressor_leader"], found["kompressor_watch_owed_seconds"]) == (3, 0, 7)
    assert found["kompressor_api_requests_total"] == 4
    assert 'kompressor_cleanup_total{outcome="cleaned"} 1.0' in text and 'kompressor_cleanup_total{outcome="failed"} 1.0' in text
