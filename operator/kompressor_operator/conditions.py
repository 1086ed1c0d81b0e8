"""What the status says, by the rules of kstatus: from a verdict to conditions, to the smallest status patch, to an event. Pure.

Ready is always present; Reconciling and Stalled exist only while True; Complete and Failed are the two ends. lastTransitionTime
moves only with the status of its condition, and a status that says the same already is not written again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from kompressor_api import names
from kompressor_api.names import Condition, Reason
from kompressor_operator.object_meta import stamp
from kompressor_operator.observed import CompressionJob, Manifest


class Phase(StrEnum):
    """One word for people; nothing decides on it."""

    PENDING = "Pending"
    VALIDATING = "Validating"
    QUEUED = "Queued"
    COMPRESSING = "Compressing"
    RETRYING = "Retrying"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"


SILENT_REASONS = frozenset({Reason.PENDING, Reason.PREFLIGHT})
"""The usual way to the start: no event, since each is one more request and tells nothing that the status does not."""

NORMAL_REASONS = SILENT_REASONS | frozenset(
    {Reason.QUEUED, Reason.COMPRESSING, Reason.SUSPENDED, Reason.COMPLETED, Reason.ALREADY_COMPRESSED}
)
"""Events with any other reason are warnings."""

FREE_FIELDS: tuple[str, ...] = (
    "jobName",
    "attempt",
    "retries",
    "startTime",
    "completionTime",
    "specDigest",
    "progress",
    "result",
    "recipe",
    "plan",
    "memoryPlan",
    "failures",
    "resumedFromBlock",
    "workerImage",
    "gpuSeconds",
)

EVENT_LIMIT = 1024
"""Bytes that the API server takes in an event's message."""

CLEARED = ""
"""As a fact: what the status says there is not true any more. A merge patch removes a field by null."""


@dataclass(frozen=True)
class Event:
    warning: bool
    reason: str
    message: str


State = tuple[bool | None, str, str]
"""A condition's status (None: Unknown), reason and message."""


@dataclass(frozen=True)
class Verdict:
    """What is true now. The phase says which of the ways (on the way, suspended, complete, failed) the conditions take."""

    phase: Phase
    reason: str
    message: str
    validated: bool | None = True
    """None: nobody knows yet; a preflight is still looking, unless `validated_message` says otherwise, for the reason of the verdict."""
    validated_message: str = ""
    """What the Validated condition says; empty for its usual words."""
    note: Event | None = None
    """A second event, told with the write that changes what Validated says."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Other status fields by name; None or absent leaves a field as it is, CLEARED takes it away."""


def conditions(job: CompressionJob, verdict: Verdict, now: datetime) -> list[Manifest]:
    """The whole list: the operator is its only writer, and a merge patch replaces it."""
    suspended, said = verdict.phase is Phase.SUSPENDED, (verdict.reason, verdict.message)
    states: dict[Condition, State] = {
        Condition.READY: (verdict.phase is Phase.COMPLETE, *said),
    }
    over = verdict.phase in (Phase.COMPLETE, Phase.FAILED)
    if not over and not suspended:
        states[Condition.RECONCILING] = (True, *said)
    if verdict.phase is Phase.FAILED:
        states[Condition.STALLED] = (True, *said)
    states[Condition.VALIDATED] = _validated(job, verdict)
    if suspended:
        states[Condition.SUSPENDED] = (True, *said)
    elif over and job.suspend:
        states[Condition.SUSPENDED] = (False, verdict.reason, "the job has ended")
    elif job.condition(Condition.SUSPENDED):
        states[Condition.SUSPENDED] = (False, Reason.RESUMED, "spec.suspend is false")
    if verdict.phase is Phase.COMPLETE:
        states[Condition.COMPLETE] = (True, *said)
    if verdict.phase is Phase.FAILED:
        states[Condition.FAILED] = (True, *said)
    return [_condition(job, kind, *state, now) for kind, state in states.items()]


def _validated(job: CompressionJob, verdict: Verdict) -> State:
    """What a preflight has found stays, unless it is told anew; before one that is wanted has looked, nobody knows."""
    before = job.condition(Condition.VALIDATED)
    known = str(before.get("message") or "") if before.get("status") == "True" else ""
    if verdict.validated is False:
        return False, verdict.reason, verdict.validated_message or verdict.message
    if verdict.validated is None or (not known and _unseen(job, verdict)):
        if verdict.validated_message:
            return None, verdict.reason, verdict.validated_message
        return None, Reason.PREFLIGHT, "the preflight has not told yet what it found"
    return True, Reason.VALID, verdict.validated_message or known or "the spec is valid"


def _unseen(job: CompressionJob, verdict: Verdict) -> bool:
    """Is a preflight wanted that has not told its outcome?"""
    told = (*job.status, *verdict.facts)
    return job.preflight and verdict.phase is not Phase.COMPLETE and not {"plan", "jobName"} & {*told}


def status_patch(job: CompressionJob, verdict: Verdict, now: datetime) -> Manifest:
    """The fields of the status that are to change; empty if nothing is."""
    wanted: dict[str, Any] = {
        "observedGeneration": job.generation,
        "phase": str(verdict.phase),
        "conditions": conditions(job, verdict, now),
        **{name: None if fact == CLEARED else fact for name in FREE_FIELDS if (fact := verdict.facts.get(name)) is not None},
    }
    return {name: value for name, value in wanted.items() if not _says(job.status.get(name), value)}


def generation_patch(job: CompressionJob) -> Manifest:
    """For a finished job whose spec changed where it may (TTL, suspend): the end still holds, for the new generation too."""
    if job.status.get("observedGeneration") == job.generation:
        return {}
    kept = [{**c, "observedGeneration": job.generation} for c in job.status.get("conditions") or ()]
    return {"observedGeneration": job.generation, "conditions": kept}


def blocked_patch(job: CompressionJob, blocked: Event | None, now: datetime) -> Manifest:
    """For a job that is being deleted: what its clean-up waits for, if anything. All else goes on telling how the job ended."""
    stored = list(job.status.get("conditions") or ())
    wanted = [c for c in stored if c.get("type") != Condition.CLEANUP_BLOCKED]
    if blocked:
        wanted.append(_condition(job, Condition.CLEANUP_BLOCKED, True, blocked.reason, blocked.message, now))
    return {} if wanted == stored else {"conditions": wanted}


def transition(job: CompressionJob, verdict: Verdict) -> Event | None:
    """The event to tell, if this verdict differs from what is stored in more than words."""
    ready = job.condition(Condition.READY)
    same = ready.get("reason") == verdict.reason and job.status.get("phase") == verdict.phase
    if same or verdict.reason in SILENT_REASONS:
        return None
    return Event(verdict.reason not in NORMAL_REASONS, verdict.reason, verdict.message)


def events(job: CompressionJob, verdict: Verdict) -> list[Event]:
    """All that is to be told, once the status is written."""
    changed = job.condition(Condition.VALIDATED).get("message") != _validated(job, verdict)[2]
    return [event for event in (transition(job, verdict), verdict.note if changed else None) if event]


def event_body(job: CompressionJob, event: Event, now: datetime) -> Manifest:
    """The Event object, for `kubectl describe`; told twice of the same version of a job it has the same name."""
    unique = hashlib.sha256(f"{job.uid}/{job.resource_version}/{event.reason}".encode()).hexdigest()[:16]
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{job.name[:200]}.{unique}", "namespace": job.namespace},
        "involvedObject": {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "namespace": job.namespace,
            "name": job.name,
            "uid": job.uid,
            "resourceVersion": job.resource_version,
        },
        "type": "Warning" if event.warning else "Normal",
        "reason": event.reason,
        "message": event.message.encode()[:EVENT_LIMIT].decode(errors="ignore"),
        "source": {"component": names.FIELD_MANAGER},
        "reportingComponent": names.FIELD_MANAGER,
        "firstTimestamp": stamp(now),
        "lastTimestamp": stamp(now),
        "count": 1,
    }


def _condition(job: CompressionJob, kind: Condition, on: bool | None, reason: str, message: str, now: datetime) -> Manifest:
    status, before = "Unknown" if on is None else str(on), job.condition(kind)
    kept = before.get("status") == status
    return {
        "type": str(kind),
        "status": status,
        "reason": str(reason),
        "message": message,
        "lastTransitionTime": before.get("lastTransitionTime") if kept else stamp(now),
        "observedGeneration": job.generation,
    }


def _says(present: Any, wanted: Any) -> bool:
    """Does the stored value already say this? Objects are merged by the patch, so fields that it does not name do not matter."""
    if isinstance(wanted, dict) and isinstance(present, dict):
        return all(_says(present.get(key), value) for key, value in wanted.items())
    return bool(present == wanted)
