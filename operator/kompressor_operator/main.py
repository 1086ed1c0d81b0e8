"""Kopf wiring, and the order in which everything starts and stops.

Kopf keeps the watches. Its `on.event` handlers only put a key into our own queue: they write nothing, so there are no finalizers, no
annotations and no handler state. Our tasks exist before Kopf starts, so that it leaves them alone when it stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import socket
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from typing import Any

import kopf
from kopf._core.reactor.inventory import ResourceMemories, ResourceMemory

from kompressor_api import names
from kompressor_operator import logs
from kompressor_operator.cluster import Cluster
from kompressor_operator.health import Health, Watchdog, serve_probes
from kompressor_operator.leader import Leader, LeaseLost
from kompressor_operator.metrics import Metrics, Moment
from kompressor_operator.observed import Key, Manifest
from kompressor_operator.reconcile import Reconciler
from kompressor_operator.relist import Relister
from kompressor_operator.server_clock import utc_now
from kompressor_operator.settings import SettingError, Settings
from kompressor_operator.store import Store
from kompressor_operator.validation import known_passes
from kompressor_operator.work import WorkQueue

log = logging.getLogger(__name__)

KOPF_RESTART_SECONDS = 2.0
FULL_COLLECTION = 100
"""Collections of the middle generation until all records of all jobs are looked through; Python's own is 10."""
KOPF_WORKERS = 1000
"""Objects of a kind whose events Kopf hands over at once; each stays for its idle timeout, so thousands a second pass."""


class Patience:
    """Pauses between retries of Kopf's own requests, without end: an API server that is away is no reason to stop."""

    def __iter__(self) -> Iterator[float]:
        yield from (0.5, 1.0, 2.0, 3.0)
        while True:
            yield 5.0


def registry_for(store: Store, queue: WorkQueue, cluster: Cluster) -> kopf.OperatorRegistry:
    """The three watches: tell the store, enqueue the key; behind the news where only a child of a job that is over has changed."""
    registry = kopf.OperatorRegistry()

    def watch(group: str, version: str, plural: str, tell: Callable[[Manifest, bool], Key | None]) -> None:
        @kopf.on.event(group, version, plural, registry=registry, id=plural)
        async def seen(event: kopf.RawEvent, **_: Any) -> None:
            key = tell(dict(event["object"]), event["type"] == "DELETED")
            if key is not None:
                queue.add(key, sweep=plural != names.PLURAL and store.over(key))

    watch(names.GROUP, names.VERSION, names.PLURAL, store.tell_resource)
    watch("batch", "v1", "jobs", store.tell_job)
    watch("", "v1", "pods", store.tell_pod)

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.ConnectionInfo:
        known = await cluster.connection()
        return kopf.ConnectionInfo(
            server=known.server,
            ca_path=known.ca_path,
            insecure=not known.verify,
            token=known.token,
            certificate_path=known.certificate_path,
            private_key_path=known.key_path,
        )

    return registry


class NoDiffs(kopf.DiffBaseStorage):
    """There are no handlers that ask what changed: nothing is kept, nothing is compared."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence({})

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None


class NoProgress(kopf.ProgressStorage):
    """There are no handlers that are tried again by Kopf."""

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None

    def purge(self, **_: Any) -> None:
        return None

    def touch(self, **_: Any) -> None:
        return None

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        return essence


class NoMemories(ResourceMemories):
    """Kopf remembers a kilobyte for each object that it has ever seen, for handlers that go on where they stopped; ours do not."""

    async def recall(self, raw_body: Any, **options: Any) -> ResourceMemory:
        return await super().recall(raw_body, **{**options, "ephemeral": True})


def kopf_settings(settings: Settings) -> kopf.OperatorSettings:
    """Watches that cannot stay dead, and none of what Kopf would write by itself."""
    wanted = kopf.OperatorSettings()
    wanted.posting.enabled = False
    wanted.peering.standalone = True
    wanted.scanning.disabled = True
    wanted.watching.server_timeout = settings.watch_seconds
    wanted.watching.client_timeout = settings.watch_seconds + 30
    wanted.watching.chunk_size = 200  # a page stands in memory as dicts while its objects are handed over
    for group, plural in (("batch", "jobs"), ("", "pods")):
        wanted.watching.label_selectors[group, "v1", plural] = names.LABEL_JOB_UID
    wanted.networking.request_timeout = settings.request_seconds
    wanted.networking.error_backoffs = Patience()
    wanted.process.ultimate_exiting_timeout = None
    wanted.queueing.idle_timeout = 0.2
    wanted.queueing.worker_limit = KOPF_WORKERS
    wanted.persistence.diffbase_storage, wanted.persistence.progress_storage = NoDiffs(), NoProgress()
    return wanted


async def serve(settings: Settings, stop: asyncio.Event, clock: Callable[[], datetime] = utc_now) -> None:
    """Probes, Lease, first list, queue, watches; until `stop` is set. Then the other way round. `clock` is the machine's, put right by what
    the API server says of its own.

    Raises LeaseLost if another may lead.
    """
    metrics = Metrics()
    async with contextlib.AsyncExitStack() as stack:
        store, dog = Store(), Watchdog(settings.stale_seconds)
        connected = await Cluster.connect(settings.request_seconds, pool=settings.concurrency * 3, wall=clock)
        cluster = await stack.enter_async_context(connected)
        cluster.timed = metrics.requested
        leader = leader_of(settings, cluster)
        reconciler = Reconciler(cluster, store, settings, known_passes(), cluster.now, tries=lambda key: queue.tries(key), metrics=metrics)
        queue = WorkQueue(
            reconciler.reconcile,
            initial=settings.backoff_initial_seconds,
            maximum=settings.backoff_maximum_seconds,
            waited=metrics.waited,
            looked=metrics.looked,
        )
        relister = Relister(
            cluster, store, partial(queue.add, sweep=True), settings.namespaces, settings.relist_seconds, settings.stale_seconds / 4
        )

        def problem() -> str:
            """Asked by the liveness probe."""
            if not health.ready:
                return ""
            if not queue.alive:
                return "a reconcile worker is gone"
            if dog.clock() - relister.attempted > settings.relist_seconds + settings.stale_seconds:
                return "the relist task is late"
            owed = dog.overdue(store.unproven, cluster.answered)
            return f"the watch of {owed[0]} does not deliver {'/'.join(owed[1])}" if owed else ""

        def leading() -> bool:
            return leader is None or leader.leading

        async def finish() -> None:
            await queue.stop(settings.shutdown_seconds if leading() else 0)

        metrics.add(
            Moment(
                lambda: queue.depth,
                store.tally,
                cluster.requests,
                leading,
                lambda: dog.longest(store.unproven, cluster.answered),
                store.training,
            )
        )
        cluster.may_write = leading
        health = Health(problem, standby=leader is not None, exposition=metrics.exposition)
        runner, port = await serve_probes(health, settings.health_host, settings.health_port)
        stack.push_async_callback(runner.cleanup)
        log.info("probes on port %d", port)
        lag = asyncio.create_task(metrics.measure_lag(), name="lag")
        stack.callback(lag.cancel)
        if leader is not None and not await _unless(stop, lead(leader, stack, stop)):
            return
        if not await _unless(stop, relister.first()):
            return
        settle()
        queue.start(settings.concurrency)
        stack.push_async_callback(finish)
        timer = asyncio.create_task(relister.forever(), name="relist")
        stack.callback(timer.cancel)
        health.ready, health.standby = True, False
        log.info("watching %s", ", ".join(settings.namespaces) or "all namespaces")
        await watch_until(stop, settings, lambda: registry_for(store, queue, cluster))
        health.ready = False
        made: Counter[str] = Counter()
        for (verb, kind, _), count in sorted(cluster.requests.items()):
            made[f"{verb} {kind}"] += count
        log.info("stopping", extra={"detail": json.dumps(made)})


def settle() -> None:
    """Cycles are rare here, and looking for them among all that stays takes 50 ms for what was imported alone, every few seconds."""
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, FULL_COLLECTION)


def leader_of(settings: Settings, cluster: Cluster) -> Leader | None:
    """A candidate with a name of its own, if there is a Lease to agree by."""
    if not settings.lease_namespace:
        return None
    identity = f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"
    return Leader(cluster, settings.lease_namespace, settings.lease_name, identity)


async def lead(leader: Leader, stack: contextlib.AsyncExitStack, stop: asyncio.Event) -> None:
    """Returns once the Lease is ours. Losing it stops everything, and leaves `stack` as LeaseLost; a stop in order lets it go."""
    await leader.acquire()
    holding = asyncio.create_task(leader.hold(), name="lease")

    async def let_go() -> None:
        if holding.done():
            holding.result()
        holding.cancel()
        await leader.release()

    stack.push_async_callback(let_go)
    holding.add_done_callback(lambda _: stop.set())


async def watch_until(stop: asyncio.Event, settings: Settings, registry: Callable[[], kopf.OperatorRegistry]) -> None:
    """Kopf, again and again: an error that it takes for fatal, such as a broken watch, is none for us."""
    where: dict[str, Any] = {"namespaces": settings.namespaces} if settings.namespaces else {"clusterwide": True}
    while not stop.is_set():
        ours = asyncio.all_tasks()
        try:
            tasks = await kopf.spawn_tasks(
                registry=registry(), settings=kopf_settings(settings), memories=NoMemories(), stop_flag=stop, **where
            )
            listen(stop)  # Kopf has just taken the signals for itself
            await kopf.run_tasks(tasks, ignored=ours)
        except Exception:
            log.exception("the watches broke; opening them again")
        await _unless(stop, asyncio.sleep(KOPF_RESTART_SECONDS))


def listen(stop: asyncio.Event) -> None:
    """SIGTERM and SIGINT end the process in order."""
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)


async def _unless(stop: asyncio.Event, work: Any) -> bool:
    """Await it, unless `stop` comes first. True if it was finished."""
    task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    done, _ = await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
    for other in (task, stopped):
        other.cancel()
    await asyncio.gather(task, stopped, return_exceptions=True)
    if task in done:
        task.result()
    return task in done


async def _run(settings: Settings) -> None:
    stop = asyncio.Event()
    listen(stop)
    await serve(settings, stop)


def main() -> None:
    """Console entry. Exits 1 if a setting is unusable, or another operator may lead."""
    try:
        settings = Settings.from_env(os.environ)
    except SettingError as error:
        sys.exit(f"kompressor-operator: {error}")
    logs.configure(settings.log_level)
    try:
        asyncio.run(_run(settings))
    except LeaseLost as error:
        log.error("%s; ending, to stand by again", error)
        sys.exit(1)
