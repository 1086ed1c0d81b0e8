"""What the agent hands to a container's shim (`spec.json`) and what the shim answers (`state.json`).

Both live in the run's folder, so that an agent that starts again finds its containers.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Mount:
    """A folder or file of this machine at a path in the container."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True)
class MemoryLimit:
    """`kind` is cgroup1, cgroup2, polling or none; `folder` the cgroup made for this run."""

    kind: str = "none"
    folder: str = ""
    limit: int = 0


@dataclass(frozen=True)
class ProcessSpec:
    """Everything a shim needs to run one container once; nothing of Kubernetes is left in it."""

    argv: list[str]
    env: dict[str, str]
    cwd: str
    hostname: str
    hosts: str
    """the text of /etc/hosts"""
    uid: int
    gid: int
    groups: list[int]
    lower: str
    """the image: a folder seen as the root file system, never written to"""
    mounts: list[Mount]
    traversable: list[str]
    """folders that any user may pass through inside the container, whatever their mode on this machine"""
    devices: list[str]
    read_only_root: bool
    no_new_privileges: bool
    capabilities: list[str] | None
    """those that root keeps; None: all (a privileged container)"""
    user_namespace: bool
    """the agent is not root: its own user plays the part of `uid`"""
    leashed: bool
    """the container dies with the agent"""
    memory: MemoryLimit = field(default_factory=MemoryLimit)

    def write(self, folder: Path) -> None:
        """Readable by this user only: the environment holds secrets."""
        file = folder / "spec.json"
        file.touch(mode=0o600)
        file.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> "ProcessSpec":
        data = json.loads((folder / "spec.json").read_text())
        data["mounts"] = [Mount(**mount) for mount in data["mounts"]]
        data["memory"] = MemoryLimit(**data["memory"])
        return cls(**data)


@dataclass(frozen=True)
class RunState:
    """How one run of a container stands. Times in seconds since the epoch; finished only with an exit code."""

    shim: int = 0
    shim_started: str = ""
    """field 22 of /proc/<shim>/stat: with the pid it names the process for ever, as pids come back"""
    pid: int = 0
    started_at: float = 0.0
    finished_at: float = 0.0
    exit_code: int | None = None
    reason: str = ""
    message: str = ""

    def write(self, folder: Path) -> None:
        """At once: a reader sees the old state or the new one."""
        new = folder / "state.json.new"
        new.write_text(json.dumps(asdict(self)))
        new.replace(folder / "state.json")

    @classmethod
    def read(cls, folder: Path) -> "RunState | None":
        try:
            data: dict[str, Any] = json.loads((folder / "state.json").read_text())
        except FileNotFoundError:
            return None
        return cls(**data)


LOST = RunState(exit_code=137, reason="ContainerStatusUnknown", message="The container could not be located when the pod was terminated")
"""A container of which nothing is known but that it should have run."""


def process_start(pid: int) -> str:
    """When a process started, in the kernel's ticks; empty where it is no more (or only waits to be reaped)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
