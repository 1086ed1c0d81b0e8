"""The calls of one life as the operator made them, recorded, and a client that makes the same calls for other jobs and does nothing else.

No watches, no decisions, no conditional writes: what is left is what the API server takes for them, and a client at its barest.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web
from stage import Manifest, Stage

from crowd import at_once, connected, manifest

__all__ = ["Call", "Recorder", "live", "recorder"]


@dataclass(frozen=True)
class Call:
    """A request that changes something."""

    method: str
    path: str
    kind: str
    """Of content."""
    body: str

    def of(self, swaps: Sequence[tuple[str, str]]) -> Call:
        """The same for another job: its name, uid and namespace in place of the recorded one's; on condition of nothing."""
        path, body = self.path, self.body
        for old, new in swaps:
            path, body = path.replace(old, new), body.replace(old, new)
        if self.method == "PATCH":
            told: Manifest = json.loads(body)
            told.get("metadata", {}).pop("resourceVersion", None)
            body = json.dumps(told)
        return Call(self.method, path, self.kind, body)


@dataclass
class Recorder:
    """Passes on what the operator asks, and keeps the calls that change something."""

    session: aiohttp.ClientSession
    calls: list[Call] = field(default_factory=list)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {name: request.headers[name] for name in ("Authorization", "Content-Type", "Accept") if name in request.headers}
        async with self.session.request(request.method, request.raw_path, data=body or None, headers=headers) as answer:
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.headers.get("Content-Type", "")})
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            if request.method != "GET":
                self.calls.append(Call(request.method, request.raw_path, headers["Content-Type"], body.decode()))
        await response.write_eof()
        return response


@asynccontextmanager
async def recorder(stage: Stage) -> AsyncIterator[tuple[Recorder, str]]:
    """A recorder, and the file of a kubeconfig that leads through it."""
    async with connected(stage, administrator=False) as session:
        found = Recorder(session)
        application = web.Application(client_max_size=2**24)
        application.router.add_route("*", "/{path:.*}", found.serve)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            config = json.loads((stage.root / "operator.kubeconfig").read_text())
            config["clusters"][0]["cluster"] = {"server": "http://{}:{}".format(*runner.addresses[0])}
            file = stage.root / "recorded.kubeconfig"
            file.write_text(json.dumps(config))
            yield found, str(file)
        finally:
            await runner.cleanup()


async def live(stage: Stage, life: Sequence[Call], before: tuple[str, str, str], wanted: Sequence[str], preflight: str) -> float:
    """Creates these CompressionJobs and makes for each the calls of that `life`, of the job with this namespace, name and uid.

    Returns the seconds that it took. Raises RuntimeError if the server refuses one of them.
    """
    turn, began = iter(wanted), time.monotonic()
    async with connected(stage) as session:

        async def connection() -> None:
            for name in turn:
                apply = Call("POST", stage.path("compressionjobs"), "application/json", json.dumps(manifest(name, preflight)))
                uid = json.loads(await made(session, apply))["metadata"]["uid"]
                swaps = list(zip(before, (stage.namespace, name, uid), strict=True))
                for call in life:
                    await made(session, call.of(swaps))

        await at_once(connection)
    return time.monotonic() - began


async def made(session: aiohttp.ClientSession, call: Call) -> bytes:
    async with session.request(call.method, call.path, data=call.body, headers={"Content-Type": call.kind}) as answer:
        text = await answer.read()
        if answer.status >= 400:
            raise RuntimeError(f"{call.method} {call.path}: {answer.status} {text.decode()[:500]}")
        return text
