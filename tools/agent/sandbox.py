"""Inside the container's first process: its own view of the machine, then its command.

The image is the lower layer of an overlay, so mount points and everything else that a pod writes land in the run's own
folder and vanish with it. Runs as the first process of a fresh PID namespace.
"""

import errno
import os
import signal
import stat
import sys
from pathlib import Path

from agent import kernel, memory
from agent.contract import ProcessSpec

_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_KERNEL_FOLDERS = ("/proc", "/sys", "/dev")
_LINKS = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"}
# In the kernel's order: the number is the place.
_CAPABILITIES = [
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
]  # fmt: skip


class CommandError(Exception):
    """The container stands, its command does not start; in a runtime's words."""


def become(spec: ProcessSpec, folder: Path) -> None:
    """Turns this process into the container's; returns only by raising OSError or CommandError."""
    memory.join(spec.memory)
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWUTS | kernel.CLONE_NEWIPC)
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.set_hostname(spec.hostname)
    root = folder / "rootfs"
    layers = _layers(spec, folder, root)
    _kernel_folders(spec, root)
    for mount in spec.mounts:
        _bind(mount.source, in_root(root, mount.target), mount.read_only)
    in_root(root, spec.cwd).mkdir(parents=True, exist_ok=True)
    if spec.read_only_root:
        for layer in layers:
            _remount_read_only(layer)
    kernel.pivot_root(str(root))
    os.chdir(spec.cwd)
    take_identity(spec)
    execute(spec.argv, spec.env)


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


def take_identity(spec: ProcessSpec) -> None:
    """User, groups and capabilities of the container, for its first process and for commands that join it."""
    if spec.capabilities is not None and not spec.user_namespace:
        keep = {_CAPABILITIES.index(name) for name in spec.capabilities if name in _CAPABILITIES}
        for number in range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1):
            if number not in keep:
                kernel.prctl(kernel.PR_CAPBSET_DROP, number)
    if not spec.user_namespace:
        os.setgroups(spec.groups)
        os.setresgid(spec.gid, spec.gid, spec.gid)
        os.setresuid(spec.uid, spec.uid, spec.uid)
    if spec.no_new_privileges:
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    # A change of user clears this, so it comes last: whoever started us dies, we die.
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)


def execute(argv: list[str], env: dict[str, str]) -> None:
    """Becomes the command; returns only by raising CommandError."""
    # Python ignores two signals that a command expects to find as they were.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.umask(0o022)
    try:
        os.execvpe(argv[0], argv, env)
    except OSError as error:
        missing = error.errno == errno.ENOENT and "/" not in argv[0]
        why = "executable file not found in $PATH" if missing else (error.strerror or str(error)).lower()
        raise CommandError(f'exec: "{argv[0]}": {why}') from error


def _layers(spec: ProcessSpec, folder: Path, root: Path) -> list[Path]:
    """The image at `root`, writable; the mount points made. With this machine as image, its other file systems too."""
    extra = ",userxattr" if spec.user_namespace else ""
    try:
        points = _overlay(spec.lower, folder / "layers", 0, root, extra)
    except OSError:
        # An overlay (this machine may itself be a container) cannot hold another's upper layer; memory can.
        kernel.mount("tmpfs", str(folder / "layers"), "tmpfs", 0, "mode=755")
        points = _overlay(spec.lower, folder / "layers", 0, root, extra)
    if spec.lower == "/":
        skipped = (*_KERNEL_FOLDERS, str(folder))
        others = [point for point in _mount_points() if not any(_below(point, other) for other in skipped)]
        for number, point in enumerate(others, 1):
            target = root / point.lstrip("/")
            if Path(point).is_dir():
                try:
                    points += _overlay(point, folder / "layers", number, target, extra)
                except OSError as error:
                    # Some file systems cannot be a lower layer: then it is seen, not written.
                    print(f"{point} is read-only in the container: {error}", file=sys.stderr)
                    _bind(point, target, read_only=True)
    if spec.lower == "/" and not spec.user_namespace:
        for place in spec.traversable:
            shown = root / place.lstrip("/")
            mode = stat.S_IMODE(shown.stat().st_mode)
            if mode & 0o011 != 0o011:  # the group too: a user without a group of its own has group 0, root's
                shown.chmod(mode | 0o011)
    for name, text in (("etc/hosts", spec.hosts), ("etc/hostname", spec.hostname + "\n")):
        file = root / name
        file.parent.mkdir(exist_ok=True)
        file.unlink(missing_ok=True)
        file.write_text(text)
    return points


def _overlay(lower: str, layers: Path, number: int, target: Path, extra: str) -> list[Path]:
    upper, work = layers / f"{number}-upper", layers / f"{number}-work"
    for made in (upper, work, target):
        made.mkdir(parents=True, exist_ok=True)
    upper.chmod(stat.S_IMODE(Path(lower).stat().st_mode))
    options = ",".join(f"{name}={_escaped(str(path))}" for name, path in
                       (("lowerdir", lower), ("upperdir", upper), ("workdir", work)))  # fmt: skip
    kernel.mount("overlay", str(target), "overlay", 0, options + extra)
    return [target]


def _kernel_folders(spec: ProcessSpec, root: Path) -> None:
    for name in ("proc", "sys", "dev"):
        (root / name).mkdir(exist_ok=True)
    safe = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    try:
        kernel.mount("proc", str(root / "proc"), "proc", safe)
    except OSError:  # inside another container, whose own /proc is partly hidden, a fresh one is refused
        _bind("/proc", root / "proc", read_only=False)
    _bind("/sys", root / "sys", read_only=True)
    kernel.mount("tmpfs", str(root / "dev"), "tmpfs", kernel.MS_NOSUID, "mode=755,size=65536k")
    for device in [f"/dev/{name}" for name in _DEVICES] + spec.devices:
        if Path(device).exists():
            _bind(device, root / device.lstrip("/"), read_only=False)
    for name, leads_to in _LINKS.items():
        (root / "dev" / name).symlink_to(leads_to)
    (root / "dev/shm").mkdir()
    kernel.mount("shm", str(root / "dev/shm"), "tmpfs", safe, "mode=1777,size=65536k")


def _bind(source: str, target: Path, read_only: bool) -> None:
    if Path(source).is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    kernel.mount(source, str(target), "", kernel.MS_BIND | kernel.MS_REC)
    if read_only:
        _remount_read_only(target)


def _remount_read_only(target: Path) -> None:
    # In a user namespace the flags that a mount came with are locked: they must be given again.
    kept = os.statvfs(target).f_flag & (kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    kernel.mount("none", str(target), "", kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kept)


def _mount_points() -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = {line.split()[4].encode().decode("unicode_escape") for line in lines}
    return sorted(points - {"/"})


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _escaped(path: str) -> str:
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")
