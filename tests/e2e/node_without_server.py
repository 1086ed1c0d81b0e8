"""A node agent's context without a control plane: one GPU, two addresses, and a server that notes what it is told."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from agent.client import ApiUnavailable
from agent.context import Context, Stock
from agent.lifecycle import Backoff
from agent.names import Names

__all__ = ["Node", "Object", "pod"]

Object = dict[str, Any]


class Node:
    """One GPU, and an API server that notes what it is told, and how many GPUs are free by then."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.told: list[tuple[Object, int]] = []
        self.events: list[str] = []
        self.away = 0
        """how many writes are still to fail"""
        self.begin()

    def begin(self) -> None:
        """An agent that starts, perhaps after another."""
        self.gpus = Stock(["0"])
        facts: Any = SimpleNamespace(address="127.0.0.1", allocatable={})
        events: Any = SimpleNamespace(pod=lambda pod, kind, reason, message: self.events.append(reason))
        client: Any = self
        images: Any = None
        self.context = Context(
            client, facts, images, self.root, Backoff(), events, Names(client, self.root / "names", "node"),
            Stock(["127.0.0.2", "127.0.0.3"]), self.gpus, ("none", ""), -1,
            threading.Event(),
        )  # fmt: skip

    def patch(self, path: str, body: Object) -> Object:
        if self.away:
            self.away -= 1
            raise ApiUnavailable("the API server is away")
        self.told.append((body["status"], self.gpus.free))
        return {"metadata": {"resourceVersion": "0"}}


def pod(uid: str, **meta: Any) -> Object:
    container = {"name": "main", "image": "x", "resources": {"limits": {"nvidia.com/gpu": "1"}}}
    meta = {"namespace": "agent", "name": uid, "uid": uid, "resourceVersion": "1", **meta}
    return {"metadata": meta, "spec": {"restartPolicy": "Never", "containers": [container]}}
