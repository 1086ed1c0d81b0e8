"""Processes that train, forked from one that has imported everything; to be killed, or to train together."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fork_server import ForkServer

__all__ = ["Run", "Trainees"]

PATIENCE = 240.0
"""Seconds until a training must have ended."""

PROGRAM = """
import threading
import torch, transformers.models.llama.modeling_llama
import torch.distributed as dist, torch.distributed.checkpoint, torch.distributed.fsdp
from pathlib import Path
from lessons import lesson, rows_of
from kompressor_worker.distil.lesson import Group
from kompressor_worker.distil.train import train
from kompressor_worker.errors import KompressorError
from kompressor_worker.storage.file_source import FileSource

read_into, read = FileSource.read_into, 0
def counted(source, name, start, buffer):
    global read
    read += len(buffer) if name.endswith(".safetensors") else 0
    read_into(source, name, start, buffer)
FileSource.read_into = counted

def child(order):
    log = open(order["log"], "a")
    def say(**words):
        log.write(json.dumps(words) + "\\n")
        log.flush()
    sys.stdout = sys.stderr = log
    rank, size, stop = order["rank"], order["size"], threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        if size > 1:
            dist.init_process_group("gloo", store=dist.FileStore(order["store"], size), rank=rank, world_size=size)
        rows = rows_of(*order["rows"])
        tell = lambda step: say(step=step.step, loss=step.loss)
        teacher, student, output = (Path(order[name]) for name in ("teacher", "student", "output"))
        made = train(lesson(teacher, student, output, rows, order["params"], group=Group(rank, size), stop=stop, tell=tell))
        say(history=made.as_json())
        code = 0
    except KompressorError as error:
        say(error=type(error).__name__, message=str(error))
        code = int(error.exit_code)
    except BaseException as error:
        import traceback
        say(error=type(error).__name__, message=traceback.format_exc())
        code = 1
    say(read=read)
    say(ended=code)
    os._exit(code)

serve(child)
"""


@dataclass
class Run:
    """One training, of one process or several."""

    logs: list[Path]
    pids: list[int]

    def said(self, word: str, rank: int = 0) -> list[Any]:
        """By the leader, or another. `read`: bytes of tensors in checkpoints."""
        lines = self.logs[rank].read_text().splitlines() if self.logs[rank].exists() else []
        entries = [json.loads(line) for line in lines if line.startswith("{")]
        return [entry[word] for entry in entries if word in entry]

    def losses(self) -> dict[int, float]:
        return dict(zip(self.said("step"), self.said("loss"), strict=True))

    def wait_for_step(self, step: int) -> None:
        self._until(lambda: bool(self.said("ended")) or max(self.said("step"), default=0) >= step)

    def kill(self) -> None:
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def terminate(self, which: int = 0) -> None:
        os.kill(self.pids[which], signal.SIGTERM)

    def wait(self) -> list[int]:
        """The exit codes."""
        self._until(lambda: all('"ended"' in log.read_text() for log in self.logs if log.exists()) and all(map(Path.exists, self.logs)))
        return [json.loads(log.read_text().splitlines()[-1])["ended"] for log in self.logs]

    def _until(self, met: Any) -> None:
        deadline = time.monotonic() + PATIENCE
        while not met():
            assert time.monotonic() < deadline, self.logs[0].read_text()
            time.sleep(0.02)


class Trainees(ForkServer):
    def __init__(self) -> None:
        tests = Path(__file__).parent
        path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
        super().__init__(PROGRAM, {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})

    def train(
        self, teacher: Path, student: Path, output: Path, rows: Sequence[Any], params: dict[str, Any], logs: Path, size: int = 1
    ) -> Run:
        """`rows`: arguments of `rows_of`. Processes log to `logs`, which are removed before."""
        logs.mkdir(parents=True, exist_ok=True)
        for old in logs.iterdir():
            old.unlink()
        order = {
            "teacher": str(teacher),
            "student": str(student),
            "output": str(output),
            "rows": list(rows),
            "params": params,
            "size": size,
        }
        files = [logs / f"{rank}.log" for rank in range(size)]
        store = str(logs / "store")
        return Run(files, [self.fork({**order, "rank": rank, "store": store, "log": str(file)}) for rank, file in enumerate(files)])
