"""Workers that start at once: one process that has imported everything forks them. What is forked is a process of its own, to be killed.

For tests that start workers by the dozen; how a worker starts by itself is tested elsewhere.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TextIO

PARENT = """
import gc, json, os, sys
import torch, transformers.models.llama.modeling_llama
import kompressor_worker.flow, kompressor_worker.stream
from kompressor_worker.cli import main
gc.freeze()  # or each child would look through all that was imported, and copy its pages
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.environ.update(order["environ"])
        out = os.open(order["fifo"], os.O_WRONLY)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.argv = ["kompressor", *order["arguments"]]
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
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forked:
    """As much of subprocess.Popen as tests use. One at a time."""

    def __init__(self, nursery: Nursery, pid: int, stderr: TextIO) -> None:
        self.pid, self.stderr, self.returncode = pid, stderr, 0
        self._nursery, self._ended = nursery, False

    def poll(self) -> int | None:
        return self.returncode if self._ended else None

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        said = self.stderr.read()
        if not self._ended:
            self.returncode, self._ended = int(self._nursery.answer()), True
        return None, said


class Nursery:
    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="nursery-")
        self._count = 0
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
        )

    def __enter__(self) -> Nursery:
        assert self.answer() == "ready"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    def answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def worker(self, job: Path, environ: Mapping[str, str] | None = None) -> Forked:
        self._count += 1
        fifo = Path(self._folder.name) / str(self._count)
        os.mkfifo(fifo)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"arguments": ["run", str(job)], "fifo": str(fifo), "environ": dict(environ or {})}) + "\n")
        self._process.stdin.flush()
        return Forked(self, int(self.answer()), fifo.open())
