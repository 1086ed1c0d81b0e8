"""The pods of child Jobs, as the operator sees them. Pure parsing, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kompressor_api import names
from kompressor_api.names import Step
from kompressor_operator.object_meta import moment, step_of

JOB_NAME_LABEL = "batch.kubernetes.io/job-name"


@dataclass(frozen=True, slots=True)
class Terminated:
    """How the worker's container ended."""

    exit_code: int
    reason: str = ""
    message: str = ""
    finished_at: str = ""
    started_at: str = ""
    never_ran: bool = False
    """Its pod was removed before there was a container, which would have an id: the kubelet makes up exit code 137 then."""


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
    phase: str = "Pending"
    node: str = ""
    deletion_due: datetime | None = None
    """When the grace period of a deletion ends; None if it is not being deleted."""
    waiting_reason: str = ""
    waiting_message: str = ""
    terminated: Terminated | None = None
    unschedulable: str = ""
    """The scheduler's message, while it finds no node."""
    disrupted: str = ""
    """Reason of a DisruptionTarget condition: eviction, preemption, taint."""
    reason: str = ""
    silent: bool = False
    """Its node does not answer: the node controller has taken Ready away, but not the kubelet's own ContainersReady."""

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> ChildPod:
        meta, spec, status = body["metadata"], body.get("spec") or {}, body.get("status") or {}
        labels = meta.get("labels") or {}
        conditions = {c["type"]: c for c in status.get("conditions") or ()}
        scheduled, disruption = conditions.get("PodScheduled", {}), conditions.get("DisruptionTarget", {})
        containers = status.get("containerStatuses") or ()
        worker: Mapping[str, Any] = next((c for c in containers if c["name"] == names.WORKER_CONTAINER), {})
        waiting = (worker.get("state") or {}).get("waiting") or {}
        ready, inside = conditions.get("Ready", {}), conditions.get("ContainersReady", {})
        stuck = scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable"
        return cls(
            namespace=meta["namespace"],
            name=meta["name"],
            uid=meta["uid"],
            owner=labels.get(names.LABEL_JOB_UID, ""),
            resource_version=meta.get("resourceVersion", ""),
            job=labels.get(JOB_NAME_LABEL, ""),
            created=moment(meta.get("creationTimestamp")),
            step=step_of(labels),
            phase=status.get("phase", "Pending"),
            node=spec.get("nodeName", ""),
            deletion_due=moment(meta["deletionTimestamp"]) if "deletionTimestamp" in meta else None,
            waiting_reason=waiting.get("reason", ""),
            waiting_message=waiting.get("message", ""),
            terminated=_terminated(worker),
            unschedulable=scheduled.get("message", "") if stuck else "",
            disrupted=disruption.get("reason", "") if disruption.get("status") == "True" else "",
            reason=status.get("reason", ""),
            silent=ready.get("status") == "False" and inside.get("status") == "True",
        )

    @property
    def ended(self) -> bool:
        return self.phase in ("Succeeded", "Failed")


def _terminated(container: Mapping[str, Any]) -> Terminated | None:
    state = (container.get("state") or {}).get("terminated")
    if not state:
        return None
    return Terminated(
        exit_code=state.get("exitCode", 0),
        reason=state.get("reason", ""),
        message=state.get("message", ""),
        finished_at=state.get("finishedAt") or "",
        started_at=state.get("startedAt") or "",
        never_ran=state.get("reason") == "ContainerStatusUnknown" and not (state.get("startedAt") or container.get("containerID")),
    )
