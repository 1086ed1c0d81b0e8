"""A container's memory limit: by cgroup where this machine lets us, else by adding up its processes' memory.

Polling counts anonymous and shared memory, not mapped files: a cgroup would reclaim those before it kills.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from agent.contract import MemoryLimit

POLLING = "polling"


def detect() -> tuple[str, str]:
    """(kind, parent folder) of what works here, found by trying; call while the process has one thread."""
    for kind, candidates in (("cgroup1", _version1()), ("cgroup2", _version2())):
        for parent in candidates:
            if _works(kind, parent):
                return kind, str(parent)
    return POLLING, ""


def prepare(kind: str, parent: str, name: str, limit: int) -> MemoryLimit:
    """The place for one run. A limit of 0 means none."""
    if limit <= 0:
        return MemoryLimit()
    if kind == POLLING:
        return MemoryLimit(POLLING, "", limit)
    folder = Path(parent, name)
    folder.mkdir(exist_ok=True)
    if kind == "cgroup1":
        (folder / "memory.limit_in_bytes").write_text(str(limit))
    else:
        (folder / "memory.max").write_text(str(limit))
        # As the kubelet does: one process over the limit ends the whole container.
        (folder / "memory.oom.group").write_text("1")
    return MemoryLimit(kind, str(folder), limit)


def join(memory: MemoryLimit) -> None:
    """The calling process and all its children from now on count."""
    if memory.folder:
        Path(memory.folder, "cgroup.procs").write_text("0")


def exceeded(memory: MemoryLimit, pid: int) -> bool:
    """Whether the container has been over its limit (its kernel has killed, or the poll finds it above)."""
    if memory.kind == POLLING:
        return sum(_resident(each) for each in family(pid)) > memory.limit
    if not memory.folder:
        return False
    file = "memory.oom_control" if memory.kind == "cgroup1" else "memory.events"
    killed = re.search(r"^oom_kill (\d+)$", Path(memory.folder, file).read_text(), re.MULTILINE)
    return killed is not None and int(killed[1]) > 0


def remove(memory: MemoryLimit) -> None:
    """An empty cgroup's folder; one that still holds a process stays, and its owner says nothing."""
    if memory.folder:
        with contextlib.suppress(OSError):
            Path(memory.folder).rmdir()


def family(pid: int) -> Iterator[int]:
    """The process and all that descend from it."""
    yield pid
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:  # gone meanwhile
        return
    for child in children:
        yield from family(child)


def _resident(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(kib) for kib in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", status, re.MULTILINE)) * 1024


def _mounted(kind: str, option: str) -> Iterator[tuple[str, Path]]:
    """(root inside the hierarchy, mount point) of mounted cgroup file systems."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        fields, (filesystem, _, options) = left.split(), right.split(" ", 2)
        if filesystem == kind and (not option or option in options.split(",")):
            yield fields[3], Path(fields[4])


def _own(controller: str) -> str:
    """This process's path in a hierarchy; `controller` is empty for version 2."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return "/"


def _inside(root: str, point: Path, path: str) -> Path:
    relative = path.removeprefix(root) if root != "/" else path
    return point / relative.lstrip("/")


def _version1() -> Iterator[Path]:
    for root, point in _mounted("cgroup", "memory"):
        yield _inside(root, point, _own("memory"))


def _version2() -> Iterator[Path]:
    """The nearest group above us that hands memory down: a group with processes of its own cannot."""
    for root, point in _mounted("cgroup2", ""):
        folder = _inside(root, point, _own(""))
        for group in (folder, *folder.parents):
            control = group / "cgroup.subtree_control"
            if group.is_relative_to(point) and control.exists() and "memory" in control.read_text().split():
                yield group


def _works(kind: str, parent: Path) -> bool:
    """Makes a group, limits it, moves a child into it."""
    try:
        trial = prepare(kind, str(parent), f"node-agent-trial-{os.getpid()}", 1 << 30)
    except OSError:
        return False
    child = os.fork()
    if child == 0:
        try:
            join(trial)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    remove(trial)
    return status == 0
