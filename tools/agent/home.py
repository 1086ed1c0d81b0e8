"""A pod's place on this machine: its folder, its address, its devices. What is written there outlives the agent.

<root>/pods/<uid>/{pod.json, volumes/, containers/}
"""

import json
import time
from pathlib import Path

from agent import trees
from agent.client import Object
from agent.clock import epoch
from agent.context import Context
from agent.contract import RunState
from agent.quantity import parse
from agent.records import Container, containers_of
from agent.runs import Run

_GPU = "nvidia.com/gpu"


class Home:
    """Made new, or found as an earlier agent left it. `refusal` says why the pod cannot run here at all."""

    def __init__(self, context: Context, meta: Object, folder: Path, containers: list[Container]) -> None:
        self._context = context
        self._uid = meta["uid"]
        self._names = {name: meta[name] for name in ("name", "namespace")}
        self.folder = folder
        self.volumes = folder / "volumes"
        self.containers = containers
        self.places = {entry.name: entry for entry in self.volumes.glob("*")}
        self.ip = ""
        self.gpus: list[str] = []
        self.started_at = time.time()
        self.refusal: str | None = None

    @classmethod
    def of(cls, context: Context, pod: Object) -> "Home":
        uid = pod["metadata"]["uid"]
        folder = context.root / "pods" / uid
        known = folder / "pod.json"
        if not known.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _restore_lost(pod, folder)
        home = cls(context, pod["metadata"], folder, containers_of(pod, folder / "containers"))
        over = pod.get("status", {}).get("phase") in ("Succeeded", "Failed")
        if known.exists():
            kept = json.loads(known.read_text())
            home.ip, home.gpus, home.started_at = kept["ip"], [] if over else kept["gpus"], kept["startedAt"]
            context.addresses.claim(uid, [home.ip])
            if context.gpus is not None:
                context.gpus.claim(uid, home.gpus)
        elif over:
            home.ip = pod["status"].get("podIP", "")
        else:
            home._move_in(pod)
            if home.refusal is None:
                home._remember()
        return home

    def release(self) -> None:
        """A pod that is over holds no devices and no volumes; its logs stay until it is deleted."""
        if self.gpus:
            self.gpus = []
            self._remember()  # first, or an agent that starts again claims what another pod has by then
        self._give_back()

    def _give_back(self) -> None:
        if self._context.gpus is not None:
            self._context.gpus.take_back(self._uid)
        trees.remove(self.volumes)

    def remove(self) -> None:
        self._give_back()
        self._context.addresses.take_back(self._uid)
        trees.remove(self.folder)

    def drop_old_runs(self, container: Container) -> None:
        """The last two attempts are kept: `kubectl logs --previous` asks for no more."""
        assert container.run is not None
        for entry in container.folder.iterdir():
            if entry.name.isdigit() and int(entry.name) < container.run.attempt - 1:
                trees.remove(entry)

    def _remember(self) -> None:
        """At once: a reader sees the old text or the new one."""
        new = self.folder / "pod.json.new"
        new.write_text(json.dumps({**self._names, "ip": self.ip, "gpus": self.gpus, "startedAt": self.started_at}))
        new.replace(self.folder / "pod.json")

    def _move_in(self, pod: Object) -> None:
        lent = self._context.addresses.lend(self._uid, 1)
        started = pod.get("status", {}).get("startTime")
        self.started_at = epoch(started) if started else time.time()
        if lent is None:
            self.refusal = "Allocate failed due to no free pod address on this node"
            return
        self.ip = lent[0]
        wanted = _gpus(pod)
        stock = self._context.gpus
        gpus = stock.lend(self._uid, wanted) if stock else [] if not wanted else None
        if gpus is None:
            free = stock.free if stock else 0
            self.refusal = (
                f"Allocate failed due to requested number of devices unavailable for {_GPU}. "
                f"Requested: {wanted}, Available: {free}, which is unexpected"
            )
        self.gpus = gpus or []


def _gpus(pod: Object) -> int:
    limits = ((container.get("resources") or {}).get("limits") or {} for container in pod["spec"]["containers"])
    return sum(int(parse(each.get(_GPU, 0))) for each in limits)


def _restore_lost(pod: Object, folder: Path) -> None:
    """Containers that the API server has seen running here and that this machine knows nothing of: they are lost."""
    status = pod.get("status", {})
    for seen in (status.get("initContainerStatuses") or []) + (status.get("containerStatuses") or []):
        if not seen.get("containerID") or status.get("phase") in ("Succeeded", "Failed"):
            continue
        place = folder / "containers" / seen["name"] / str(seen.get("restartCount", 0))
        place.mkdir(parents=True)
        state, ended = seen.get("state", {}), seen.get("state", {}).get("terminated")
        if ended:
            RunState(
                exit_code=ended["exitCode"], reason=ended.get("reason", ""), message=ended.get("message", ""),
                started_at=_moment(ended, "startedAt"), finished_at=_moment(ended, "finishedAt"),
            ).write(place)  # fmt: skip
        else:
            RunState(started_at=_moment(state.get("running", {}), "startedAt")).write(place)


def _moment(state: Object, name: str) -> float:
    return epoch(state[name]) if state.get(name) else time.time()


def stop_strangers(root: Path, known: set[str]) -> None:
    """Pods that an earlier agent ran and that were deleted while no agent was here: their containers end, now."""
    for folder in (root / "pods").glob("*"):
        if folder.name not in known:
            stop_everything(folder, grace=0.0)
            trees.remove(folder)


def stop_everything(folder: Path, grace: float) -> None:
    """Ends every container under `folder`: SIGTERM, and SIGKILL when the grace (seconds) is over."""
    places = [file.parent for file in folder.rglob("spec.json") if file.parent.name.isdigit()]
    runs = [run for run in map(Run.adopt, places) if run.running]
    for run in runs:
        run.terminate()
    deadline = time.monotonic() + grace
    while runs:
        if time.monotonic() >= deadline:
            for run in runs:
                run.kill()
        time.sleep(0.02)
        for run in runs:
            run.observe()
        runs = [run for run in runs if run.running]
