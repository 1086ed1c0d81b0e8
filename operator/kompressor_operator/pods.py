"""The pods of child Jobs, as the operator sees them. Pure parsing, no I/O.

Beside the worker's a pod has the containers that podTemplate or a webhook brings. Of these one is kept: the first that is in the worker's
way, or that has failed the pod.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kompressor_api import names
from kompressor_api.names import Step
from kompressor_operator.object_meta import moment, number, step_of

JOB_NAME_LABEL = "batch.kubernetes.io/job-name"
INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"
CRASH_LOOP = "CrashLoopBackOff"
_GATED = "ReadinessGatesNotReady"
_USUAL = frozenset({"", "ContainerCreating", "PodInitializing"})
"""Reasons for waiting that pass by themselves."""

Object = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Terminated:
    """How a container ended."""

    exit_code: int
    reason: str = ""
    message: str = ""
    finished_at: str = ""
    started_at: str = ""
    never_ran: bool = False
    """Its pod was removed before there was a container, which would have an id: the kubelet makes up exit code 137 then."""


@dataclass(frozen=True, slots=True)
class Beside:
    """A container other than the worker's. With neither `waiting_reason` nor `ended` it runs, and the worker waits for it, or has ended."""

    who: str
    """As messages call it: `init container fetch`, `sidecar proxy`, `container logs`."""
    waiting_reason: str = ""
    """CrashLoopBackOff also while a sidecar that has ended before the worker could start runs once more."""
    waiting_message: str = ""
    ended: Terminated | None = None
    """How it ended, if not well; of a crash loop: the last time."""

    @property
    def runs(self) -> bool:
        return not self.waiting_reason and self.ended is None


@dataclass(frozen=True, slots=True)
class ChildPod:
    """One pod of a child Job."""

    namespace: str
    name: str
    uid: str
    owner: str
    """uid of the CompressionJob, from the label: a pod's controller is the Job."""
    resource_version: str
    job: str
    created: datetime
    step: Step = Step.COMPRESS
    index: int = 0
    """Which pod of its group it is."""
    phase: str = "Pending"
    node: str = ""
    deletion_due: datetime | None = None
    """When the grace period of a deletion ends; None if it is not being deleted."""
    waiting_reason: str = ""
    """Of the worker's container, as are the next two."""
    waiting_message: str = ""
    terminated: Terminated | None = None
    beside: Beside | None = None
    unschedulable: str = ""
    """The scheduler's message, while it finds no node."""
    disrupted: str = ""
    """Reason of a DisruptionTarget condition: eviction, preemption, taint."""
    reason: str = ""
    message: str = ""
    """With the reason: why the kubelet refused or ended it."""
    silent: bool = False
    """Its node does not answer: the node controller has taken Ready away, but not the kubelet's own ContainersReady. (Where a readiness
    gate does so the kubelet gives that as the reason.)"""

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> ChildPod:
        meta, spec, status = body["metadata"], body.get("spec") or {}, body.get("status") or {}
        labels = meta.get("labels") or {}
        conditions = {c["type"]: c for c in status.get("conditions") or ()}
        scheduled, disruption = conditions.get("PodScheduled", {}), conditions.get("DisruptionTarget", {})
        worker, _ = _apart(status)
        waiting = _waiting(worker)
        ready, inside = conditions.get("Ready", {}), conditions.get("ContainersReady", {})
        stuck = scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable"
        return cls(
            namespace=sys.intern(meta["namespace"]),  # one text for all that have the same: there are tens of thousands
            name=meta["name"],
            uid=meta["uid"],
            owner=sys.intern(labels.get(names.LABEL_JOB_UID, "")),
            resource_version=meta.get("resourceVersion", ""),
            job=sys.intern(labels.get(JOB_NAME_LABEL, "")),
            created=moment(meta.get("creationTimestamp")),
            step=step_of(labels),
            index=number((meta.get("annotations") or {}).get(INDEX_ANNOTATION), 0),
            phase=sys.intern(status.get("phase", "Pending")),
            node=sys.intern(spec.get("nodeName", "")),
            deletion_due=moment(meta["deletionTimestamp"]) if "deletionTimestamp" in meta else None,
            waiting_reason=waiting.get("reason", ""),
            waiting_message=waiting.get("message", ""),
            terminated=_terminated(worker, "state"),
            beside=_beside(spec, status),
            unschedulable=scheduled.get("message", "") if stuck else "",
            disrupted=disruption.get("reason", "") if disruption.get("status") == "True" else "",
            reason=status.get("reason", ""),
            message=status.get("message", ""),
            silent=ready.get("status") == "False" and ready.get("reason") != _GATED and inside.get("status") == "True",
        )

    @property
    def ended(self) -> bool:
        return self.phase in ("Succeeded", "Failed")

    @property
    def finished_at(self) -> str:
        """When the container ended that tells how the pod did; empty if none did."""
        told = self.terminated or (self.beside.ended if self.beside else None)
        return told.finished_at if told else ""


def _beside(spec: Object, status: Object) -> Beside | None:
    """The first in the way, in the order in which a kubelet starts them."""
    sidecars = {c["name"] for c in spec.get("initContainers") or () if c.get("restartPolicy") == "Always"}
    pending = status.get("phase", "Pending") == "Pending"
    found: list[Beside | None] = []
    for seen in status.get("initContainerStatuses") or ():
        if seen["name"] not in sidecars:
            found.append(_in_the_way(f"init container {seen['name']}", seen, awaited=True))
        elif pending and not seen.get("started"):  # later on it is restarted beside the worker, and does not decide how the pod ends
            found.append(_sidecar(f"sidecar {seen['name']}", seen))
    worker, others = _apart(status)
    over = status.get("phase") == "Running" and _terminated(worker, "state") is not None
    beside = [_in_the_way(f"container {seen['name']}", seen, awaited=over) for seen in others]
    if over:  # what ended before it changes nothing any more
        beside.sort(key=lambda one: one is None or not one.runs)
    return next((one for one in (*found, *beside) if one), None)


def _apart(status: Object) -> tuple[Object, list[Object]]:
    """The worker's container, and the others that are neither init containers nor sidecars."""
    containers = status.get("containerStatuses") or ()
    others = [c for c in containers if c["name"] != names.WORKER_CONTAINER]
    return next((c for c in containers if c["name"] == names.WORKER_CONTAINER), {}), others


def _sidecar(who: str, seen: Object) -> Beside | None:
    """One that has not started yet. Ended, backing off and running once more read alike: they alternate for as long as it lasts."""
    last = _terminated(seen, "state") or _terminated(seen, "lastState")
    again = _waiting(seen).get("reason", "") in _USUAL | {CRASH_LOOP}
    return Beside(who, CRASH_LOOP, ended=last) if last and again else _in_the_way(who, seen, awaited=True)


def _in_the_way(who: str, seen: Object, *, awaited: bool) -> Beside | None:
    """`awaited`: whether the worker waits for it while it runs."""
    waiting, ended = _waiting(seen), _terminated(seen, "state")
    if waiting.get("reason", "") not in _USUAL:
        return Beside(who, waiting["reason"], waiting.get("message", ""), _terminated(seen, "lastState"))
    if ended is not None and ended.exit_code:
        return Beside(who, ended=ended)
    return Beside(who) if awaited and (seen.get("state") or {}).get("running") else None


def _waiting(container: Object) -> Object:
    found: Object = (container.get("state") or {}).get("waiting") or {}
    return found


def _terminated(container: Object, which: str) -> Terminated | None:
    """`which`: state, or lastState for the run before."""
    state = (container.get(which) or {}).get("terminated")
    if not state:
        return None
    return Terminated(
        exit_code=state.get("exitCode", 0),
        reason=sys.intern(state.get("reason", "")),
        message=state.get("message", ""),
        finished_at=state.get("finishedAt") or "",
        started_at=state.get("startedAt") or "",
        never_ran=state.get("reason") == "ContainerStatusUnknown" and not (state.get("startedAt") or container.get("containerID")),
    )
