"""Reading what a pod refers to, with the node's own rights."""

import time
from collections.abc import Callable

from agent.client import ApiError, ApiUnavailable, Client, Object

_PLURALS = {"Secret": "secrets", "ConfigMap": "configmaps", "PersistentVolumeClaim": "persistentvolumeclaims"}

_REFUSALS, _PAUSE_SECONDS = 5, 0.1


def lookup_in(client: Client, namespace: str) -> Callable[[str, str], Object | None]:
    """(kind, name) -> the object, or None where there is none."""

    def lookup(kind: str, name: str) -> Object | None:
        return read(client, f"/api/v1/namespaces/{namespace}/{_PLURALS[kind]}/{name}")

    return lookup


def read(client: Client, path: str) -> Object | None:
    """The object at `path`; None if there is none."""
    try:
        return patiently(lambda: client.get(path))
    except ApiError as error:
        if error.code == 404:
            return None
        raise


def patiently(call: Callable[[], Object]) -> Object:
    """A server learns which objects a node may read, and for which pods, a moment after it has bound a pod to the node.

    ApiUnavailable while it goes on saying no.
    """
    for _ in range(_REFUSALS):
        try:
            return call()
        except ApiError as error:
            if error.code != 403:
                raise
            refusal = error
            time.sleep(_PAUSE_SECONDS)
    raise ApiUnavailable(str(refusal)) from refusal
