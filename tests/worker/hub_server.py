"""A small hub: the endpoints that reading a model needs, as the real one answers them.

Large files are redirected to a content network of another origin, at signed addresses that can be made to run out.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

SMALL = 1 << 10
"""Files up to this size live in git and are served directly; the others are LFS."""


@dataclass
class Repository:
    files: dict[str, bytes]
    commit: str = field(default_factory=lambda: secrets.token_hex(20))
    branches: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False
    history: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.branches.setdefault("main", self.commit)
        self.history[self.commit] = dict(self.files)

    def push(self, files: dict[str, bytes]) -> str:
        """A new commit on main."""
        self.commit = self.branches["main"] = secrets.token_hex(20)
        self.history[self.commit] = dict(files)
        return self.commit


class HubServer:
    """`repositories` by name (datasets: `datasets/owner/name`);
    `seen` holds `METHOD path authorization` of every request, `break_after` cuts bodies short."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.seen: list[str] = []
        self.trouble: list[int] = []
        """Statuses with which the next requests are answered."""
        self.break_after: list[int] = []
        """The next bodies end after so many bytes."""
        self.signature = secrets.token_hex(4)
        self.endpoint = self.network = ""

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(_Handler):
            owner = hub

        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        self.endpoint, self.network = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: ClassVar[HubServer]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub = self.owner
        hub.seen.append(f"GET {self.path} {self.headers.get('authorization', '')}".strip())
        if hub.trouble:
            return self._refuse(hub.trouble.pop(0), "", "trouble")
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/cdn/([0-9a-f]+)/([0-9a-f]{64})", path):
            if found[1] != hub.signature:
                return self._refuse(403, "", "Request has expired")
            blobs = (d for r in hub.repositories.values() for files in r.history.values() for d in files.values())
            return self._send(next(d for d in blobs if hashlib.sha256(d).hexdigest() == found[2]))
        if found := re.fullmatch(r"/api/(?:models/|(?=datasets/))(.+?)/revision/(.+)", path):
            repository = self._repository(found[1], listing=True)
            return self._info(repository, found[2]) if repository else None
        if found := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository = self._repository(found[1], listing=False)
            return self._resolve(repository, found[2], found[3]) if repository else None
        return self._refuse(404, "", "Not Found")

    def _repository(self, name: str, listing: bool) -> Repository | None:
        repository = self.owner.repositories.get(name)
        authorization = self.headers.get("authorization")
        if repository is None:
            self._refuse(404 if authorization else 401, "RepoNotFound", "Repository not found")
        elif repository.token and authorization != f"Bearer {repository.token}":
            if repository.gated and not listing:
                self._refuse(403, "GatedRepo", "Access to this model is restricted")
            elif repository.gated:
                return repository
            else:
                self._refuse(401, "RepoNotFound", "Invalid username or password.")
        else:
            return repository
        return None

    def _info(self, repository: Repository, revision: str) -> None:
        commit = repository.branches.get(revision, revision)
        if commit not in repository.history:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings: list[dict[str, Any]] = []
        for name, data in repository.history[commit].items():
            entry = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
            if len(data) > SMALL:
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        body = json.dumps({"id": "x/y", "modelId": "x/y", "sha": commit, "siblings": siblings}).encode()
        self._answer(200, {"content-type": "application/json"}, body)

    def _resolve(self, repository: Repository, commit: str, name: str) -> None:
        data = repository.history.get(commit, {}).get(name)
        if data is None:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        if len(data) <= SMALL:
            return self._send(data)
        digest = hashlib.sha256(data).hexdigest()
        self._answer(302, {"location": f"{self.owner.network}/cdn/{self.owner.signature}/{digest}?Signature=x"}, b"Found")

    def _send(self, data: bytes) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        headers, status, body = {}, 200, data
        if found:
            start, stop = int(found[1]), min(int(found[2]) + 1, len(data))
            if start >= len(data):
                return self._refuse(416, "", "Range Not Satisfiable")
            status, body = 206, data[start:stop]
            headers["content-range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self._answer(status, headers, body)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._answer(status, {"x-error-code": code, "x-error-message": message}, message.encode())

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if status in (200, 206) and "cdn" in self.path and self.owner.break_after:
            body = body[: self.owner.break_after.pop(0)]
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass
