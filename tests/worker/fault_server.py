"""An HTTP proxy that breaks what passes through it, on demand: storage as it is on a bad day.

    with FaultServer(s3.endpoint) as proxy:
        proxy.inject("unavailable", times=3, method="PUT")

Requests go to `upstream` unless a fault matches; a fault is used `times` times, in the order of injection.
"""

from __future__ import annotations

import http.client
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

Kind = Literal[
    "stall", "stall-body", "truncate", "drop", "lose-answer", "corrupt", "unavailable", "internal", "denied", "full",
    "unsupported", "ignored",
]  # fmt: skip
FOREVER = 1 << 30
ANSWERS: dict[str, tuple[int, str, str]] = {
    "unavailable": (503, "SlowDown", "Please reduce your request rate."),
    "internal": (500, "InternalError", "We encountered an internal error."),
    "denied": (403, "AccessDenied", "Access Denied"),
    "full": (507, "InsufficientStorage", "No space left."),
    "unsupported": (501, "NotImplemented", "A header you provided implies functionality that is not implemented."),
    "ignored": (200, "", ""),
}


@dataclass
class Fault:
    """stall: no answer. stall-body, truncate: `after` bytes of the answer's body, then silence, or the end of the connection.
    drop: the connection ends before the request is passed on; lose-answer: after it was done. corrupt: the last byte differs.
    ignored: said to be done, and not done. The others are answers of the server itself."""

    kind: Kind
    times: int
    method: str
    path: re.Pattern[str]
    after: int
    then: Callable[[], object] = lambda: None
    """Called when a connection ends by drop or lose-answer, before the client can notice."""


@dataclass
class FaultServer:
    upstream: str
    endpoint: str = ""
    seen: list[str] = field(default_factory=list)
    """`METHOD path range` of every request, broken ones too."""

    def __post_init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._over = threading.Event()

    def inject(self, kind: Kind, *, times: int = 1, method: str = "", path: str = "", after: int = 0) -> None:
        """`method`: that method only; `path`: a pattern searched for in path and query."""
        with self._lock:
            self._faults.append(Fault(kind, times, method, re.compile(path), after))

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def take(self, method: str, path: str, byte_range: str) -> Fault | None:
        with self._lock:
            self.seen.append(f"{method} {path} {byte_range}".strip())
            for fault in self._faults:
                if fault.times > 0 and fault.method in ("", method) and fault.path.search(path):
                    fault.times -= 1
                    return fault
        return None

    def wait(self) -> None:
        """What a stalled request does."""
        self._over.wait(120)

    def __enter__(self) -> FaultServer:
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients are killed here
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    owner: ClassVar[FaultServer]
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        fault = self.owner.take(self.command, self.path, self.headers.get("range", ""))
        kind = fault.kind if fault else None
        if kind == "stall":
            self.owner.wait()
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if fault and kind == "drop":
            fault.then()
            self.close_connection = True
            return
        if kind in ANSWERS:
            status, code, message = ANSWERS[kind]
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            text = text if code else b""
            self._answer(status, [("ETag", '"0"'), ("Content-Type", "application/xml"), ("Content-Length", str(len(text)))], text)
            return
        status, headers, data = self._forward(body)
        if fault and kind == "lose-answer":
            fault.then()
            self.close_connection = True
            return
        if kind == "corrupt" and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault is None or kind == "corrupt":
            self._answer(status, headers, data)
            return
        self._answer(status, headers, data[: fault.after])
        if kind == "stall-body":
            self.wfile.flush()
            self.owner.wait()
        self.close_connection = True

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = urlsplit(self.owner.upstream)
        connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # Host too: it is signed
                if name.lower() != "expect":
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            headers = [(k, v) for k, v in answer.getheaders() if k.lower() not in ("connection", "transfer-encoding")]
            data = answer.read()
            if self.command != "HEAD" and not any(name.lower() == "content-length" for name, _ in headers):
                headers.append(("Content-Length", str(len(data))))
            return answer.status, headers, data
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def log_message(self, format: str, *args: object) -> None:
        pass
