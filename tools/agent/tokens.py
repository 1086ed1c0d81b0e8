"""Service account tokens, bound to the pod and renewed at four fifths of their life."""

import time

from agent.client import Client, Object
from agent.clock import epoch
from agent.lookups import patiently

_RENEW_AT_MOST_AFTER = 24 * 3600.0


class Tokens:
    """One pod's tokens, asked for once and kept until they are due."""

    def __init__(self, client: Client, pod: Object) -> None:
        self._client = client
        self._pod = pod
        self._held: dict[tuple[str, int], tuple[str, float]] = {}

    def get(self, audience: str, seconds: int) -> str:
        held = self._held.get((audience, seconds))
        if held is None or time.time() >= held[1]:
            held = self._held[audience, seconds] = self._request(audience, seconds)
        return held[0]

    def due(self) -> float:
        """When the first token has to be renewed, in seconds since the epoch."""
        return min((renew for _, renew in self._held.values()), default=float("inf"))

    def _request(self, audience: str, seconds: int) -> tuple[str, float]:
        meta = self._pod["metadata"]
        account = self._pod["spec"].get("serviceAccountName") or "default"
        bound = {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"]}
        spec = {"audiences": [audience] if audience else [], "expirationSeconds": seconds, "boundObjectRef": bound}
        asked = time.time()
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        path = f"/api/v1/namespaces/{meta['namespace']}/serviceaccounts/{account}/token"
        answer = patiently(lambda: self._client.post(path, body))
        life = epoch(answer["status"]["expirationTimestamp"]) - asked
        return answer["status"]["token"], asked + min(0.8 * life, _RENEW_AT_MOST_AFTER)
