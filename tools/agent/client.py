"""The API server over HTTPS, with the node's own credentials; objects are plain dicts.

The official client turns each object into a tree of classes, which costs more CPU than everything else a node does.
"""

import base64
import json
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import urllib3
import yaml

Object = dict[str, Any]

STRATEGIC = "application/strategic-merge-patch+json"
MERGE = "application/merge-patch+json"


class ApiError(Exception):
    """The server refused: `code` is the HTTP status, `reason` the Status object's (NotFound, Conflict, ...)."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason


class ApiUnavailable(Exception):
    """No answer: the server is down, starting, or went away during the answer. Worth another try."""


class Client:
    """Requests as one node; safe to share between threads."""

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        contexts = {item["name"]: item["context"] for item in config["contexts"]}
        context = contexts[config["current-context"]]
        cluster = next(item["cluster"] for item in config["clusters"] if item["name"] == context["cluster"])
        user = next(item["user"] for item in config["users"] if item["name"] == context["user"])
        self.server: str = cluster["server"]
        self.authority: bytes | None = _material(kubeconfig.parent, cluster, "certificate-authority")
        self._headers = {"User-Agent": "node-agent"}
        if "token" in user:
            self._headers["Authorization"] = f"Bearer {user['token']}"
        self._pool = urllib3.PoolManager(
            maxsize=32, retries=False, ssl_context=_tls(kubeconfig.parent, cluster, user), timeout=urllib3.Timeout(10)
        )

    @property
    def host(self) -> str:
        return urlsplit(self.server).hostname or "127.0.0.1"

    @property
    def port(self) -> int:
        return urlsplit(self.server).port or 443

    def get(self, path: str, **query: str) -> Object:
        return self._call("GET", path, query)

    def post(self, path: str, body: Object) -> Object:
        return self._call("POST", path, {}, body)

    def patch(self, path: str, body: Object, kind: str = STRATEGIC) -> Object:
        return self._call("PATCH", path, {}, body, kind)

    def delete(self, path: str, body: Object) -> Object:
        return self._call("DELETE", path, {}, body)

    def watch(self, path: str, seconds: int = 300, **query: str) -> Iterator[Object]:
        """Watch events until the server ends the watch; ApiUnavailable when the connection breaks."""
        query |= {"watch": "1", "allowWatchBookmarks": "true", "timeoutSeconds": str(seconds)}
        url = f"{self.server}{path}?{urlencode(query)}"
        timeout = urllib3.Timeout(connect=5, read=seconds + 15)
        try:
            answer = self._pool.request("GET", url, headers=self._headers, preload_content=False, timeout=timeout)
            try:
                if answer.status >= 400:
                    raise _error(answer.status, answer.read())
                for line in answer:
                    yield json.loads(line)
            finally:
                answer.close()
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiUnavailable(f"watching {path}: {error}") from error

    def _call(self, verb: str, path: str, query: dict[str, str], body: Object | None = None, kind: str = "application/json") -> Object:
        url = f"{self.server}{path}" + (f"?{urlencode(query)}" if query else "")
        data = json.dumps(body).encode() if body is not None else None
        try:
            answer = self._pool.request(verb, url, body=data, headers=self._headers | {"Content-Type": kind})
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiUnavailable(f"{verb} {path}: {error}") from error
        if answer.status >= 500 or answer.status == 429:
            raise ApiUnavailable(f"{verb} {path}: {answer.status} {answer.data[:200]!r}")
        if answer.status >= 400:
            raise _error(answer.status, answer.data)
        result: Object = json.loads(answer.data)
        return result


def _error(code: int, data: bytes) -> ApiError:
    try:
        status = json.loads(data)
        return ApiError(code, status.get("reason", ""), status.get("message", ""))
    except ValueError:
        return ApiError(code, "", data[:200].decode(errors="replace"))


def _tls(folder: Path, cluster: Object, user: Object) -> ssl.SSLContext:
    authority = _material(folder, cluster, "certificate-authority")
    context = ssl.create_default_context(cadata=authority.decode() if authority else None)
    certificate, key = _material(folder, user, "client-certificate"), _material(folder, user, "client-key")
    if certificate and key:
        # load_cert_chain reads files only; these live for the length of the call, readable by this user alone.
        with tempfile.NamedTemporaryFile() as pair:
            pair.write(certificate + b"\n" + key)
            pair.flush()
            context.load_cert_chain(pair.name)
    return context


def _material(folder: Path, section: Object, name: str) -> bytes | None:
    if f"{name}-data" in section:
        return base64.b64decode(section[f"{name}-data"])
    if name in section:
        return Path(folder, section[name]).read_bytes()
    return None
