"""What the proxy makes of a request: its kind and turn, what is answered in its place, which headers go on."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from aiohttp import web

__all__ = ["AFTER", "BEFORE", "Answer", "Call", "Point", "drop", "passed", "what_of"]

BEFORE, AFTER = "before", "after"
"""The server never hears of it; the server has done it, and the operator never hears so."""
_OF_A_HOP = {"host", "connection", "content-length", "transfer-encoding", "accept-encoding", "keep-alive"}


@dataclass(frozen=True)
class Point:
    """A moment in a life: the nth request of a kind since `begin`. By kind, since requests that are made at once come in any order."""

    what: str
    turn: int
    side: str = BEFORE


@dataclass
class Call:
    """A request that is no watch. `what`: verb, plural and subresource, as in `PATCH compressionjobs/status` or `LIST pods`."""

    number: int
    what: str
    turn: int
    name: str
    code: int = 0
    """What the operator was answered; 0 for nothing."""


@dataclass
class Answer:
    """Something in place of the server's own answer, for a share of all requests."""

    code: int
    retry_after: int | None
    share: float
    after: bool
    chance: random.Random

    def strikes(self) -> bool:
        return self.chance.random() < self.share

    def response(self) -> web.Response:
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": self.code, "reason": "Chaos", "message": "by chaos"}
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return web.json_response(status, status=self.code, headers=headers)


def what_of(request: web.Request, body: bytes) -> tuple[str, str]:
    """Verb, plural and subresource; and the object's name."""
    parts = request.path.strip("/").split("/")
    rest = parts[2:] if parts[0] == "api" else parts[3:]
    if rest[:1] == ["namespaces"] and len(rest) > 2:
        rest = rest[2:]
    plural, name, sub = ([*rest, "", "", ""])[:3]
    if not plural:
        return f"{request.method} {request.path}", ""
    verb = "LIST" if request.method == "GET" and not name else request.method
    if request.query.get("dryRun"):
        verb = "DRY-RUN"
    if request.method == "POST":
        name = json.loads(body).get("metadata", {}).get("name", "")
    return f"{verb} {plural}" + (f"/{sub}" if sub else ""), name


def passed(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in _OF_A_HOP}


def drop(request: web.Request) -> None:
    """The connection breaks without a word."""
    if request.transport is not None:
        request.transport.abort()
