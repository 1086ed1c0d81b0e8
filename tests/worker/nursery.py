"""Workers that start at once: one process that has imported everything forks them. What is forked is a process of its own, to be killed.

For tests that start workers by the dozen; how a worker starts by itself is tested elsewhere.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from copy import copy
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TextIO

from fork_server import ForkServer

__all__ = ["Forked", "Nursery"]

PATIENCE = 300.0
"""Seconds until a worker must have ended."""

PROGRAM = """
import tempfile, torch, transformers.models.llama.modeling_llama
import kompressor_worker.flow, kompressor_worker.stream
from kompressor_worker.cli import main

def work(order):
    die_with_parent()
    os.environ.clear(), os.environ.update(order["environ"])
    tempfile.tempdir = None  # asked for before, it would be the parent's
    out = os.open(order["fifo"], os.O_WRONLY)
    os.dup2(out, 1), os.dup2(out, 2)
    sys.argv = ["kompressor", *order["arguments"]]
    exec(order["prelude"], {})
    try:
        code = main(order["arguments"])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)

def keep(order):
    "Waits for its one worker and leaves the exit code, so that many workers can be out at a time."
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        work(order)
    print(pid, flush=True)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open(order["fifo"] + ".code", "w") as file:
        file.write(str(code))

serve(keep)
"""


class Forked:
    """As much of subprocess.Popen as tests use."""

    def __init__(self, pid: int, stderr: TextIO, code: Path) -> None:
        self.pid, self.stderr = pid, stderr
        self._code = code
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and self._code.exists() and (said := self._code.read_text()):
            self.returncode = int(said)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (PATIENCE if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("kompressor", deadline)
            time.sleep(0.002)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        said = "" if self.stderr.closed else self.stderr.read()  # until it has ended
        self.stderr.close()
        self.wait(timeout)
        return None, said


class Nursery(ForkServer):
    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="nursery-")
        self._numbers = count(1)
        self._prelude = ""
        super().__init__(PROGRAM, {**os.environ, "OMP_NUM_THREADS": "1"})

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        self._folder.cleanup()

    def after(self, prelude: str) -> Nursery:
        """The same, whose workers run this before anything else: another default, say."""
        prepared = copy(self)
        prepared._prelude = prelude
        return prepared

    def worker(self, job: Path, environ: Mapping[str, str] | None = None) -> Forked:
        """`jobs.worker`, at once."""
        fifo = Path(self._folder.name) / str(next(self._numbers))
        os.mkfifo(fifo)
        seen = {**os.environ, "OMP_NUM_THREADS": "1", **(environ or {})}
        order = {"arguments": ["run", str(job)], "fifo": str(fifo), "environ": seen, "prelude": self._prelude, "tells": True}
        return Forked(self.fork(order), fifo.open(), fifo.with_name(f"{fifo.name}.code"))

    def run(self, job: Path, environ: Mapping[str, str] | None = None) -> tuple[int, str]:
        """`jobs.run`, at once: exit code and what it said."""
        worker = self.worker(job, environ)
        said = worker.communicate()[1]
        return worker.wait(), said
