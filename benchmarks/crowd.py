"""Applies CompressionJobs through sixteen connections, and sees by watches of its own when each of them gets where."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from stage import Manifest, Stage

from kompressor_api import names
from processes import Process

__all__ = ["CONNECTIONS", "Crowd", "Times", "at_once", "connected", "delays", "gathered", "manifest"]

CONNECTIONS = 16
LOOK_SECONDS = 5.0


@dataclass
class Times:
    """Of one CompressionJob, on time.monotonic's clock; 0 for what has not been seen."""

    applied: float
    """When its creation was sent."""
    first_job: float = 0.0
    started: float = 0.0
    """When the Job that compresses was seen first, and when it was seen to have ended."""
    ended: float = 0.0
    complete: float = 0.0


@dataclass
class Crowd:
    """All CompressionJobs of the stage's namespace; see `gathered`."""

    session: aiohttp.ClientSession
    stage: Stage
    group: asyncio.TaskGroup
    preflight: str = "Job"
    needs: Sequence[Process] = ()
    """Without any of these nothing would happen."""
    times: dict[str, Times] = field(default_factory=dict)
    forget: bool = False
    """Delete each as soon as it is complete."""
    _moved: asyncio.Event = field(default_factory=asyncio.Event)

    async def apply(self, wanted: Sequence[str], rate: float = 0.0) -> None:
        """Creates these: as fast as the server takes them, or so many a second."""
        began, turn = time.monotonic(), iter(enumerate(wanted))

        async def connection() -> None:
            for number, name in turn:
                if rate:
                    await asyncio.sleep(began + number / rate - time.monotonic())
                self.times[name] = Times(applied=time.monotonic())
                await self.call("POST", self.stage.path("compressionjobs"), manifest(name, self.preflight))

        await at_once(connection)

    async def complete(self, wanted: Sequence[str], seconds: float) -> None:
        """Returns when all of these are, or deleted. Raises TimeoutError if nothing happened to any for so long: of thousands that came at
        once each gets its first Job before one gets its second, so for minutes none is complete. RuntimeError once a process has ended."""
        left, moved = set(wanted), time.monotonic()
        while left := {name for name in left if name in self.times and not self.times[name].complete}:
            self._moved.clear()
            try:
                await asyncio.wait_for(self._moved.wait(), LOOK_SECONDS)
                moved = time.monotonic()
            except TimeoutError:
                for process in self.needs:
                    if not process.alive:
                        raise RuntimeError(f"{process.name} has ended; {len(left)} left; end of its log:\n{process.tail()}") from None
                if time.monotonic() - moved > seconds:
                    told = f"{len(left)} CompressionJobs not complete, nothing happened for {seconds} s: {sorted(left)[:3]}"
                    raise TimeoutError(f"{told}\n{await self.scene()}") from None

    async def scene(self) -> str:
        """What stands still, for whoever asks why: how many of each kind are how far, and what the processes said last."""
        bodies = {plural: (await self.call("GET", self.stage.path(plural)))["items"] for plural in ("compressionjobs", "jobs", "pods")}
        lines = [f"{plural}: {dict(Counter(_how_far(body) for body in items))}" for plural, items in bodies.items()]
        return "\n".join([*lines, *(f"-- {process.name}\n{process.tail(5)}" for process in self.needs)])

    async def call(self, method: str, path: str, body: Manifest | None = None) -> Manifest:
        async with self.session.request(method, path, json=body) as answer:
            told: Manifest = json.loads(await answer.read())
            if answer.status >= 400:
                raise RuntimeError(f"{method} {path}: {answer.status} {told.get('message')}")
            return told

    async def watch(self, plural: str, tell: Callable[[Manifest, float], None]) -> None:
        """From now on, opened again whenever the server ends it. Raises RuntimeError if events have been missed."""
        version = (await self.call("GET", self.stage.path(plural) + "?limit=1"))["metadata"]["resourceVersion"]
        while True:
            query = f"?watch=1&allowWatchBookmarks=true&resourceVersion={version}"
            async with self.session.get(self.stage.path(plural) + query, read_bufsize=2**20) as answer:
                async for line in answer.content:
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        raise RuntimeError(f"the benchmark's own watch of {plural}: {event['object'].get('message')}")
                    version = event["object"]["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK":
                        tell(event["object"], time.monotonic())

    def tell_job(self, job: Manifest, now: float) -> None:
        meta = job["metadata"]
        times = self.times.get(next((owner["name"] for owner in meta.get("ownerReferences", ())), ""))
        if times is None:
            return
        self._moved.set()
        times.first_job = times.first_job or now
        if meta["labels"].get(names.LABEL_STEP) == names.Step.COMPRESS:
            times.started = times.started or now
            times.ended = times.ended or (now if _is_true(job, "Complete") else 0.0)

    def tell_resource(self, resource: Manifest, now: float) -> None:
        name = resource["metadata"]["name"]
        times = self.times.get(name)
        if times is None:
            return
        self._moved.set()
        if times.complete or not _is_true(resource, "Complete"):
            return
        times.complete = now
        if self.forget:
            self.group.create_task(self._delete(name))

    async def _delete(self, name: str) -> None:
        await self.call("DELETE", self.stage.path("compressionjobs", name))
        del self.times[name]


@asynccontextmanager
async def gathered(stage: Stage, needs: Sequence[Process], preflight: str = "Job") -> AsyncIterator[Crowd]:
    """A crowd that watches; a watch or a deletion of its own that fails ends everything."""
    async with connected(stage) as session, asyncio.TaskGroup() as group:
        crowd = Crowd(session, stage, group, preflight, needs)
        told: Mapping[str, Any] = {"jobs": crowd.tell_job, "compressionjobs": crowd.tell_resource}
        watches = [group.create_task(crowd.watch(plural, tell)) for plural, tell in told.items()]
        await asyncio.sleep(1)  # they open
        yield crowd
        for task in watches:
            task.cancel()


@asynccontextmanager
async def connected(stage: Stage, administrator: bool = True) -> AsyncIterator[aiohttp.ClientSession]:
    """As the administrator or as nobody in particular, with connections enough for watches too."""
    pki = stage.cluster.root / "pki"
    context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
    if administrator:
        context.load_cert_chain(pki / "admin.crt", pki / "admin.key")
    connector = aiohttp.TCPConnector(ssl=context, limit=4 * CONNECTIONS, keepalive_timeout=75)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    async with aiohttp.ClientSession(stage.cluster.server, connector=connector, timeout=timeout) as session:
        yield session


async def at_once(work: Callable[[], Any]) -> None:
    """The same on each of sixteen connections."""
    await asyncio.gather(*(work() for _ in range(CONNECTIONS)))


def manifest(name: str, preflight: str) -> Manifest:
    spec = {
        "model": {"source": {"uri": "s3://models/one"}},
        "output": {"uri": f"s3://models/{name}"},
        "passes": [{"rtn": {"scheme": "W8A8"}}],
        "preflight": preflight,
        "ttlSecondsAfterFinished": 86400,
    }
    return {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name}, "spec": spec}


def _how_far(body: Manifest) -> str:
    status = body.get("status", {})
    true = [c["type"] for c in status.get("conditions", ()) if c["status"] == "True"]
    return " ".join([str(status.get("phase", "")), *true]).strip() or "nothing told"


def _is_true(body: Manifest, condition: str) -> bool:
    return any((c["type"], c["status"]) == (condition, "True") for c in body.get("status", {}).get("conditions", ()))


def delays(times: Mapping[str, Times], wanted: Sequence[str]) -> Iterator[tuple[float, float]]:
    """Of each: seconds from apply to its first Job, and from its Job's end to Complete; as our watches saw them, in whatever order."""
    for name in wanted:
        one = times[name]
        yield one.first_job - one.applied, max(0.0, one.complete - one.ended)
