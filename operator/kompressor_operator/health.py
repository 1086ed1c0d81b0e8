"""Probes. /healthz: is this process still doing its work; /readyz: has it seen the cluster. Neither fails because the API server is away:
a restart would not bring it back, and would lose what is known."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from aiohttp import web

from kompressor_operator.observed import Key

Owed = tuple[str, Key, int]


@dataclass
class Watchdog:
    """Notices a dead watch: a list has shown something that the watch does not deliver, although the API server answers."""

    stale_seconds: float
    clock: Callable[[], float] = time.monotonic
    _since: dict[Owed, float] = field(default_factory=dict)

    def overdue(self, owed: frozenset[Owed], answered: float) -> Owed | None:
        """The item that a watch has owed for too long, if any. `answered`: when the API server last answered anything."""
        now = self.clock()
        if now - answered > self.stale_seconds / 2:
            self._since = {}  # the server is away: nobody could deliver
            return None
        self._since = {item: self._since.get(item, now) for item in owed}
        return next((item for item, since in self._since.items() if now - since > self.stale_seconds), None)

    def longest(self, owed: frozenset[Owed], answered: float) -> float:
        """Seconds that a watch has owed the oldest of these."""
        self.overdue(owed, answered)
        return max((self.clock() - since for since in self._since.values()), default=0.0)


@dataclass
class Health:
    """What the probes tell. `problem` is asked at every probe and names what is wrong, or nothing."""

    problem: Callable[[], str]
    ready: bool = False
    standby: bool = False
    """Another operator leads: all is well, and there is nothing to do."""
    exposition: Callable[[str], tuple[bytes, str]] = field(default=lambda accept: (b"", "text/plain"))
    """/metrics: from an Accept header to a body and its content type."""

    async def healthz(self, _: web.Request) -> web.Response:
        problem = self.problem()
        return web.Response(status=500 if problem else 200, text=problem or "ok")

    async def readyz(self, _: web.Request) -> web.Response:
        if self.standby:
            return web.Response(text="standby")
        return web.Response(status=200 if self.ready else 503, text="ok" if self.ready else "not yet synchronised")

    async def metrics(self, request: web.Request) -> web.Response:
        body, content_type = self.exposition(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})


async def serve_probes(health: Health, host: str, port: int) -> tuple[web.AppRunner, int]:
    """Start the probes' server. Returns it and the port that it got."""
    app = web.Application()
    app.router.add_get("/healthz", health.healthz)
    app.router.add_get("/readyz", health.readyz)
    app.router.add_get("/metrics", health.metrics)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner, int(runner.addresses[0][1])
