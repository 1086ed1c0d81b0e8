"""Servers as child processes: free ports, start, readiness, an orderly stop, and a record to stop them later.

A child dies with its parent unless it is to be kept. The kernel counts the *thread* that started it as the parent, so
start servers from a thread that lives as long as they should: in practice the main one.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Process", "StartError", "free_port", "free_ports", "spawn", "wait_until"]

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded here: nothing may be imported between fork and exec


class StartError(Exception):
    """A server did not start or did not get ready; the message carries the end of its log."""


@dataclass
class Process:
    """A running server. `born` (clock ticks since boot) tells it from a later process with the same pid."""

    name: str
    pid: int
    born: int
    log: Path
    _popen: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def alive(self) -> bool:
        if self._popen is not None and self._popen.poll() is not None:
            return False
        return _born(self.pid) == self.born

    def send(self, number: signal.Signals) -> None:
        if self.alive:
            os.kill(self.pid, number)

    def stop(self, grace: float) -> bool:
        """SIGTERM, `grace` seconds, SIGKILL. True if it ended by itself. Returns only when it is gone."""
        self.send(signal.SIGTERM)
        self.send(signal.SIGCONT)  # a stopped process would sleep through its SIGTERM
        polite = _gone(self, grace)
        if not polite:
            self.send(signal.SIGKILL)
            if not _gone(self, 10):
                raise StartError(f"{self.name} (pid {self.pid}) survived SIGKILL for 10 s; look at its kernel stack")
        return polite

    def tail(self, lines: int = 15) -> str:
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError as error:
            return f"(no log: {error})"

    def record(self) -> dict[str, str | int]:
        """What `from_record` needs to find this process again from another one."""
        return {"name": self.name, "pid": self.pid, "born": self.born, "log": str(self.log)}

    @staticmethod
    def from_record(record: Mapping[str, str | int]) -> Process:
        return Process(str(record["name"]), int(record["pid"]), int(record["born"]), Path(str(record["log"])))


def spawn(
    name: str,
    command: Sequence[str | Path],
    *,
    log: Path,
    environ: Mapping[str, str] | None = None,
    keep: bool = False,
    death_signal: signal.Signals = signal.SIGKILL,
) -> Process:
    """Starts `command` in a session of its own with its output appended to `log`.

    `keep`: it outlives this process. Otherwise the kernel sends it `death_signal` when this process ends, however that
    happens.
    """
    parent = os.getpid()

    def before_exec() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(death_signal))
        if os.getppid() != parent:  # it died between fork and prctl
            os._exit(1)

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        popen = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environ) if environ is not None else None,
            start_new_session=True,  # Ctrl-C is for us, who stop them in order
            preexec_fn=None if keep else before_exec,
        )
    return Process(name, popen.pid, _born(popen.pid) or 0, log, popen)


def wait_until(ready: Callable[[], bool], *, what: str, seconds: float, needs: Sequence[Process] = ()) -> None:
    """Polls `ready` every 50 ms. Raises StartError when time is up or one of the processes it needs has ended."""
    deadline = time.monotonic() + seconds
    while not ready():
        for process in needs:
            if not process.alive:
                raise StartError(f"{process.name} ended while waiting for {what}; end of {process.log}:\n{process.tail()}")
        if time.monotonic() > deadline:
            logs = "\n".join(f"end of {process.log}:\n{process.tail()}" for process in needs)
            raise StartError(f"{what} took more than {seconds:.0f} s; is the machine overloaded?\n{logs}")
        time.sleep(0.05)


def free_port() -> int:
    """One free port of 127.0.0.1; `free_ports` for several, which must differ from each other."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Ports below the range that outgoing connections take theirs from, so that they are still free in a second."""
    ports: set[int] = set()
    for _ in range(200):
        port = random.randrange(10_000, 30_000)
        with socket.socket() as candidate:
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.add(port)
        if len(ports) == count:
            return list(ports)
    raise StartError(f"fewer than {count} free ports on 127.0.0.1 between 10000 and 30000 in 200 tries")


def _gone(process: Process, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while process.alive:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _born(pid: int) -> int | None:
    """Start time in clock ticks since boot; None for a process that is gone or only waits to be reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])
