"""One process a container: starts it, keeps its log, enforces its memory limit, writes down how it ended.

    python -S -s -m agent.shim FOLDER        (FOLDER holds spec.json; the first line on stdout says how the start went)

It stands between agent and container so that an agent can die and come back without losing either. SIGTERM is passed
on to the container; SIGUSR1 kills it.
"""

import contextlib
import json
import os
import select
import signal
import sys
import time
from pathlib import Path

from agent import kernel, memory, sandbox
from agent.contract import ProcessSpec, RunState, process_start

_LONGEST_LINE = 16 * 1024  # a longer one is cut into parts, as container runtimes do
_START_ERROR = 128


class LogFile:
    """The runtimes' log format: time, stream, P(artial) or F(ull), text."""

    def __init__(self, file: Path) -> None:
        self._file = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._rest = {"stdout": b"", "stderr": b""}

    def feed(self, stream: str, data: bytes) -> None:
        *lines, rest = (self._rest[stream] + data).split(b"\n")
        while len(rest) >= _LONGEST_LINE:
            lines.append(rest[:_LONGEST_LINE])
            rest = rest[_LONGEST_LINE:]
            self._write(stream, lines, partial_end=True)
            lines = []
        self._write(stream, lines)
        self._rest[stream] = rest

    def close(self) -> None:
        for stream, rest in self._rest.items():
            if rest:
                self._write(stream, [rest])
        os.close(self._file)

    def _write(self, stream: str, lines: list[bytes], partial_end: bool = False) -> None:
        if not lines:
            return
        second, nano = divmod(time.time_ns(), 1_000_000_000)
        head = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(second))}.{nano:09d}Z {stream}".encode()
        tags = [b"F"] * (len(lines) - 1) + [b"P" if partial_end else b"F"]
        os.write(self._file, b"".join(b"%s %s %s\n" % (head, tag, line) for tag, line in zip(tags, lines, strict=True)))


def main(folder: Path) -> None:
    """Runs the container of `folder` to its end."""
    spec = ProcessSpec.read(folder)
    state = RunState(shim=os.getpid(), shim_started=process_start(os.getpid()), started_at=time.time())
    pipes = {"stdout": os.pipe(), "stderr": os.pipe()}
    try:
        pid = _start(spec, folder, pipes)
    except OSError as error:
        failed = _finished(state, _START_ERROR, "StartError", f"{_RUNTIME}{error}")
        failed.write(folder)
        _answer(failed)
        return
    state = RunState(**{**vars(state), "pid": pid})
    for number, forwarded in ((signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1, signal.SIGKILL)):
        signal.signal(number, lambda *_, code=forwarded: _signal(pid, code))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    state.write(folder)
    _answer(state)
    log = LogFile(folder / "log")
    over_limit = _follow(spec, pid, {pipe[0]: stream for stream, pipe in pipes.items()}, log)
    status = os.waitpid(pid, 0)[1]
    log.close()
    code = os.waitstatus_to_exitcode(status)
    code = 128 - code if code < 0 else code
    over_limit = over_limit or (spec.memory.folder != "" and memory.exceeded(spec.memory, pid))
    reason = "OOMKilled" if over_limit and code else "Error" if code else "Completed"
    _finished(state, code, reason, "").write(folder)
    memory.remove(spec.memory)


_RUNTIME = "failed to create task: unable to start container process: error during container init: "


def _start(spec: ProcessSpec, folder: Path, pipes: dict[str, tuple[int, int]]) -> int:
    """The pid of the running command, in this machine's numbering; OSError if it could not be started."""
    flags = kernel.CLONE_NEWPID
    if spec.user_namespace:
        outside = os.getuid(), os.getgid()
        kernel.unshare(kernel.CLONE_NEWUSER | flags)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{spec.uid} {outside[0]} 1")
        Path("/proc/self/gid_map").write_text(f"{spec.gid} {outside[1]} 1")
    else:
        kernel.unshare(flags)
    failure_read, failure_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
            empty = os.open("/dev/null", os.O_RDONLY)
            sandbox.become(spec, folder, (empty, pipes["stdout"][1], pipes["stderr"][1]))
        except (OSError, sandbox.CommandError) as error:
            os.write(failure_write, str(error).encode())
        except BaseException as error:
            os.write(failure_write, repr(error).encode())
        finally:
            os._exit(_START_ERROR)
    for descriptor in (failure_write, pipes["stdout"][1], pipes["stderr"][1]):
        os.close(descriptor)
    with os.fdopen(failure_read, "rb") as reader:
        failure = reader.read().decode(errors="replace")
    if failure:
        os.waitpid(pid, 0)
        raise OSError(failure)
    return pid


def _follow(spec: ProcessSpec, pid: int, streams: dict[int, str], log: LogFile) -> bool:
    """Until the container has ended and its output is read. True if it went over its memory limit."""
    poller = select.poll()
    for descriptor in streams:
        poller.register(descriptor, select.POLLIN)
    process = os.pidfd_open(pid)
    poller.register(process, select.POLLIN)
    if spec.leashed:
        poller.register(0, 0)  # hang-ups are reported unasked: the agent at the other end is gone
    tick = {"none": None, memory.POLLING: 100}.get(spec.memory.kind, 500)
    over_limit = ended = False
    while streams or not ended:
        events = poller.poll(tick if not ended else 2000)
        if ended and not events:
            break  # someone outside the container holds its output open
        for descriptor, _ in events:
            if descriptor in streams:
                data = os.read(descriptor, 65536)
                if data:
                    log.feed(streams[descriptor], data)
                else:
                    poller.unregister(descriptor)
                    del streams[descriptor]
            elif descriptor == process:
                ended = True
                poller.unregister(process)
            else:
                poller.unregister(descriptor)
                _signal(pid, signal.SIGKILL)
        if not ended and not over_limit and tick is not None and memory.exceeded(spec.memory, pid):
            over_limit = True
            _signal(pid, signal.SIGKILL)
    return over_limit


def _finished(state: RunState, code: int, reason: str, message: str) -> RunState:
    told = {"exit_code": code, "reason": reason, "message": message, "finished_at": time.time()}
    return RunState(**{**vars(state), **told})


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _answer(state: RunState) -> None:
    """One line to the agent, if it is still there; then the pipe is let go."""
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps(vars(state)).encode() + b"\n")
    quiet = os.open("/dev/null", os.O_WRONLY)
    os.dup2(quiet, 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
