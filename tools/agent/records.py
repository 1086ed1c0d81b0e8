"""What a pod's worker knows of one container. The worker's thread alone changes it; probes report through the worker."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent import trees
from agent.probes import Prober
from agent.runs import Run

Object = dict[str, Any]


@dataclass
class Stopping:
    """A stop under way: SIGKILL follows at `deadline`."""

    deadline: float
    killed: bool = False


@dataclass
class Container:
    """`run` is the latest attempt, `previous` the one before. `waiting` is (reason, message) while it is not running."""

    spec: Object
    init: bool
    folder: Path
    run: Run | None = None
    previous: Run | None = None
    waiting: tuple[str, str] | None = None
    retry_at: float = 0.0
    tries: int = 0
    """failed pulls in a row"""
    forgiven: int = 0
    """attempts before the last long run, which the back-off no longer counts"""
    started: bool = False
    ready: bool = False
    stopping: Stopping | None = None
    probers: list[Prober] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.spec["name"])

    @property
    def sidecar(self) -> bool:
        return self.init and self.spec.get("restartPolicy") == "Always"

    @property
    def running(self) -> bool:
        return self.run is not None and self.run.running

    @property
    def restarts(self) -> int:
        return self.run.attempt if self.run else 0

    def begin(self, run: Run) -> None:
        """A new attempt takes the place of the last."""
        self.previous, self.run = self.run, run
        self.waiting, self.stopping, self.tries, self.retry_at = None, None, 0, 0.0
        self.started = run.running and "startupProbe" not in self.spec
        self.ready = self.started and "readinessProbe" not in self.spec

    def end(self) -> None:
        """The attempt is over."""
        self.ready = self.started = False
        self.stopping = None
        for prober in self.probers:
            prober.stop()
        self.probers = []

    def next_folder(self) -> Path:
        """A fresh folder for the next attempt; what a failed preparation has left in it goes."""
        folder = self.folder / str(self.run.attempt + 1 if self.run else 0)
        if folder.exists():
            trees.remove(folder)
        folder.mkdir(parents=True)
        return folder


def containers_of(pod: Object, folder: Path) -> list[Container]:
    """Init containers first; attempts that earlier agents left in `folder` are taken up."""
    spec = pod["spec"]
    made = [Container(item, True, folder / item["name"]) for item in spec.get("initContainers") or []]
    made += [Container(item, False, folder / item["name"]) for item in spec["containers"]]
    for container in made:
        attempts = sorted(int(entry.name) for entry in container.folder.glob("*") if entry.name.isdigit())
        if attempts:
            container.begin(Run.adopt(container.folder / str(attempts[-1])))
        if len(attempts) > 1:
            container.previous = Run.adopt(container.folder / str(attempts[-2]))
    return made
