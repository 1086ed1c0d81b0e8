"""The agent's side of a container's runs. All that is known stands in folders, so a restarted agent knows it too.

<pod>/containers/<name>/<attempt>/{spec.json, state.json, log, termination-log, layers/, rootfs/}
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from agent import memory, trees
from agent.contract import LOST, ProcessSpec, RunState, process_start

TOOLS = Path(__file__).parent.parent
_MESSAGE_BYTES, _LOG_MESSAGE_BYTES, _LOG_MESSAGE_LINES = 4096, 2048, 80


class Run:
    """One attempt of one container. `pidfd` becomes readable when its shim is gone; -1 where it already is."""

    def __init__(self, folder: Path, state: RunState, pidfd: int) -> None:
        self.folder = folder
        self.attempt = int(folder.name)
        self.state = state
        self.pidfd = pidfd

    @classmethod
    def start(cls, folder: Path, spec: ProcessSpec, leash: int) -> "Run":
        """Starts the shim and waits until the command runs, or could not be started (exit code 128, StartError).

        `leash` is the reading end of a pipe whose other end the agent holds; used where `spec.leashed`.
        """
        spec.write(folder)
        with (folder / "shim.log").open("wb") as complaints:
            shim = subprocess.Popen(
                [sys.executable, "-S", "-s", "-m", "agent.shim", str(folder)],
                cwd=TOOLS, stdin=leash if spec.leashed else subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=complaints, env={"PATH": os.defpath}, start_new_session=True,
            )  # fmt: skip
        pidfd = os.pidfd_open(shim.pid)
        assert shim.stdout is not None
        with shim.stdout:
            answer = shim.stdout.readline()
        # The answer, not the file: a short command may have ended by now, and its end is to be observed like any other.
        run = cls(folder, RunState(**json.loads(answer)) if answer else RunState(), pidfd)
        run._shim = shim  # reaped in observe()
        if not answer:
            run.write_failure(f"the container's shim ended before the start: {(folder / 'shim.log').read_text()[-1000:]}")
        elif not run.running:
            run.release()
        return run

    @classmethod
    def failed(cls, folder: Path, message: str) -> "Run":
        """A run that never came to be."""
        run = cls(folder, RunState(), -1)
        run.write_failure(message)
        return run

    @classmethod
    def adopt(cls, folder: Path) -> "Run":
        """A run that an earlier agent started: still going, ended, or lost with its shim."""
        state = RunState.read(folder) or RunState()
        run = cls(folder, state, -1)
        if state.exit_code is None:
            with contextlib.suppress(OSError):
                pidfd = os.pidfd_open(state.shim)
                # Looked at after the descriptor is open: from here on the pid cannot come to mean another process.
                if state.shim and process_start(state.shim) == state.shim_started:
                    run.pidfd = pidfd
                else:
                    os.close(pidfd)
            run.observe()
        return run

    _shim: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self.state.exit_code is None

    def observe(self) -> None:
        """Reads how the run ended, once its shim is gone."""
        if not self.running:
            return
        if self.pidfd >= 0 and not _ended(self.pidfd):
            return
        self.state = RunState.read(self.folder) or self.state
        if self.state.exit_code is None:
            self._finish(LOST)
        self.release()

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGUSR1)

    def write_failure(self, message: str) -> None:
        self._finish(RunState(exit_code=128, reason="StartError", message=message))
        self.release()

    def release(self) -> None:
        """Lets go of what only a running container needs; log and outcome stay."""
        if self._shim is not None:
            self._shim.wait()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        with contextlib.suppress(FileNotFoundError):
            memory.remove(ProcessSpec.read(self.folder).memory)
        for name in ("layers", "rootfs"):
            trees.remove(self.folder / name)

    def termination_message(self, fall_back_to_log: bool) -> str:
        """The end of what the container wrote to its termination message file, else, after a failure, of its log."""
        if self.state.message:
            return self.state.message
        file = self.folder / "termination-log"
        text = _tail(file, _MESSAGE_BYTES)
        if not text and fall_back_to_log and self.state.exit_code:
            lines = _tail(self.folder / "log", 4 * _LOG_MESSAGE_BYTES).splitlines()[-_LOG_MESSAGE_LINES:]
            spoken = "".join(line.split(" ", 3)[3] + "\n" for line in lines if line.count(" ") >= 3)
            text = spoken.encode()[-_LOG_MESSAGE_BYTES:].decode(errors="replace")
        return text

    def _finish(self, how: RunState) -> None:
        told = {"exit_code": how.exit_code, "reason": how.reason, "message": how.message, "finished_at": time.time()}
        self.state = RunState(**{**vars(self.state), **told})
        self.state.write(self.folder)

    def _signal(self, number: int) -> None:
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)


def _ended(pidfd: int) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


def _tail(file: Path, size: int) -> str:
    try:
        with file.open("rb") as reader:
            reader.seek(0, os.SEEK_END)
            reader.seek(max(0, reader.tell() - size))
            return reader.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
