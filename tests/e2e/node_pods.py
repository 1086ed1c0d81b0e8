"""Pods for the node agent of tools/agent, and what the API server shows of them."""

from __future__ import annotations

from typing import Any

from cluster_access import Cluster
from waiting import PATIENCE, eventually

Object = dict[str, Any]
IMAGE = "node-agent-test/python:1"
WAIT = f"--timeout={PATIENCE:.0f}s"


def pod(name: str, script: str, *, program: str = "sh", spec: Object | None = None, **container: Any) -> Object:
    main = {"name": "main", "image": IMAGE, "command": [program, "-c", script], **container}
    body = {"restartPolicy": "Never", "containers": [main], **(spec or {})}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "agent"}, "spec": body}


def status(cluster: Cluster, name: str) -> Object:
    found: Object = cluster.get("pod", name, "-n", "agent")["status"]
    return found


def ended(cluster: Cluster, name: str) -> tuple[str, Object]:
    """(phase, terminated state of the main container), once there is one."""

    def look() -> tuple[str, Object] | None:
        seen = status(cluster, name)
        return (seen["phase"], main(seen)["state"]["terminated"]) if seen["phase"] in ("Succeeded", "Failed") else None

    return eventually(look)


def main(seen: Object) -> Object:
    found: Object = next(iter(seen.get("containerStatuses") or []), {"state": {}, "restartCount": 0})
    return found


def waiting(cluster: Cluster, name: str, reason: str) -> str:
    """The message with which the main container waits, once it waits for that reason."""

    def look() -> Object | None:
        held: Object = main(status(cluster, name))["state"].get("waiting", {})
        return held if held.get("reason") == reason else None

    return str(eventually(look).get("message", ""))


def log(cluster: Cluster, name: str, *options: str) -> str:
    return cluster.kubectl("logs", "-n", "agent", name, *options)
