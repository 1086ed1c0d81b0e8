"""Reading what a pod refers to, with the node's own rights."""

from collections.abc import Callable

from agent.client import ApiError, ApiUnavailable, Client, Object

_PLURALS = {"Secret": "secrets", "ConfigMap": "configmaps", "PersistentVolumeClaim": "persistentvolumeclaims"}


def lookup_in(client: Client, namespace: str) -> Callable[[str, str], Object | None]:
    """(kind, name) -> the object, or None where there is none."""

    def lookup(kind: str, name: str) -> Object | None:
        return read(client, f"/api/v1/namespaces/{namespace}/{_PLURALS[kind]}/{name}")

    return lookup


def read(client: Client, path: str) -> Object | None:
    """The object at `path`; None if there is none. ApiUnavailable while the server does not let us look."""
    try:
        return client.get(path)
    except ApiError as error:
        if error.code == 404:
            return None
        # The server learns which objects a node may read from the pods bound to it, a moment after the binding.
        raise ApiUnavailable(f"reading {path}: {error}") from error
