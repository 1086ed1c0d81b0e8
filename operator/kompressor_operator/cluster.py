"""The API server, as the operator needs it: create, read, list, patch, replace, delete; the only file that imports `kubernetes`.

Plain dicts go in and come out: the generated model classes cost time and memory and know nothing of our own resource. Every call
has a timeout, and every failure is an ApiError, so that the caller decides what a 409 means.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Self
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from kubernetes.aio import client, config

from kompressor_api import names
from kompressor_operator.observed import Manifest
from kompressor_operator.server_clock import ServerClock, utc_now

__all__ = ["ApiError", "Cluster", "Connection", "Page"]

IDLE_SECONDS = 75.0

PAGE = 200
"""Objects per page of a list: a few hundred kilobytes."""

ROUTES: Mapping[str, tuple[str, str]] = {
    names.KIND: (f"/apis/{names.GROUP}/{names.VERSION}", names.PLURAL),
    names.RECIPE_KIND: (f"/apis/{names.GROUP}/{names.VERSION}", names.RECIPE_PLURAL),
    names.CLUSTER_RECIPE_KIND: (f"/apis/{names.GROUP}/{names.VERSION}", names.CLUSTER_RECIPE_PLURAL),
    "ConfigMap": ("/api/v1", "configmaps"),
    "ServiceAccount": ("/api/v1", "serviceaccounts"),
    "Service": ("/api/v1", "services"),
    "Pod": ("/api/v1", "pods"),
    "Event": ("/api/v1", "events"),
    "Role": ("/apis/rbac.authorization.k8s.io/v1", "roles"),
    "RoleBinding": ("/apis/rbac.authorization.k8s.io/v1", "rolebindings"),
    "Job": ("/apis/batch/v1", "jobs"),
    "Lease": ("/apis/coordination.k8s.io/v1", "leases"),
}
"""Kind -> (base path, plural). What has no namespace is asked for with an empty one."""


class ApiError(Exception):
    """The API server refused, or did not answer (status 0)."""

    def __init__(self, doing: str, status: int, reason: str, message: str, retry_after: float = 0.0) -> None:
        super().__init__(f"{doing}: {status} {reason}: {message}")
        self.status, self.reason, self.message, self.retry_after = status, reason, message, retry_after


@dataclass(frozen=True)
class Connection:
    """How to reach the API server, for Kopf's own watches."""

    server: str
    ca_path: str | None
    verify: bool
    token: str | None
    certificate_path: str | None
    key_path: str | None


@dataclass(frozen=True)
class Page:
    items: list[Manifest]
    version: str


class Cluster:
    """One connection pool to one API server."""

    def __init__(
        self, configuration: client.Configuration, request_seconds: float, clock: Callable[[], float], wall: Callable[[], datetime]
    ) -> None:
        self._configuration = configuration
        self._api = client.ApiClient(configuration)
        self._api.user_agent = names.FIELD_MANAGER
        self._timeout = aiohttp.ClientTimeout(total=request_seconds)
        self._clock = clock
        self.answered = clock()
        """When the API server last answered anything at all."""
        self.now = ServerClock(wall, clock)
        """What time it is by the API server."""
        self.requests: Counter[tuple[str, str, int]] = Counter()
        """(verb, kind, status code; 0 for no answer) -> requests made."""
        self.timed: Callable[[str, float], None] = lambda verb, seconds: None
        """Told the verb and the seconds of every request."""
        self.may_write: Callable[[], bool] = lambda: True
        """Asked before every request that changes something but the Lease: whoever has lost the lead changes nothing any more."""

    @classmethod
    async def connect(
        cls, request_seconds: float, pool: int, clock: Callable[[], float] = time.monotonic, wall: Callable[[], datetime] = utc_now
    ) -> Self:
        """By the pod's service account, or by $KUBECONFIG outside of a cluster. Does not talk to the server yet."""
        configuration = client.Configuration()
        file = os.environ.get("KUBECONFIG")
        if file or "KUBERNETES_SERVICE_HOST" not in os.environ:
            await config.load_kube_config(file, client_configuration=configuration)  # type: ignore[no-untyped-call]
        else:
            config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        configuration.connection_pool_maxsize = pool
        return cls(configuration, request_seconds, clock, wall)

    async def connection(self) -> Connection:
        """The same access for Kopf, with a token as fresh as the file that holds it."""
        c = self._configuration
        bearer = await c.get_api_key_with_prefix("BearerToken") or ""
        token = bearer.partition(" ")[2] or bearer or None
        return Connection(c.host, c.ssl_ca_cert, c.verify_ssl, token, c.cert_file, c.key_file)

    async def create(self, manifest: Manifest, strict: bool = False, dry_run: bool = False) -> Manifest:
        """POST. With strict, an unknown field is an error and not dropped; a dry run is judged by the server and not kept."""
        query = {"fieldManager": names.FIELD_MANAGER}
        query |= ({"fieldValidation": "Strict"} if strict else {}) | ({"dryRun": "All"} if dry_run else {})
        return await self._call("POST", manifest["kind"], manifest["metadata"].get("namespace", ""), "", query, manifest)

    async def replace(self, manifest: Manifest) -> Manifest:
        """PUT: all of it, on condition that its resourceVersion is still the newest."""
        meta = manifest["metadata"]
        query = {"fieldManager": names.FIELD_MANAGER}
        return await self._call("PUT", manifest["kind"], meta.get("namespace", ""), meta["name"], query, manifest)

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        """This very object, and in the background what it owns; a namesake of another uid is a 409."""
        options = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background", "preconditions": {"uid": uid}}
        await self._call("DELETE", kind, namespace, name, {}, options)

    async def has_group(self, name: str) -> bool:
        """Does the cluster serve this API group?"""
        try:
            await self._request("GET", "APIGroup", f"/apis/{quote(name)}", f"reading API group {name}")
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return True

    async def schema(self) -> Manifest:
        """Of a CompressionJob, as the API server knows it; what it keeps unread is not in there."""
        url = f"/openapi/v3/apis/{names.GROUP}/{names.VERSION}"
        answer = await self._request("GET", "OpenAPI", url, f"reading the schema of {names.KIND}")
        found: dict[str, Manifest] = (answer.get("components") or {}).get("schemas") or {}
        wanted = {"group": names.GROUP, "version": names.VERSION, "kind": names.KIND}
        return next((schema for schema in found.values() if wanted in (schema.get("x-kubernetes-group-version-kind") or ())), {})

    async def get(self, kind: str, namespace: str, name: str) -> Manifest:
        return await self._call("GET", kind, namespace, name, {})

    async def patch(self, kind: str, namespace: str, name: str, body: Manifest, status: bool = False) -> Manifest:
        """A merge patch: lists are replaced, and a resourceVersion in it makes it conditional."""
        path = f"{name}/status" if status else name
        return await self._call("PATCH", kind, namespace, path, {"fieldManager": names.FIELD_MANAGER}, body)

    async def pages(self, kind: str, namespace: str, **selectors: str) -> AsyncIterator[Page]:
        """All objects of a kind in a namespace, or with an empty one in all of them, as of one moment."""
        query = {"limit": str(PAGE), **selectors}
        while True:
            answer = await self._call("GET", kind, namespace, "", query)
            meta = answer.get("metadata") or {}
            yield Page(answer.get("items") or [], meta.get("resourceVersion", ""))
            if not meta.get("continue"):
                return
            query["continue"] = meta["continue"]

    async def children(self, kind: str, namespace: str, uid: str) -> list[Manifest]:
        """The child Jobs or pods of one CompressionJob, read now."""
        selector = f"{names.LABEL_JOB_UID}={uid}"
        return [item async for page in self.pages(kind, namespace, labelSelector=selector) for item in page.items]

    async def warnings(self, namespace: str, kind: str) -> list[Manifest]:
        """Warning events about all objects of a kind, but for those that the object's own status tells as well."""
        selector = f"involvedObject.kind={kind},type=Warning,reason!=FailedScheduling,reason!=BackOff,reason!=Unhealthy"
        return [item async for page in self.pages("Event", namespace, fieldSelector=selector) for item in page.items]

    async def __aenter__(self) -> Self:
        # aiohttp forgets idle connections after 15 s, and a new one costs several handshakes at once; the server keeps them for 90 s
        rest = self._api.rest_client
        connector = aiohttp.TCPConnector(limit=rest.maxsize, ssl=rest.ssl_context, keepalive_timeout=IDLE_SECONDS)
        # without trust_env, by which ~/.netrc and the environment are read before every request, in a thread: an eighth of our time
        rest.pool_manager = aiohttp.ClientSession(connector=connector)
        rest.proxy = rest.proxy or _proxy(self._configuration.host)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._api.close()  # type: ignore[no-untyped-call]

    async def _call(
        self, method: str, kind: str, namespace: str, path: str, query: Mapping[str, str], body: Manifest | None = None
    ) -> Manifest:
        doing = f"{_GERUNDS[method]} {kind} {namespace}/{path or (body or {}).get('metadata', {}).get('name', '')}"
        verb = "LIST" if method == "GET" and not path else method
        return await self._request(verb, kind, _url(kind, namespace, path, query), doing, body)

    async def _request(self, verb: str, kind: str, url: str, doing: str, body: Manifest | None = None) -> Manifest:
        method = "GET" if verb == "LIST" else verb
        if method != "GET" and kind != "Lease" and not self.may_write():
            raise ApiError(doing, 0, "NotLeading", "another operator may lead by now")
        began = self._clock()
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if method == "PATCH":
            headers["Content-Type"] = "application/merge-patch+json"
        try:
            sent = await self._api.param_serialize(method, url, header_params=headers, auth_settings=["BearerToken"])
            answer = await self._api.rest_client.request(  # type: ignore[no-untyped-call]
                method, sent[1], headers=sent[2], body=body, _request_timeout=self._timeout
            )
            text = await answer.read()
        except (TimeoutError, OSError, aiohttp.ClientError) as error:
            self._count(verb, kind, 0, began)
            raise ApiError(doing, 0, type(error).__name__, str(error) or "no answer") from error
        self.answered = self._clock()
        self._count(verb, kind, answer.status, began)
        if answer.status >= 400:
            raise _error(doing, answer.status, text, answer.getheader("Retry-After"))
        self.now.heard(answer.getheader("Date"), began)  # of a refusal it may be a gateway's
        parsed: Manifest = json.loads(text)
        return parsed

    def _count(self, verb: str, kind: str, code: int, began: float) -> None:
        self.requests[verb, kind, code] += 1
        self.timed(verb, self._clock() - began)


_GERUNDS = {"GET": "reading", "POST": "creating", "PATCH": "patching", "PUT": "replacing", "DELETE": "deleting"}


def _url(kind: str, namespace: str, path: str, query: Mapping[str, str]) -> str:
    base, plural = ROUTES[kind]
    scope = f"/namespaces/{quote(namespace)}" if namespace else ""
    tail = f"/{path}" if path else ""
    return f"{base}{scope}/{plural}{tail}" + (f"?{urlencode(query)}" if query else "")


def _proxy(server: str) -> str | None:
    """What the environment says now ($HTTPS_PROXY, $NO_PROXY): it does not change while we run."""
    asked = urlsplit(server)
    return None if proxy_bypass(asked.hostname or "") else getproxies().get(asked.scheme)


def _error(doing: str, status: int, text: bytes, retry_after: str | None) -> ApiError:
    """The server's own Status object, or what a proxy says in its place."""
    try:
        told = json.loads(text)
        reason, message = str(told.get("reason", "")), str(told.get("message", ""))
    except (ValueError, AttributeError):
        reason, message = "", text.decode(errors="replace")[:500]
    pause = float(retry_after) if retry_after and retry_after.isdigit() else 0.0
    return ApiError(doing, status, reason, message, pause)
