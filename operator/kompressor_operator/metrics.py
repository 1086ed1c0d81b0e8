"""What Prometheus is told: docs/metrics.md has the list. The only file that imports its client.

Counters of jobs are moved by whoever has just written the status that says so, so that two operators count an end once. What is
true at a moment (queue, jobs by phase, watches) is read when it is asked for.
"""

from __future__ import annotations

import asyncio
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import prometheus_client as prom
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from kompressor_api.names import Reason
from kompressor_operator.conditions import Event, Phase, Verdict
from kompressor_operator.object_meta import moment
from kompressor_operator.observed import CompressionJob, Key
from kompressor_operator.training import Training

REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
JOB_BUCKETS = (10.0, 30.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 14400.0, 43200.0, 86400.0)
LAG_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
LAG_INTERVAL = 0.25

_REASONS = frozenset(map(str, Reason))
_PHASES = frozenset(map(str, Phase))


@dataclass(frozen=True)
class Moment:
    """What is true now, asked for at every scrape."""

    depth: Callable[[], int]
    jobs: Callable[[], Mapping[tuple[str, str], int]]
    """(phase, reason) -> CompressionJobs."""
    requests: Mapping[tuple[str, str, int], int]
    """(verb, kind, code) -> requests made; moves by itself."""
    leading: Callable[[], bool]
    owed: Callable[[], float]
    """Seconds that a watch has owed something."""
    training: Callable[[], Mapping[Key, Training]]
    """Of the CompressionJobs that train now."""


class Metrics:
    """All counters and histograms of this process, in a registry of their own."""

    def __init__(self) -> None:
        prom.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = prom.CollectorRegistry()
        counter, histogram = partial(prom.Counter, registry=registry), partial(prom.Histogram, registry=registry)
        self._reconciles = counter("kompressor_reconciles", "Looks at a CompressionJob", ["outcome"])
        self._reconcile_seconds = histogram("kompressor_reconcile_seconds", "Time of one look", buckets=REQUEST_BUCKETS)
        self._wait_seconds = histogram("kompressor_queue_wait_seconds", "Time in the queue before a look", buckets=REQUEST_BUCKETS)
        self._finished = counter("kompressor_jobs_finished", "CompressionJobs that have ended", ["outcome", "reason"])
        self._job_seconds = histogram("kompressor_job_seconds", "From the first start to the end", ["outcome"], buckets=JOB_BUCKETS)
        self._attempts = counter("kompressor_attempts", "Child Jobs that compress, started", ["kind"])
        self._bytes = counter("kompressor_bytes_compressed", "Bytes of tensors read by jobs that completed")
        self._gpu_seconds = counter("kompressor_gpu_seconds", "GPUs times the seconds that containers ran, of jobs that have ended")
        self._cleanups = counter("kompressor_cleanup", "Deletions with deletionPolicy Delete", ["outcome"])
        self._request_seconds = histogram(
            "kompressor_api_request_seconds", "Time of a request to the API server", ["verb"], buckets=REQUEST_BUCKETS
        )
        self._lag = histogram("kompressor_loop_lag_seconds", "How late a timer of the event loop fires", buckets=LAG_BUCKETS)
        for outcome in ("ok", "retry", "error"):
            self._reconciles.labels(outcome)  # there from the beginning, so that a rate sees the first one
        prom.ProcessCollector(registry=registry)
        prom.GCCollector(registry=registry)
        prom.PlatformCollector(registry=registry)

    def add(self, moment_: Moment) -> None:
        """Serve this too."""
        self.registry.register(_AtAMoment(moment_))

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The body and its content type, for an Accept header."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def looked(self, outcome: str, seconds: float) -> None:
        self._reconciles.labels(outcome).inc()
        self._reconcile_seconds.observe(seconds)

    def waited(self, seconds: float) -> None:
        self._wait_seconds.observe(seconds)

    def requested(self, verb: str, seconds: float) -> None:
        self._request_seconds.labels(verb).observe(seconds)

    def told(self, before: CompressionJob, verdict: Verdict) -> None:
        """This verdict has just been written over that status."""
        facts = verdict.facts
        if facts.get("jobName") and facts["jobName"] != before.status.get("jobName"):
            self._attempts.labels("first" if facts.get("attempt", 1) == 1 else "next").inc()
        if verdict.phase not in (Phase.COMPLETE, Phase.FAILED) or before.finished:
            return
        outcome = str(verdict.phase).lower()
        self._finished.labels(outcome, bounded(verdict.reason)).inc()
        now = {**before.status, **{name: value for name, value in facts.items() if value is not None}}
        if now.get("startTime") and now.get("completionTime"):
            seconds = (moment(now["completionTime"]) - moment(now["startTime"])).total_seconds()
            self._job_seconds.labels(outcome).observe(max(0.0, seconds))
        self._gpu_seconds.inc(_amount(facts.get("gpuSeconds")))
        if verdict.phase is Phase.COMPLETE and verdict.reason != Reason.ALREADY_COMPRESSED:
            self._bytes.inc(_amount((now.get("result") or {}).get("sourceBytes")))

    def cleaned(self, event: Event | None) -> None:
        """The finalizer has just gone; without an event there was nothing to clean up."""
        if event is not None:
            self._cleanups.labels("cleaned" if event.reason == Reason.CLEANED_UP else "failed").inc()

    async def measure_lag(self) -> None:
        """A task of its own: it is late when something blocks the event loop."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_INTERVAL
            await asyncio.sleep(LAG_INTERVAL)
            self._lag.observe(max(0.0, loop.time() - due))


class _AtAMoment(Collector):
    def __init__(self, now: Moment) -> None:
        self._now = now

    def collect(self) -> Iterator[Metric]:
        now = self._now
        yield GaugeMetricFamily("kompressor_queue_depth", "CompressionJobs that wait for a look", value=now.depth())
        yield GaugeMetricFamily("kompressor_leader", "1: this operator does the work", value=int(now.leading()))
        yield GaugeMetricFamily("kompressor_watch_owed_seconds", "Since when a watch has not delivered", value=now.owed())
        jobs = GaugeMetricFamily("kompressor_jobs", "CompressionJobs that there are", labels=["phase", "reason"])
        tally: Tally[tuple[str, str]] = Tally()
        for (phase, reason), count in now.jobs().items():
            tally[bounded(phase, _PHASES), bounded(reason)] += count
        for labels, count in tally.items():
            jobs.add_metric(labels, count)
        yield jobs
        requests = CounterMetricFamily("kompressor_api_requests", "Requests to the API server", labels=["verb", "kind", "code"])
        for (verb, kind, code), count in now.requests.items():
            requests.add_metric((verb, kind, str(code)), count)
        yield requests
        yield from _training(now.training())


def _training(jobs: Mapping[Key, Training]) -> Iterator[Metric]:
    """By job, unlike all else: a loss is one job's, and no more of them train at once than there are GPUs for."""
    labels = ["kcj_namespace", "kcj"]  # `namespace` and `job` are those of the scraped target
    step = GaugeMetricFamily("kompressor_training_step", "Training steps done", labels=labels)
    steps = GaugeMetricFamily("kompressor_training_steps", "Training steps in all", labels=labels)
    loss = GaugeMetricFamily("kompressor_training_loss", "Training loss of the last step, in nats a token", labels=labels)
    speed = GaugeMetricFamily("kompressor_training_tokens_per_second", "Tokens trained on, by all processes together", labels=labels)
    for key, training in jobs.items():
        step.add_metric(key, training.step)
        steps.add_metric(key, training.steps)
        speed.add_metric(key, training.tokens_per_second)
        if training.loss is not None:
            loss.add_metric(key, training.loss)
    yield from (step, steps, loss, speed)


def bounded(text: str, known: frozenset[str] = _REASONS) -> str:
    """A label's value: one of ours, for a worker or a stranger may have written anything."""
    if not text:
        return "New"
    return str(text) if text in known else "Other"


def _amount(value: Any) -> int:
    """A number that somebody else has written."""
    return value if isinstance(value, int) and value > 0 else 0
