"""An inference engine as a process of its own: asked by lines of JSON, killed when it is over, when its time is up, and with the worker."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from kompressor_api.names import Role
from kompressor_worker.errors import EngineFailed, Terminated
from kompressor_worker.runtime import Installed

POLL_SECONDS = 0.2
"""Between two looks at whether the worker is told to stop."""
LAST_SECONDS = 5.0
"""From when it closes its end until its process is gone."""
TAIL_BYTES = 1500
"""Of its log, in an error."""
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
"""It has all that it needs in a folder, and tells nobody about it."""
SECRETS = tuple(role.env_prefix for role in Role)
"""Of variables that hold credentials, beside those of the SDKs."""


class EngineProcess:
    """Use as a context manager. `deadline`: of the monotonic clock, for all that is asked. `folder`: for its log."""

    def __init__(
        self, installed: Installed, name: str, folder: Path, environ: Mapping[str, str], stop: threading.Event, deadline: float
    ) -> None:
        self._engine, self._name = installed.engine.name, name
        self._stop, self._deadline, self._limit = stop, deadline, deadline - time.monotonic()
        self._log = folder / f"{name}.log"
        asked, self._commands = os.pipe()
        self._answers, answered = os.pipe()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(installed.python), "-I", str(installed.driver), str(asked), str(answered)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(asked, answered),
                env=environment(environ),
                cwd=folder,
                start_new_session=True,
            )
        os.close(asked)
        os.close(answered)
        self._heard = b""

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def kill(self) -> None:
        """It and all that it has started. Once more is fine."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            os.close(self._commands)
            os.close(self._answers)

    def ask(self, doing: str, **command: Any) -> dict[str, Any]:
        """Its answer. Raises EngineFailed (`doing`: what, for its words), Terminated."""
        try:
            os.write(self._commands, json.dumps(command).encode() + b"\n")
        except BrokenPipeError:
            raise self._failed(doing, self._ended()) from None
        answer: dict[str, Any] = json.loads(self._line(doing))
        if "error" in answer:
            raise self._failed(doing, str(answer["error"]))
        return answer

    def _line(self, doing: str) -> bytes:
        while b"\n" not in self._heard:
            if self._stop.is_set():
                raise Terminated("told to stop while the result was measured; what was finished is committed, and it is measured anew")
            if time.monotonic() > self._deadline:
                raise self._failed(doing, f"not done within timeoutSeconds {self._limit:.0f}")
            if select.select([self._answers], [], [], POLL_SECONDS)[0]:
                piece = os.read(self._answers, 1 << 16)
                if not piece:
                    raise self._failed(doing, self._ended())
                self._heard += piece
        line, _, self._heard = self._heard.partition(b"\n")
        return line

    def _ended(self) -> str:
        """How, without reaping it: its number stays its group's until `kill`."""
        until = time.monotonic() + LAST_SECONDS
        while time.monotonic() < until:
            found = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if found is not None:
                how = "ended with exit code" if found.si_code == os.CLD_EXITED else "was killed by signal"
                return f"its process {how} {found.si_status}"
            time.sleep(0.02)
        return "it answers no more"

    def _failed(self, doing: str, why: str) -> EngineFailed:
        said = self._log.read_bytes()[-TAIL_BYTES:].decode(errors="replace")
        tail = " | ".join(line.strip() for line in said.splitlines()[-12:] if line.strip())
        ends = f"; its log ends: {tail}" if tail else ""
        return EngineFailed(f"evaluation.runtime: {self._engine}, {doing} the {self._name}: {why}{ends}")


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The worker's own without credentials, and without what would lead another Python to the worker's libraries."""
    kept = {
        name: value
        for name, value in environ.items()
        if not name.startswith((*SECRETS, "AWS_", "PYTHON")) and name not in ("HF_TOKEN", "VIRTUAL_ENV")
    }
    return kept | QUIET
