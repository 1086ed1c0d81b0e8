"""What the nodes of a cluster on this machine still run and keep, by /proc and their folders; no agent is asked.

A container has one process that stands between it and the agent, and ends with it; its command line names the pod's folder.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Place", "occupied", "running"]


@dataclass(frozen=True)
class Place:
    """A pod's folder or process. `namespace` is empty where only a process is left of it."""

    uid: str
    namespace: str
    name: str
    pids: tuple[int, ...]

    def __str__(self) -> str:
        what = f"processes {', '.join(map(str, self.pids))}" if self.pids else "the folder"
        return f"on the node: {what} of pod {self.namespace}/{self.name} ({self.uid})"


def occupied(root: Path) -> list[Place]:
    """Of every pod that takes room on the nodes of the cluster with this root."""
    pids, names = running(root), {}
    for file in root.glob("nodes/*/pods/*/pod.json"):
        try:
            names[file.parent.name] = json.loads(file.read_text())
        except FileNotFoundError:  # it goes this very moment
            continue
    found = [(uid, names.get(uid, {})) for uid in {**names, **pids}]
    return [Place(uid, told.get("namespace", ""), told.get("name", ""), tuple(pids.get(uid, ()))) for uid, told in found]


def running(root: Path) -> dict[str, list[int]]:
    """uid of a pod -> the processes of its containers, one each."""
    folder = re.compile(rf"{re.escape(str(root.resolve()))}/nodes/[^/]+/pods/(?P<uid>[^/]+)/containers/")
    found: dict[str, list[int]] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text()
        except OSError:
            continue
        if here := folder.search(command):
            found.setdefault(here["uid"], []).append(int(process.name))
    return found
