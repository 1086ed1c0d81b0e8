"""The training processes of a pod: started, heard, and ended together.

A process is told its place by torch's usual environment (RANK, WORLD_SIZE ...), and says how it goes in lines of JSON on a pipe: each step,
and with which error it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from kompressor_api.names import ExitCode, Reason
from kompressor_worker.distil.lesson import Group, TrainingStep
from kompressor_worker.errors import KompressorError, OutOfMemory, PeerLost, Terminated

ENV_SAYS = "KOMPRESSOR_TRAINING_SAYS"
"""The number of the pipe."""
POLL = 0.1
GRACE = 15.0
"""Seconds that the others get once one has ended: they see it, and say so."""
STOPPING = 600.0
"""Seconds for a checkpoint once they are told to stop; the pod's own limit is usually shorter."""
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Ranks:
    """Of this pod's processes."""

    first: int
    count: int
    size: int
    """Of all pods."""
    leader: str
    port: int

    def environ(self, number: int) -> dict[str, str]:
        return {
            "RANK": str(self.first + number),
            "LOCAL_RANK": str(number),
            "LOCAL_WORLD_SIZE": str(self.count),
            "WORLD_SIZE": str(self.size),
            "MASTER_ADDR": self.leader,
            "MASTER_PORT": str(self.port),
        }


@dataclass
class Child:
    process: subprocess.Popen[bytes]
    error: dict[str, Any] = field(default_factory=dict)
    """What it said when it ended."""


def launch(
    command: Sequence[str], ranks: Ranks, tell: Callable[[TrainingStep], None], stop: threading.Event, alive: Callable[[], None]
) -> None:
    """Runs the processes until all have ended well. `alive` is called in between, and may raise. Raises the error of the one that ended of
    its own, PeerLost where none did, Terminated."""
    said: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
    children = [started(command, ranks.environ(number), number, said) for number in range(ranks.count)]
    told = ended = 0.0
    try:
        while True:
            hear(said, children, tell)
            codes = [child.process.poll() for child in children]
            if all(code == 0 for code in codes):
                return
            now = time.monotonic()
            if any(codes):
                ended = ended or now
                if None not in codes or now - ended > GRACE:
                    break
            else:
                alive()
            if stop.is_set() and not told:
                told = now
                for child in children:
                    child.process.send_signal(signal.SIGTERM)
            if told and now - told > STOPPING:
                raise Terminated("told to stop; the training processes took too long over it, and are ended")
            time.sleep(POLL)
        time.sleep(POLL)  # the last words
        hear(said, children, tell)
        raise error_of(children)
    finally:
        for child in children:
            if child.process.poll() is None:
                child.process.kill()
            child.process.wait()


def started(command: Sequence[str], environ: Mapping[str, str], number: int, said: queue.SimpleQueue[tuple[int, dict[str, Any]]]) -> Child:
    reading, writing = os.pipe()
    process = subprocess.Popen(list(command), env={**os.environ, **environ, ENV_SAYS: str(writing)}, pass_fds=(writing,))
    os.close(writing)

    def listen() -> None:
        with os.fdopen(reading) as lines:
            for line in lines:
                with contextlib.suppress(ValueError):  # cut off with its process
                    said.put((number, json.loads(line)))

    threading.Thread(target=listen, daemon=True).start()
    return Child(process)


def hear(said: queue.SimpleQueue[tuple[int, dict[str, Any]]], children: Sequence[Child], tell: Callable[[TrainingStep], None]) -> None:
    while not said.empty():
        number, word = said.get()
        if "step" in word:
            tell(TrainingStep.of(word["step"]))
        if "error" in word:
            children[number].error = word["error"]


def error_of(children: Sequence[Child]) -> Exception:
    """Of those that have ended, the one that did so of its own: others have only lost it."""
    ends = [(child.process.poll(), child.error) for child in children]
    mine = [(code, error) for code, error in ends if code not in (None, 0, ExitCode.PEER_LOST, ExitCode.TERMINATED)]
    if not mine:
        if any(code == ExitCode.TERMINATED for code, _ in ends):
            return Terminated("told to stop; the training is committed")
        return PeerLost("another process of the group went away; all go on from the last checkpoint")
    code, error = next(((code, error) for code, error in mine if error), mine[0])
    if error:
        made = KompressorError(error["message"])
        made.exit_code, made.reason = ExitCode(error["exitCode"]), Reason(error["reason"])
        return made
    if code == -signal.SIGKILL:
        return OutOfMemory("a training process was killed, by the system for want of memory if by nobody else; give the pod more")
    return RuntimeError(f"a training process ended with {code} and said nothing; its log has more")


# ---- in a training process


class Member:
    """A training process, as it is told by its environment. Use it in `with`; `stop` is set once it is to stop."""

    def __init__(self) -> None:
        self.group = Group(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        self.stop = threading.Event()
        self._says = int(os.environ[ENV_SAYS])

    def __enter__(self) -> Member:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing trains for a pod that is gone
        signal.signal(signal.SIGTERM, lambda *_: self.stop.set())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, KompressorError):
            self.say(error={"message": str(error), "reason": error.reason, "exitCode": int(error.exit_code)})

    @contextlib.contextmanager
    def joined(self) -> Iterator[Group]:
        """Together with the others. Raises PeerLost where one of them goes away."""
        if self.group.size == 1:
            yield self.group
            return
        import torch
        import torch.distributed as dist

        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            yield self.group
        except RuntimeError as error:
            if not of_a_peer(error):
                raise
            raise PeerLost(f"another process of the group went away ({str(error).splitlines()[0][:200]})") from error
        dist.destroy_process_group()

    def tell(self, step: TrainingStep) -> None:
        self.say(step=step.as_json())

    def say(self, **words: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._says, f"{json.dumps(words)}\n".encode())


def of_a_peer(error: RuntimeError) -> bool:
    """Whether it says that a connection to another process is gone, in the words of torch.distributed, gloo or NCCL."""
    from torch.distributed import DistError

    said = str(error).lower()
    return isinstance(error, DistError) or any(word in said for word in ("gloo", "nccl", "connection closed", "connection reset"))
