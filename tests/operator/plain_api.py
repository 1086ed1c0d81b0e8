"""The API server as an administrator's plain requests: no client library between a test and what the server says."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from local_cluster import LocalCluster

Manifest = dict[str, Any]


class ApiRefusal(Exception):
    def __init__(self, status: int, body: Manifest) -> None:
        super().__init__(f"{status} {body.get('reason')}: {body.get('message')}")
        self.status = status


class Api:
    """One cluster, as its administrator."""

    def __init__(self, cluster: LocalCluster) -> None:
        pki = cluster.root / "pki"
        self._context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        self._context.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        self._server = urlsplit(cluster.server)
        self._connection: http.client.HTTPSConnection | None = None

    def call(self, method: str, path: str, body: Manifest | None = None, patch: str = "merge") -> Manifest:
        kind = f"application/{patch}-patch+json" if method == "PATCH" else "application/json"
        for last in (False, True):
            if self._connection is None:
                self._connection = http.client.HTTPSConnection(self._server.netloc, context=self._context, timeout=30)
            try:
                self._connection.request(method, path, json.dumps(body) if body is not None else None, {"Content-Type": kind})
                answer = self._connection.getresponse()
                told: Manifest = json.loads(answer.read())
                break
            except (OSError, http.client.HTTPException):
                self._connection = None
                if last:
                    raise
        if answer.status >= 400:
            raise ApiRefusal(answer.status, told)
        return told

    def watch(self, path: str) -> Iterator[Manifest]:
        """Events as they come, until the server ends it."""
        connection = http.client.HTTPSConnection(self._server.netloc, context=self._context)
        connection.request("GET", path)
        try:
            for line in connection.getresponse():
                yield json.loads(line)
        finally:
            connection.close()
