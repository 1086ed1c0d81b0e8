"""How much memory there is for engines: a GPU's where there is one, else the host's within the container's limit."""

from __future__ import annotations

import gc
from pathlib import Path

from kompressor_worker.memory import give_back_freed_memory

CGROUP = Path("/sys/fs/cgroup")


def give_back() -> None:
    """What the worker's tensors have left goes back, to the system and to the GPU."""
    import torch

    gc.collect()
    give_back_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gpu_free() -> int | None:
    """Bytes; None without a GPU."""
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None


def host_free(cgroup: Path = CGROUP) -> int:
    """Bytes that can be had before something is killed. What only caches files counts as free."""
    free = _field(Path("/proc/meminfo"), "MemAvailable:") << 10
    try:
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        return min(free, max(0, limit - used + _field(cgroup / "memory.stat", "inactive_file")))
    except (OSError, ValueError):  # no limit, or no such controller
        return free


def _field(path: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.split()[0] == name)
