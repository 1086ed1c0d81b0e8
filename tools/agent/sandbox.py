"""Inside the container's first process, in a fresh PID namespace: its own view of the machine, its user, its command."""

import errno
import os
import signal
from pathlib import Path

from agent import kernel, memory, rootfs
from agent.contract import ProcessSpec

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


def become(spec: ProcessSpec, folder: Path, streams: tuple[int, int, int]) -> None:
    """Turns this process into the container's, on these descriptors; returns only by raising OSError or CommandError."""
    memory.join(spec.memory)
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWUTS | kernel.CLONE_NEWIPC)
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.set_hostname(spec.hostname)
    root = folder / "rootfs"
    layers = rootfs.lay(spec, folder, root)
    rootfs.add_kernel_folders(spec, root)
    for mount in spec.mounts:
        rootfs.bind(mount.source, rootfs.in_root(root, mount.target), mount.read_only)
    rootfs.in_root(root, spec.cwd).mkdir(parents=True, exist_ok=True)
    if spec.read_only_root:
        for layer in layers:
            rootfs.remount_read_only(layer)
    kernel.pivot_root(str(root))
    os.chdir(spec.cwd)
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
    take_identity(spec)
    execute(spec.argv, spec.env)


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
