"""Stands between an operator and the API server, on loopback, and does what networks, servers and the machine's killer do.

    with Proxies(server, ca) as proxies:               # one thread for all of them
        proxy = proxies.open()                         # one for each operator: proxy.url is what its kubeconfig names
        proxy.begin()                                  # number requests from here on; watches have no number
        proxy.kill(Point("PATCH compressionjobs/status", 2, AFTER), pid)
        proxy.answer(429, retry_after=1, share=0.3, seed=7)
        proxy.conflict(share=0.3, seed=7)
        proxy.cut_watches(); proxy.stall_watches(); proxy.delay = 0.2; proxy.skew = 3600
        proxy.calm()                                   # as if nothing were wrong

Towards the operator it speaks plain HTTP, towards the server TLS; the operator's own token goes through. All methods may be called from
any thread.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import ssl
import threading
from collections import Counter
from collections.abc import Coroutine
from datetime import timedelta
from email.utils import format_datetime, parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import aiohttp
from aiohttp import web
from calls import AFTER, BEFORE, Answer, Call, Point, drop, passed, what_of

__all__ = ["Proxies", "Proxy"]

T = TypeVar("T")


class Proxy:
    """One way to the API server. Made by `Proxies.open`."""

    def __init__(self, host: Proxies) -> None:
        self._host = host
        self.url = ""
        self.runner: web.AppRunner
        self.delay = 0.0
        """Seconds that every request is held back."""
        self.skew = 0.0
        """Seconds by which the Date of answers is wrong: some proxies put their own in its place."""
        self.requests = 0
        """All there ever were, watches included."""
        self.calls: list[Call] = []
        """Since `begin`, in the order in which they came."""
        self.killed = threading.Event()
        """The point was reached, and the process is no more."""
        self._turns: Counter[str] = Counter()
        self._doomed: tuple[Point, int] | None = None
        self._answers: list[Answer] = []
        self._conflicts: tuple[float, random.Random] | None = None
        self._transports: dict[web.StreamResponse, asyncio.BaseTransport] = {}
        self._flowing = asyncio.Event()
        self._flowing.set()

    # ---- what a test may ask for

    def begin(self) -> None:
        """Count from here."""
        self.calls, self._turns = [], Counter()

    def kill(self, point: Point, pid: int) -> None:
        """SIGKILL for this process at that point."""
        self.killed.clear()
        self._doomed = (point, pid)

    def answer(self, code: int, *, retry_after: int | None = None, share: float = 1.0, seed: int = 0, after: bool = False) -> None:
        """This share of all requests, watches included, is answered so; `after`: the server has done what was asked all the same."""
        self._answers.append(Answer(code, retry_after, share, after, random.Random(seed)))

    def conflict(self, *, share: float = 1.0, seed: int = 0) -> None:
        """Before this share of the conditional patches of a CompressionJob, somebody else changes it."""
        self._conflicts = (share, random.Random(seed))

    def cut_watches(self) -> int:
        """Ends all open watches in the middle of whatever they were saying. Returns how many."""

        async def cut() -> int:
            doomed = list(self._transports.values())
            for transport in doomed:
                transport.abort()  # type: ignore[attr-defined]
            return len(doomed)

        return self._host.run(cut())

    def stall_watches(self, stalled: bool = True) -> None:
        """They stay open and say nothing more, those that are opened later too."""

        async def stall() -> None:
            self._flowing.clear() if stalled else self._flowing.set()

        self._host.run(stall())

    def calm(self) -> None:
        """Nothing more goes wrong."""
        self._answers, self._conflicts, self._doomed = [], None, None
        self.delay = self.skew = 0.0
        self.stall_watches(False)

    @property
    def watches(self) -> int:
        """How many are open."""
        return len(self._transports)

    def kubeconfig(self, token: str, file: Path) -> Path:
        """Writes one that leads here."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": self.url}}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        }
        file.write_text(json.dumps(config))
        return file

    # ---- in the thread of the proxies

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """One request of the operator."""
        self.requests += 1
        body = await request.read()
        try:
            if self.delay:
                await asyncio.sleep(self.delay)
            if request.query.get("watch") in ("1", "true"):
                told = next((answer for answer in self._answers if answer.strikes()), None)
                return told.response() if told else await self._watch(request)
            return await self._answered(request, body)
        except (aiohttp.ClientError, OSError):
            drop(request)  # the server is away: nobody answers
            return web.Response(status=502)

    async def _answered(self, request: web.Request, body: bytes) -> web.StreamResponse:
        call, told = self._numbered(request, body), next((answer for answer in self._answers if answer.strikes()), None)
        if self._dies(call, BEFORE):
            drop(request)
            return web.Response(status=502)
        if told is not None and not told.after:
            call.code = told.code
            return told.response()
        if self._conflicts and call.what.startswith("PATCH compressionjobs") and b'"resourceVersion"' in body:
            share, chance = self._conflicts
            if chance.random() < share:
                await self._bump(request, chance.randrange(2**31))
        async with self._host.session.request(
            request.method, self._host.server + request.raw_path, data=body or None, headers=passed(request.headers)
        ) as answer:
            content = await answer.read()
        if self._dies(call, AFTER):
            drop(request)
            return web.Response(status=502)
        if told is not None:
            call.code = told.code
            return told.response()
        call.code = answer.status
        headers = passed(answer.headers)
        if self.skew and "Date" in headers:
            wrong = parsedate_to_datetime(headers["Date"]) + timedelta(seconds=self.skew)
            headers["Date"] = format_datetime(wrong, usegmt=True)
        return web.Response(status=answer.status, body=content, headers=headers)

    def _numbered(self, request: web.Request, body: bytes) -> Call:
        what, name = what_of(request, body)
        self._turns[what] += 1
        call = Call(len(self.calls) + 1, what, self._turns[what], name)
        self.calls.append(call)
        return call

    def _dies(self, call: Call, side: str) -> bool:
        if self._doomed is None:
            return False
        point, pid = self._doomed
        if (call.what, call.turn, side) != (point.what, point.turn, point.side):
            return False
        os.kill(pid, signal.SIGKILL)
        self._doomed = None
        self.killed.set()
        return True

    async def _bump(self, request: web.Request, number: int) -> None:
        path = request.path.removesuffix("/status")
        change = {"metadata": {"annotations": {"chaos/somebody-else": str(number)}}}
        headers = {"Authorization": request.headers["Authorization"], "Content-Type": "application/merge-patch+json"}
        async with self._host.session.patch(self._host.server + path, data=json.dumps(change), headers=headers) as answer:
            await answer.read()

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        async with self._host.session.get(
            self._host.server + request.raw_path, headers=passed(request.headers), timeout=aiohttp.ClientTimeout(total=None)
        ) as answer:
            response = web.StreamResponse(status=answer.status, headers=passed(answer.headers))
            await response.prepare(request)
            assert request.transport is not None
            self._transports[response] = request.transport
            try:
                async for chunk in answer.content.iter_any():
                    await self._flowing.wait()
                    await response.write(chunk)
                await response.write_eof()
            finally:
                del self._transports[response]
            return response


class Proxies:
    """A thread with an event loop, in which all proxies of a cluster live."""

    def __init__(self, server: str, ca: Path) -> None:
        self.server = server
        self._context = ssl.create_default_context(cafile=str(ca))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies", daemon=True)
        self._runners: list[web.AppRunner] = []
        self.session: aiohttp.ClientSession

    def __enter__(self) -> Proxies:
        self._thread.start()
        self.run(self._connect())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Does it in the thread of the proxies, and waits."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def open(self) -> Proxy:
        """Another one, on a port of its own."""
        return self.run(self._open())

    def close(self, proxy: Proxy) -> None:
        """Its port is closed, and so are its connections."""
        self.run(self._close(proxy))

    async def _connect(self) -> None:
        connector = aiohttp.TCPConnector(ssl=self._context, limit=0, keepalive_timeout=60)
        self.session = aiohttp.ClientSession(connector=connector, auto_decompress=False, timeout=aiohttp.ClientTimeout(total=60))

    async def _open(self) -> Proxy:
        proxy = Proxy(self)
        application = web.Application(client_max_size=2**24)
        application.router.add_route("*", "/{path:.*}", proxy.serve)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        proxy.url = "http://{}:{}".format(*runner.addresses[0])
        proxy.runner = runner
        self._runners.append(runner)
        return proxy

    async def _close(self, proxy: Proxy) -> None:
        self._runners.remove(proxy.runner)
        await proxy.runner.cleanup()

    async def _end(self) -> None:
        for runner in self._runners:
            await runner.cleanup()
        await self.session.close()
