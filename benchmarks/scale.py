"""Thousands of CompressionJobs: `python benchmarks/scale.py --jobs 1000 5000 10000`. Prints a table, and each run as a line of JSON.

For each size a control plane of its own, with KWOK in place of nodes: every pod runs for two seconds and ends well. In one run, by turns:
1. all jobs are applied through sixteen connections, and the operator does what it can: its greatest rate, its memory, its requests;
2. a bare client makes the recorded calls of as many lives (at most 2,000), sixteen at a time: what this API server takes on these cores;
   half of them before 1 and half after it, so that what else the machine does counts for both. Its clock stops with its last call, when
   most of its pods wait still, and once more when they have ended: beside the one stands our rate of Jobs started, beside the other that
   of resources complete;
3. once the controllers are done with what that has left to them (ended pods beyond 12,500 are collected for minutes), jobs come at a
   third of the greatest rate for a minute: the delays that a cluster in order sees.
Exit code 1 below half of either of the bare client's rates, above a p99 of 1 s at a third of it, 12 requests a job there, or 200 MB.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

# crowded_stage makes the rest importable
from crowded_stage import CrowdedStage, RunningOperator, cpu_seconds, crowded_stage, running_operator

# isort: split
from plain_api import Api
from stage import Stage

from bare_client import Call, live, recorder
from crowd import Crowd, delays, gathered
from figures import percentile, table

BARE_JOBS = 2000
STEADY_SECONDS = 60.0
SHARE, P99, REQUESTS, RSS = 0.5, 1.0, 12.0, 200.0
PATIENCE = 120.0
CALM, LOOK_SECONDS, LONGEST = 0.5, 5.0, 900.0
"""Cores that all processes together take when nothing is left to do, looked at for so long; seconds after which it goes on anyway."""
RECORDED = "recorded-life"
UNCOUNTED = ("LIST", "GET API")


@dataclass
class Run:
    """Figures of one size. Rates in jobs a second, delays in seconds, memory in MB, CPU in milliseconds a job."""

    jobs: int
    started: float = 0.0
    rate: float = 0.0
    """Until all are complete; `started`: until all have the Job that compresses."""
    bare: float = 0.0
    bare_ended: float = 0.0
    """Until its pods have ended; `bare`: until its last call is answered."""
    ratio: float = 0.0
    ratio_ended: float = 0.0
    first_job: tuple[float, float] = (0.0, 0.0)
    """p50 and p99 from apply to the first child Job; `told`: from the Job's end to Complete."""
    told: tuple[float, float] = (0.0, 0.0)
    requests: float = 0.0
    kinds: dict[str, int] = field(default_factory=dict)
    calm_after: float = 0.0
    """Seconds from the end of the bare client's second half until the controllers rested."""
    steady_rate: float = 0.0
    steady_first_job: tuple[float, float] = (0.0, 0.0)
    steady_told: tuple[float, float] = (0.0, 0.0)
    steady_requests: float = 0.0
    steady_kinds: dict[str, int] = field(default_factory=dict)
    rss: float = 0.0
    peak_rss: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)
    """By process, while all came at once; `bare_cpu`: of the second half of the bare client's; `steady_cpu`: at a third of the rate."""
    bare_cpu: dict[str, float] = field(default_factory=dict)
    steady_cpu: dict[str, float] = field(default_factory=dict)
    load: float = 0.0

    @property
    def good(self) -> bool:
        late = max(self.steady_first_job[1], self.steady_told[1])
        return min(self.ratio, self.ratio_ended) >= SHARE and late < P99 and self.steady_requests <= REQUESTS + 0.2 and self.peak_rss < RSS


async def measure(jobs: int, preflight: str) -> Run:
    run = Run(jobs)
    with crowded_stage() as stage:
        before, life = await record(stage, preflight)
        print(json.dumps({"calls": Counter(f"{call.method} {call.path.split('?')[0].split('/')[-1]}" for call in life)}), flush=True)
        async with running_operator(stage) as operator, gathered(stage, operator.needs, preflight) as crowd:
            halves = [await beside(run, stage, life, before, preflight)]
            await all_at_once(run, crowd, operator)
            halves.append(await beside(run, stage, life, before, preflight))
            run.bare, run.bare_ended = (min(run.jobs, BARE_JOBS) // 2 * 2 / sum(seconds) for seconds in zip(*halves, strict=True))
            run.ratio, run.ratio_ended = run.started / run.bare, run.rate / run.bare_ended
            run.calm_after = await calm(operator)
            await steadily(run, crowd, operator)
    return run


async def record(stage: CrowdedStage, preflight: str) -> tuple[tuple[str, str, str], list[Call]]:
    """One life, through a recorder: whose it was (namespace, name, uid), and its calls."""
    async with (
        recorder(stage) as (found, kubeconfig),
        running_operator(stage, kubeconfig) as operator,
        gathered(stage, operator.needs, preflight) as crowd,
    ):
        found.calls.clear()
        await crowd.apply([RECORDED])
        await crowd.complete([RECORDED], PATIENCE)
        await asyncio.sleep(3)  # its TTL
        told = await crowd.call("GET", stage.path("compressionjobs", RECORDED))
        await crowd.call("DELETE", stage.path("compressionjobs", RECORDED))
    return (stage.namespace, RECORDED, told["metadata"]["uid"]), found.calls


async def all_at_once(run: Run, crowd: Crowd, operator: RunningOperator) -> None:
    wanted = [f"flood-{number}" for number in range(run.jobs)]
    asked, began = operator.requests(), time.monotonic()
    with cpu(run.cpu, crowd.stage, run.jobs, operator):
        await asyncio.gather(crowd.apply(wanted), asyncio.sleep(1))
        await crowd.complete(wanted, PATIENCE)
    run.started = run.jobs / (max(crowd.times[name].started for name in wanted) - began)
    run.rate = run.jobs / (max(crowd.times[name].complete for name in wanted) - began)
    run.first_job, run.told = middle_and_tail(crowd, wanted)
    await asyncio.sleep(5)  # the TTL of the last ones is written after they are complete
    run.requests = made(operator, asked) / run.jobs
    run.kinds = dict(operator.requests() - asked)
    run.rss, run.peak_rss, run.load = operator.rss, operator.peak_rss, os.getloadavg()[0]


async def beside(run: Run, stage: Stage, life: Sequence[Call], before: tuple[str, str, str], preflight: str) -> tuple[float, float]:
    """Half of the bare client's jobs, in a namespace that the benchmark watches like the other, and the operator does not: the seconds
    until the last call was answered, and until the pods had ended."""
    other = copy.copy(stage)
    other.api = Api(stage.cluster)
    other.enter_namespace()
    wanted = [f"bare-{number}" for number in range(min(run.jobs, BARE_JOBS) // 2)]
    async with gathered(other, (), preflight):
        began = time.monotonic()
        with cpu(run.bare_cpu, stage, len(wanted)):
            seconds = await live(other, life, before, wanted, preflight)
        await ended(other)
        return seconds, time.monotonic() - began


async def calm(operator: RunningOperator) -> float:
    """Returns when nothing is left to do: the seconds that it took."""
    began, used = time.monotonic(), sum(map(cpu_seconds, operator.needs))
    while time.monotonic() - began < LONGEST:
        await asyncio.sleep(LOOK_SECONDS)
        before, used = used, sum(map(cpu_seconds, operator.needs))
        if used - before < CALM * LOOK_SECONDS:
            break
    return time.monotonic() - began


async def steadily(run: Run, crowd: Crowd, operator: RunningOperator) -> None:
    run.steady_rate = run.rate / 3
    wanted = [f"steady-{number}" for number in range(round(run.steady_rate * STEADY_SECONDS))]
    asked = operator.requests()
    with cpu(run.steady_cpu, crowd.stage, len(wanted), operator):
        await crowd.apply(wanted, run.steady_rate)
        await crowd.complete(wanted, PATIENCE)
    run.steady_first_job, run.steady_told = middle_and_tail(crowd, wanted)
    await asyncio.sleep(5)
    run.steady_requests = made(operator, asked) / len(wanted)
    run.steady_kinds = dict(operator.requests() - asked)
    run.peak_rss = max(run.peak_rss, operator.peak_rss)


async def ended(stage: Stage) -> None:
    """Returns when the pods of this namespace have. Looked at now and then: a look costs the API server some milliseconds."""
    query = "?limit=1&fieldSelector=status.phase!=Succeeded"
    while (await asyncio.to_thread(stage.api.call, "GET", stage.path("pods") + query))["items"]:  # noqa: ASYNC110  # it happens elsewhere
        await asyncio.sleep(1)


def middle_and_tail(crowd: Crowd, wanted: Sequence[str]) -> tuple[tuple[float, float], tuple[float, float]]:
    first, told = zip(*delays(crowd.times, wanted), strict=True)
    return (percentile(first, 50), percentile(first, 99)), (percentile(told, 50), percentile(told, 99))


def made(operator: RunningOperator, before: Counter[str]) -> int:
    """Requests since then, without what is the same for any number of jobs."""
    return sum(count for what, count in (operator.requests() - before).items() if not what.startswith(UNCOUNTED))


@contextmanager
def cpu(told: dict[str, float], stage: Stage, jobs: int, operator: RunningOperator | None = None) -> Iterator[None]:
    """Puts the milliseconds a job of each process there."""
    processes = dict(stage.cluster.processes) | ({"operator": operator.process} if operator else {})
    before = {name: cpu_seconds(process) for name, process in processes.items()}
    yield
    told.update({name: 1000 * (cpu_seconds(process) - before[name]) / jobs for name, process in processes.items()})


def show(runs: Sequence[Run]) -> str:
    """One column a run."""
    two = "{0[0]:.2f} / {0[1]:.2f} s".format
    rows = {
        "all at once: jobs started / complete a second": [f"{run.started:.1f} / {run.rate:.1f}" for run in runs],
        "bare client: calls made / pods ended": [f"{run.bare:.1f} / {run.bare_ended:.1f}" for run in runs],
        "ours / bare": [f"{run.ratio:.2f} / {run.ratio_ended:.2f}" for run in runs],
        "apply to Job, p50 / p99": [two(run.first_job) for run in runs],
        "Job's end to Complete, p50 / p99": [two(run.told) for run in runs],
        "requests a job": [f"{run.requests:.1f}" for run in runs],
        "a third of that: jobs a second": [f"{run.steady_rate:.1f}" for run in runs],
        "apply to Job then, p50 / p99": [two(run.steady_first_job) for run in runs],
        "Job's end to Complete then, p50 / p99": [two(run.steady_told) for run in runs],
        "requests a job then": [f"{run.steady_requests:.1f}" for run in runs],
        "operator's memory with all of them / peak": [f"{run.rss:.0f} / {run.peak_rss:.0f} MB" for run in runs],
        "CPU a job: operator / API server / etcd / controllers": [milliseconds(run.cpu, "operator") for run in runs],
        "CPU a job at a third": [milliseconds(run.steady_cpu, "operator") for run in runs],
        "CPU a bare job: API server / etcd / controllers": [milliseconds(run.bare_cpu) for run in runs],
    }
    return table(["", *(f"{run.jobs:,} jobs" for run in runs)], [[name, *cells] for name, cells in rows.items()])


def milliseconds(cpu: dict[str, float], *before: str) -> str:
    return " / ".join(f"{cpu[name]:.0f}" for name in (*before, "kube-apiserver", "etcd", "kube-controller-manager")) + " ms"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1000, 5000, 10000])
    parser.add_argument("--preflight", choices=("Job", "Skip"), default="Job")
    options = parser.parse_args()
    runs = []
    for jobs in options.jobs:
        runs.append(asyncio.run(measure(jobs, options.preflight)))
        print(json.dumps(asdict(runs[-1])), flush=True)
    print(show(runs))
    return 0 if all(run.good for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
