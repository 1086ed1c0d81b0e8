"""Pure: a pod's status from its spec and its containers, in the kubelet's words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agent.clock import timestamp
from agent.contract import LOST, RunState
from agent.records import Container
from agent.runs import Run

Object = dict[str, Any]

TERMINAL = ("Succeeded", "Failed")


@dataclass(frozen=True)
class Ending:
    """Why a pod is over or about to be; `reason` and `message` go to the pod's status if it failed for its own sake."""

    reason: str = ""
    message: str = ""
    failed: bool = False
    refused: bool = False
    """The node never took it in."""


@dataclass(frozen=True)
class Observed:
    """What the status is made from, besides the pod. `over`: nothing runs and nothing will."""

    containers: Sequence[Container]
    host_ip: str
    pod_ip: str
    started_at: float
    volumes_ready: bool
    ending: Ending | None
    over: bool


def pod_status(pod: Object, observed: Observed, now: float) -> Object:
    """The whole status that a kubelet owns; of a pod that it refused it says no more than that."""
    if observed.ending and observed.ending.refused:
        why = f"Pod was rejected: {observed.ending.message}"
        return {"phase": "Failed", "reason": observed.ending.reason, "message": why, "startTime": timestamp(observed.started_at)}
    inits = [container_status(c, observed) for c in observed.containers if c.init]
    apps = [container_status(c, observed) for c in observed.containers if not c.init]
    own = phase(pod, inits, apps, observed)
    status: Object = {
        "phase": own,
        "hostIP": observed.host_ip,
        "hostIPs": [{"ip": observed.host_ip}],
        "podIP": observed.pod_ip,
        "podIPs": [{"ip": observed.pod_ip}],
        "startTime": timestamp(observed.started_at),
        "observedGeneration": pod["metadata"].get("generation"),
        "containerStatuses": apps,
        "conditions": conditions(pod, own, inits, apps, observed, now),
    }
    if inits:
        status["initContainerStatuses"] = inits
    if observed.over and observed.ending and observed.ending.failed:
        status |= {"reason": observed.ending.reason, "message": observed.ending.message}
    return status


def container_status(container: Container, observed: Observed) -> Object:
    """One entry of containerStatuses or initContainerStatuses."""
    run = container.run
    result: Object = {
        "name": container.name,
        "image": container.spec["image"],
        "imageID": f"table://{container.spec['image']}" if run else "",
        "restartCount": container.restarts,
        "ready": container.ready or (container.init and not container.sidecar and _succeeded(run)),
        "started": container.started,
        "lastState": {},
    }
    last: Run | None = container.previous
    if run and run.running:
        result["state"] = {"running": {"startedAt": timestamp(run.state.started_at)}}
    elif container.waiting and not observed.over:
        result["state"], last = _waiting(*container.waiting), run or container.previous
    elif run:
        result["state"] = {"terminated": terminated(container, run)}
    elif observed.over and observed.ending and _initialised(observed):
        result["state"] = {"terminated": _terminated(LOST, LOST.message)}
    else:
        result["state"] = _waiting("ContainerCreating" if container.init or _initialised(observed) else "PodInitializing", "")
    if run:
        result["containerID"] = container_id(run)
    if last and not last.running:
        result["lastState"] = {"terminated": terminated(container, last)}
    return result


def terminated(container: Container, run: Run) -> Object:
    """How a run ended."""
    to_log = container.spec.get("terminationMessagePolicy") == "FallbackToLogsOnError"
    return {**_terminated(run.state, run.termination_message(to_log)), "containerID": container_id(run)}


def container_id(run: Run) -> str:
    pod_uid, name = run.folder.parts[-4], run.folder.parent.name
    return f"process://{pod_uid}/{name}/{run.attempt}"


def phase(pod: Object, inits: list[Object], apps: list[Object], observed: Observed) -> str:
    """The kubelet's getPhase."""
    policy = pod["spec"].get("restartPolicy", "Always")
    plain = [status for status, c in zip(inits, (c for c in observed.containers if c.init), strict=True) if not c.sidecar]
    ended = [s["state"].get("terminated") or s["lastState"].get("terminated") for s in plain]
    own = _phase(policy, [end and end["exitCode"] for end in ended], apps, observed.over)
    if not observed.over:
        # Never terminal while something may still run: whoever waits for the end may start a replacement.
        return "Running" if own in TERMINAL else own
    failed = observed.ending is not None and observed.ending.failed
    return "Failed" if failed or own not in TERMINAL else own


def _phase(policy: str, init_codes: list[int | None], apps: list[Object], over: bool) -> str:
    if policy == "Never" and any(init_codes):
        return "Failed"
    states = [status["state"] for status in apps]
    running = sum("running" in state for state in states)
    codes = [(s["state"].get("terminated") or s["lastState"].get("terminated") or {}).get("exitCode") for s in apps]
    never_ran = any("waiting" in state and code is None for state, code in zip(states, codes, strict=True))
    if (None in init_codes and not running) or never_ran:
        return "Pending"
    if running:
        return "Running"
    if over:
        return "Failed" if any(codes) else "Succeeded"
    if policy == "Always":
        return "Running"
    if not any(codes):
        return "Succeeded"
    return "Failed" if policy == "Never" else "Running"


def conditions(pod: Object, own: str, inits: list[Object], apps: list[Object], observed: Observed, now: float) -> list[Object]:
    """The kubelet's five, each with the time of its last change; those of others are left to them."""
    incomplete = [
        s["name"]
        for s, c in zip(inits, (c for c in observed.containers if c.init), strict=True)
        if not (c.sidecar and s["started"]) and not _succeeded(c.run)
    ]
    unready = [s["name"] for s in apps if not s["ready"]]
    ready = _readiness(own, unready)
    gates = [gate["conditionType"] for gate in pod["spec"].get("readinessGates") or []]
    present = {item["type"]: item for item in pod.get("status", {}).get("conditions") or []}
    shut = [gate for gate in gates if present.get(gate, {}).get("status") != "True"]
    pod_ready = ready
    if ready[0] and shut:
        pod_ready = (False, "ReadinessGatesNotReady", f'corresponding condition of pod readiness gate "{shut[0]}" does not exist.')
    told = f"containers with incomplete status: [{' '.join(incomplete)}]"
    wanted: dict[str, tuple[bool, str, str]] = {
        "PodReadyToStartContainers": (observed.volumes_ready and not observed.over, "", ""),
        "Initialized": (not incomplete, "ContainersNotInitialized" if incomplete else "", told if incomplete else ""),
        "Ready": pod_ready,
        "ContainersReady": ready,
        "PodScheduled": (True, "", ""),
    }
    if own == "Succeeded":
        wanted["Initialized"] = (True, "PodCompleted", "")
    return [_condition(kind, *value, present.get(kind), now) for kind, value in wanted.items()]


def _readiness(own: str, unready: list[str]) -> tuple[bool, str, str]:
    if own == "Succeeded":
        return False, "PodCompleted", ""
    if own == "Failed":
        return False, "PodFailed", ""
    if unready:
        return False, "ContainersNotReady", f"containers with unready status: [{' '.join(unready)}]"
    return True, "", ""


def _condition(kind: str, value: bool, reason: str, message: str, before: Object | None, now: float) -> Object:
    status = "True" if value else "False"
    same = before is not None and before.get("status") == status
    changed = before["lastTransitionTime"] if before is not None and same else timestamp(now)
    # Nulls, or a strategic merge keeps the reason of the last time.
    return {
        "type": kind, "status": status, "lastTransitionTime": changed, "lastProbeTime": None,
        "reason": reason or None, "message": message or None,
    }  # fmt: skip


def _terminated(state: RunState, message: str) -> Object:
    # A container that never ran has the zero of time as its start, as containerd reports it.
    result: Object = {
        "exitCode": state.exit_code,
        "reason": state.reason,
        "startedAt": timestamp(0 if state.reason == "StartError" else state.started_at) if state.finished_at else None,
        "finishedAt": timestamp(state.finished_at) if state.finished_at else None,
    }
    return {**result, "message": message} if message else result


def _waiting(reason: str, message: str) -> Object:
    return {"waiting": {"reason": reason, **({"message": message} if message else {})}}


def _succeeded(run: Run | None) -> bool:
    return run is not None and run.state.exit_code == 0


def _initialised(observed: Observed) -> bool:
    return all((c.sidecar and c.started) or _succeeded(c.run) for c in observed.containers if c.init)
