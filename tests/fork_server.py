"""One process that has imported everything and forks what it is ordered to: programs that start at once, each a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["PREPARED", "ForkServer"]

PREPARED = """
import ctypes, gc, json, os, signal, sys

def die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # nobody outlives the tests

def serve(child):
    "For each order, a line of JSON, `child(order)` in a process of its own, whose number is told unless the child tells one."
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()  # or each child would look through all that was imported, and copy its pages
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            die_with_parent()
            child(order)
            os._exit(0)
        if not order.get("tells"):
            print(pid, flush=True)
"""
"""What such a process begins with. Its program imports, defines a child, and calls `serve(child)`."""


class ForkServer:
    def __init__(self, program: str, environ: Mapping[str, str]) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-c", PREPARED + program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(environ)
        )

    def __enter__(self) -> Self:
        assert self._answer() == "ready"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def fork(self, order: Mapping[str, Any]) -> int:
        """The number of the process that carries it out."""
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return int(self._answer())

    def alive(self) -> list[int]:
        """The processes that it has forked and that have not ended."""
        own = self._process.pid
        return [int(pid) for pid in Path(f"/proc/{own}/task/{own}/children").read_text().split()]

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()
