"""An engine's process: how it fails, and that nothing of it stays behind. By a stand-in that opens what it is given."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_stand_in import stand_in

from kompressor_worker.errors import EngineFailed, Terminated
from kompressor_worker.runtime import ENGINES, Installed
from kompressor_worker.runtime.engine_process import EngineProcess
from models import trained_model


@pytest.mark.parametrize(
    "how, why",
    [
        ("dies", "killed by signal 11; its log ends: stand-in starts | stand-in warns | Segmentation fault"),
        ("refuses", "ValueError: no kernel for this scheme"),
        ("hangs", "not done within timeoutSeconds 5"),
    ],
)
def test_an_engine_that_fails_says_how(how: str, why: str, tmp_path: Path) -> None:
    with started(how, tmp_path, limit=5.0) as engine, pytest.raises(EngineFailed) as caught:
        engine.ask("serving", prompts=[[1]], generate=2)
    assert why in str(caught.value) and "\n" not in str(caught.value)
    assert gone(engine)


def test_told_to_stop_the_engine_goes_with_all_that_it_has_started(tmp_path: Path) -> None:
    stop = threading.Event()
    with started("hangs", tmp_path, stop=stop) as engine, pytest.raises(Terminated):
        threading.Timer(0.5, stop.set).start()
        engine.ask("serving", prompts=[[1]], generate=2)
    assert gone(engine)


def started(how: str, folder: Path, limit: float = 60.0, stop: threading.Event | None = None) -> EngineProcess:
    """An engine that has loaded its model."""
    vllm, environ = ENGINES["vllm"], stand_in(folder / "engine", how)
    installed = Installed(vllm, Path(environ[vllm.variable]))
    engine = EngineProcess(installed, "original", folder, {**os.environ, **environ}, stop or threading.Event(), time.monotonic() + limit)
    engine.ask("loading", model=str(trained_model("llama")))
    return engine


def gone(engine: EngineProcess) -> bool:
    """Whether nothing of its process group runs any more. What it has started is killed with it, and ends when the kernel comes to it."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if not any(state != "Z" and group == engine._process.pid for state, group in processes()):
            return True
        time.sleep(0.05)
    return False


def processes() -> Iterator[tuple[str, int]]:
    """The state and the process group of each."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _, group, *_ = path.read_text().rpartition(")")[2].split()
            yield state, int(group)
