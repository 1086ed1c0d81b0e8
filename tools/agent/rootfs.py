"""A container's root file system, made inside its own mount namespace.

The image is the lower layer of an overlay, so mount points and everything else that a pod writes land in the run's own
folder and vanish with it. Where the image is this machine, its other file systems are laid over in the same way.
"""

import os
import stat
import sys
from pathlib import Path

from agent import kernel
from agent.contract import ProcessSpec

_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_KERNEL_FOLDERS = ("/proc", "/sys", "/dev")
_LINKS = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"}


def lay(spec: ProcessSpec, folder: Path, root: Path) -> list[Path]:
    """The image at `root`, writable; returns the mounts that a read-only root is to cover. OSError if nothing works."""
    layers, extra = folder / "layers", ",userxattr" if spec.user_namespace else ""
    if spec.lower == "/" and spec.user_namespace:
        # The kernel keeps such a namespace from seeing what lies under the machine's mounts, so `/` as a whole is refused.
        points = _entry_by_entry(layers, root, extra)
    else:
        try:
            points = _overlay(spec.lower, layers / "0", root, extra)
        except OSError:
            # An overlay (this machine may itself be a container) cannot hold another's upper layer; memory can.
            kernel.mount("tmpfs", str(layers), "tmpfs", 0, "mode=755")
            points = _overlay(spec.lower, layers / "0", root, extra)
    if spec.lower == "/" and not spec.user_namespace:
        skipped = (*_KERNEL_FOLDERS, str(folder))
        others = [point for point in _mount_points() if not any(_below(point, other) for other in skipped)]
        for number, point in enumerate(others, 1):
            if Path(point).is_dir():
                points += _overlay_or_bind(point, layers / str(number), root / point.lstrip("/"), extra)
        for place in spec.traversable:
            _open_passage(root / place.lstrip("/"))
    for name, text in (("etc/hosts", spec.hosts), ("etc/hostname", spec.hostname + "\n")):
        file = root / name
        file.parent.mkdir(exist_ok=True)
        file.unlink(missing_ok=True)
        file.write_text(text)
    return points


def in_root(root: Path, path: str) -> Path:
    """Where `path` of the container lies on this machine: symbolic links lead no further than `root`."""
    resolved, pending, links = root, [part for part in path.split("/") if part], 0
    while pending:
        part = pending.pop(0)
        if part in (".", ".."):
            resolved = resolved.parent if part == ".." and resolved != root else resolved
            continue
        step = resolved / part
        if step.is_symlink() and links < 40:
            target, links = str(step.readlink()), links + 1
            resolved = root if target.startswith("/") else resolved
            pending = [piece for piece in target.split("/") if piece] + pending
        else:
            resolved = step
    return resolved


def add_kernel_folders(spec: ProcessSpec, root: Path) -> None:
    """/proc, /sys and a /dev with the usual few devices and those lent to the pod."""
    for name in ("proc", "sys", "dev"):
        (root / name).mkdir(exist_ok=True)
    safe = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    try:
        kernel.mount("proc", str(root / "proc"), "proc", safe)
    except OSError:  # inside another container, whose own /proc is partly hidden, a fresh one is refused
        bind("/proc", root / "proc", read_only=False)
    bind("/sys", root / "sys", read_only=True)
    kernel.mount("tmpfs", str(root / "dev"), "tmpfs", kernel.MS_NOSUID, "mode=755,size=65536k")
    for device in [f"/dev/{name}" for name in _DEVICES] + spec.devices:
        if Path(device).exists():
            bind(device, root / device.lstrip("/"), read_only=False)
    for name, leads_to in _LINKS.items():
        (root / "dev" / name).symlink_to(leads_to)
    (root / "dev/shm").mkdir()
    kernel.mount("shm", str(root / "dev/shm"), "tmpfs", safe, "mode=1777,size=65536k")


def bind(source: str, target: Path, read_only: bool) -> None:
    """A folder or file of this machine at `target`, which is made if need be."""
    if Path(source).is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    kernel.mount(source, str(target), "", kernel.MS_BIND | kernel.MS_REC)
    if read_only:
        remount_read_only(target)


def remount_read_only(target: Path) -> None:
    """One mount, not those below it."""
    # In a user namespace the flags that a mount came with are locked: they must be given again.
    kept = os.statvfs(target).f_flag & (kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    kernel.mount("none", str(target), "", kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kept)


def _entry_by_entry(layers: Path, root: Path, extra: str) -> list[Path]:
    """Each folder of `/` with an overlay of its own."""
    root.mkdir()
    kernel.mount("tmpfs", str(root), "tmpfs", 0, "mode=755")
    points = [root]
    for entry in Path("/").iterdir():
        target = root / entry.name
        if str(entry) in _KERNEL_FOLDERS:
            continue
        if entry.is_symlink():
            target.symlink_to(entry.readlink())
        elif entry.is_dir():
            points += _overlay_or_bind(str(entry), layers / entry.name, target, extra)
        elif entry.is_file():
            bind(str(entry), target, read_only=True)
    return points


def _overlay_or_bind(lower: str, layer: Path, target: Path, extra: str) -> list[Path]:
    try:
        return _overlay(lower, layer, target, extra)
    except OSError as error:
        # Some file systems cannot be a lower layer: then it is seen, not written.
        print(f"{lower} is read-only in the container: {error}", file=sys.stderr)
        bind(lower, target, read_only=True)
        return []


def _overlay(lower: str, layer: Path, target: Path, extra: str) -> list[Path]:
    upper, work = layer / "upper", layer / "work"
    for made in (upper, work, target):
        made.mkdir(parents=True, exist_ok=True)
    upper.chmod(stat.S_IMODE(Path(lower).stat().st_mode))
    folders = {"lowerdir": lower, "upperdir": str(upper), "workdir": str(work)}
    options = ",".join(f"{name}={_escaped(path)}" for name, path in folders.items())
    kernel.mount("overlay", str(target), "overlay", 0, options + extra)
    return [target]


def _open_passage(shown: Path) -> None:
    """Lets everyone pass through a folder, in the container's copy of it alone."""
    try:
        mode = stat.S_IMODE(shown.stat().st_mode)
        if mode & 0o011 != 0o011:  # the group too: a user without a group of its own has group 0, root's
            shown.chmod(mode | 0o011)
    except OSError as error:
        print(f"{shown} may stay closed to the container's user: {error}", file=sys.stderr)


def _mount_points() -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = {line.split()[4].encode().decode("unicode_escape") for line in lines}
    return sorted(points - {"/"})


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _escaped(path: str) -> str:
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")
