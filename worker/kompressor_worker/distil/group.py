"""Pods that train together: how they meet, when training begins, and how all end when one of them goes away.

Pod 0 leads. From its first moment it keeps a small store (torch's TCPStore), where the others register, each start of a pod with a name of
its own, and give a sign of life every now and then. Once all are there the leader says so, naming them; each pod then starts its training
processes, which find each other through torch.distributed. There is one beginning in a leader's life: whoever finds that the others have
begun without it, or that one of them is gone, ends with PEER_LOST; all pods are started again, and training goes on from its last
checkpoint. Where pods stay away, one of those that are there ends with GROUP_INCOMPLETE, which counts as a failure, and the others with
PEER_LOST: the leader, or without it the first that sees no other before itself.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

from kompressor_api.names import (
    ENV_GROUP_PATIENCE,
    ENV_LEADER,
    ENV_POD_INDEX,
    ENV_PODS,
    ENV_PORT,
    ENV_PROCESSES_PER_POD,
    GROUP_PATIENCE_SECONDS,
    GROUP_PORT,
)
from kompressor_worker.distil.launching import Ranks, launch
from kompressor_worker.distil.lesson import TrainingStep
from kompressor_worker.errors import GroupIncomplete, PeerLost, Terminated

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

POLL = 0.5
"""Seconds between two looks at the store."""
SIGN_EVERY = 2.0
SILENT = 60.0
"""Seconds without a sign of life after which a pod is lost. One that ends is seen at once, by the connections of its processes."""
ASK_EVERY = 15.0
"""Seconds between two looks at storage while there is no leader."""
ANSWER = timedelta(seconds=30)
"""How long the store may take to answer."""
BEGIN, OVER = "begin", "over"


@dataclass(frozen=True)
class GroupSettings:
    """Which pod this is, and of how many."""

    pods: int = 1
    processes: int = 1
    """Of each pod."""
    index: int = 0
    leader: str = "localhost"
    port: int = GROUP_PORT
    patience: float = GROUP_PATIENCE_SECONDS

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> GroupSettings:
        return cls(
            int(environ.get(ENV_PODS) or 1),
            int(environ.get(ENV_PROCESSES_PER_POD) or 1),
            int(environ.get(ENV_POD_INDEX) or 0),
            environ.get(ENV_LEADER) or "localhost",
            int(environ.get(ENV_PORT) or GROUP_PORT),
            float(environ.get(ENV_GROUP_PATIENCE) or GROUP_PATIENCE_SECONDS),
        )

    @property
    def size(self) -> int:
        """Training processes in all."""
        return self.pods * self.processes

    @property
    def leads(self) -> bool:
        return self.index == 0

    def host(self, index: int) -> str:
        """Name of another pod, as the leader's is told; empty where that has no index in it."""
        pod, _, service = self.leader.partition(".")
        stem = pod.removesuffix("-0")
        return f"{stem}-{index}.{service}" if service and stem != pod else ""

    def ranks(self, port: int) -> Ranks:
        return Ranks(self.index * self.processes, self.processes, self.size, self.leader, port)


class Gathering:
    """The leader's side. Open it as soon as the pod starts: the others wait for it."""

    def __init__(self, settings: GroupSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._store: TCPStore | None = None
        self._seen: dict[int, tuple[str, float]] = {}
        """By pod: its last sign of life, and when that was new."""

    def __enter__(self) -> Gathering:
        if self._settings.pods > 1:
            self._store = opened(self._settings)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._store = None

    def train(self, command: Sequence[str], tell: Callable[[TrainingStep], None], stop: threading.Event) -> None:
        """Runs the training processes of this pod beside those of the others, each a `command` (launching.py), until all is over. Raises
        what they do, GroupIncomplete, PeerLost, Terminated."""
        names = self._all_there(stop)
        port = free_port(self._settings.leader)
        if self._store is not None:
            self._store.set(BEGIN, json.dumps({"port": port, "pods": names}))
        launch(command, self._settings.ranks(port), tell, stop, self._alive)
        self.over()

    def over(self) -> None:
        """There is nothing to train any more; a pod that comes now may end."""
        if self._store is not None:
            self._store.set(OVER, "")

    def _all_there(self, stop: threading.Event) -> dict[str, str]:
        """The names under which the other pods are registered, by index."""
        began = self._clock()
        while True:
            self._look()
            now = self._clock()
            names = {str(pod): sign.partition(" ")[0] for pod, (sign, at) in self._seen.items() if now - at < SILENT}
            if len(names) == self._settings.pods - 1:
                return names
            if stop.is_set():
                raise Terminated("told to stop while it waited for the other pods")
            if now - began > self._settings.patience:
                missing = [str(pod) for pod in range(1, self._settings.pods) if str(pod) not in names]
                raise GroupIncomplete(
                    f"pods {', '.join(missing)} of {self._settings.pods} did not come within {self._settings.patience:g} s; see why they "
                    "do not start, or set a smaller worker.parallelism"
                )
            time.sleep(POLL)

    def _look(self) -> None:
        if self._store is None:
            return
        for pod in range(1, self._settings.pods):
            if self._store.check([f"pod/{pod}"]):
                sign = self._store.get(f"pod/{pod}").decode()
                if self._seen.get(pod, ("", 0.0))[0] != sign:
                    self._seen[pod] = sign, self._clock()

    def _alive(self) -> None:
        """Raises PeerLost where a pod has been silent, or another has come in its place."""
        before = {pod: sign.partition(" ")[0] for pod, (sign, _) in self._seen.items()}
        self._look()
        for pod, (sign, at) in self._seen.items():
            if sign.partition(" ")[0] != before[pod] or self._clock() - at > SILENT:
                raise PeerLost(f"pod {pod} of the group went away; all go on from the last checkpoint")


def follow(settings: GroupSettings, command: Sequence[str], stop: threading.Event, over: Callable[[], bool]) -> None:
    """What all other pods do: they wait for the leader, train beside it, and are done with that. `over` tells whether what is to be trained
    has been, and the leader may be gone for good. Raises what `Gathering.train` does."""
    store = met(settings, stop, over)
    if store is None:
        return
    name, signs = uuid.uuid4().hex, 0

    def sign() -> None:
        nonlocal signs
        signs += 1
        store.set(f"pod/{settings.index}", f"{name} {signs}")

    last = time.monotonic()

    def alive() -> None:
        nonlocal last
        if time.monotonic() - last >= SIGN_EVERY:
            last = time.monotonic()
            with leader_answers():
                sign()

    with leader_answers():
        sign()
        while not store.check([BEGIN]):
            if store.check([OVER]):
                return
            if stop.is_set():
                raise Terminated("told to stop while it waited for training to begin")
            time.sleep(POLL)
            alive()
        begun = json.loads(store.get(BEGIN))
        if store.check([OVER]):
            return
    if begun["pods"].get(str(settings.index)) != name:
        raise PeerLost("the others have begun without this pod; all start again")
    launch(command, settings.ranks(begun["port"]), lambda step: None, stop, alive)


@contextlib.contextmanager
def leader_answers() -> Iterator[None]:
    """Raises PeerLost where it does not."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed's own are of this kind
        raise PeerLost(f"the leader of the group went away ({str(error).splitlines()[0]}); all go on from the last checkpoint") from error


def opened(settings: GroupSettings) -> TCPStore:
    """The leader's store."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((socket.gethostbyname(settings.leader), settings.port))
    except OSError:  # its own name is not known yet
        listening.bind(("", settings.port))
    host = listening.getsockname()[0]
    listening.listen(128)
    return TCPStore(
        "127.0.0.1" if host == "0.0.0.0" else host,
        settings.port,
        is_master=True,
        wait_for_workers=False,
        timeout=ANSWER,
        master_listen_fd=listening.detach(),
    )


def known(host: str) -> bool:
    """Whether there is a pod of this name: it has one from its start to its end."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return bool(host)


def met(settings: GroupSettings, stop: threading.Event, over: Callable[[], bool], known: Callable[[str], bool] = known) -> TCPStore | None:
    """The leader's store, once there is one; None: all is over. Raises GroupIncomplete, PeerLost where another pod says so for all,
    Terminated."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    ask = time.monotonic()
    deadline, first = ask + settings.patience, True
    while True:
        with contextlib.suppress(OSError):
            socket.create_connection((settings.leader, settings.port), timeout=5).close()
            with contextlib.suppress(RuntimeError):
                return TCPStore(settings.leader, settings.port, is_master=False, wait_for_workers=False, timeout=ANSWER)
        if stop.is_set():
            raise Terminated("told to stop while it waited for the leader of the group")
        if (now := time.monotonic()) >= ask:
            if over():
                return None
            first = first and not any(known(settings.host(index)) for index in range(1, settings.index))
            ask = now + ASK_EVERY
        if time.monotonic() > deadline:
            if not first:
                raise PeerLost(
                    f"no leader at {settings.leader}:{settings.port} within {settings.patience:g} s; another pod says so for all"
                )
            raise GroupIncomplete(
                f"no leader at {settings.leader}:{settings.port} within {settings.patience:g} s; see why pod 0 does not start, and whether "
                "a NetworkPolicy keeps the pods apart"
            )
        time.sleep(POLL)


def free_port(host: str) -> int:
    """Where the training processes meet."""
    with socket.socket() as found:
        try:
            found.bind((socket.gethostbyname(host), 0))
        except OSError:
            found.bind(("", 0))
        return int(found.getsockname()[1])
