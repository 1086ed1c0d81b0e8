"""What to ask a fresh API server, over HTTPS with the administrator's certificate and nothing but the standard library.

kubectl would cost a tenth of a second of CPU a question, and the Python client a second to import.
"""

from __future__ import annotations

import http.client
import json
import ssl
from pathlib import Path
from urllib.parse import urlsplit

__all__ = ["Readiness"]


class Readiness:
    """Questions to the API server at `server`; one that does not answer is not ready, never an exception."""

    def __init__(self, server: str, authority: Path, certificate: Path, key: Path) -> None:
        self._netloc = urlsplit(server).netloc
        self._context = ssl.create_default_context(cafile=str(authority))
        self._context.load_cert_chain(certificate, key)

    def api_server(self) -> bool:
        return self._get("/readyz")[0] == 200

    def pods(self) -> bool:
        """Can a Pod be created in the namespace `default`, its root certificates included?"""
        namespace = "/api/v1/namespaces/default"
        wanted = ("serviceaccounts/default", "configmaps/kube-root-ca.crt")
        return all(self._get(f"{namespace}/{path}")[0] == 200 for path in wanted)

    def node(self, name: str) -> bool:
        status, body = self._get(f"/api/v1/nodes/{name}")
        conditions = json.loads(body)["status"].get("conditions", []) if status == 200 else []
        return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)

    def _get(self, path: str) -> tuple[int, bytes]:
        """Status and body; status 0 where nobody answers."""
        connection = http.client.HTTPSConnection(self._netloc, timeout=5, context=self._context)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()
