"""What the operator sees, as small frozen records: a CompressionJob and its child Jobs; their pods are in pods.py. Pure parsing,
no I/O.

Only what decides is kept of a child, so that tens of thousands of them fit into memory.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from kompressor_api import names
from kompressor_api.names import Condition, Step
from kompressor_api.pod import accelerators
from kompressor_api.v1alpha1 import CompressionJobSpec, RetrySpec
from kompressor_operator.object_meta import moment, number, owner_uid, step_of
from kompressor_operator.pods import ChildPod

Manifest = dict[str, Any]
Key = tuple[str, str]
"""(namespace, name) of a CompressionJob."""


@dataclass(frozen=True)
class CompressionJob:
    """The resource as last seen."""

    namespace: str
    name: str
    uid: str
    generation: int
    resource_version: str
    deleting: bool
    spec: Manifest
    status: Manifest
    beside: Mapping[str, Any] = field(default_factory=dict)
    """What stands beside `spec` and should not: a misspelt name, or one that was indented too little."""
    finalizers: tuple[str, ...] = ()

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> CompressionJob:
        meta = body["metadata"]
        return cls(
            namespace=meta["namespace"],
            name=meta["name"],
            uid=meta["uid"],
            generation=meta.get("generation", 0),
            resource_version=meta.get("resourceVersion", ""),
            deleting="deletionTimestamp" in meta,
            spec=body.get("spec") or {},
            status=body.get("status") or {},
            beside={name: value for name, value in body.items() if name not in names.TOP_LEVEL},
            finalizers=tuple(meta.get("finalizers") or ()),
        )

    @property
    def key(self) -> Key:
        return (self.namespace, self.name)

    @property
    def suspend(self) -> bool:
        return bool(self.spec.get("suspend"))

    @property
    def retry_limit(self) -> int:
        limit = (self.spec.get("retry") or {}).get("limit")
        return RetrySpec().limit if limit is None else int(limit)

    @property
    def preflight(self) -> bool:
        """Is one wanted? Of a field that is younger than a release the CRD holds no default."""
        return bool((self.spec.get("preflight") or CompressionJobSpec.model_fields["preflight"].default) == "Job")

    @property
    def ttl(self) -> int | None:
        seconds = self.spec.get("ttlSecondsAfterFinished")
        return None if seconds is None else int(seconds)

    @property
    def finished(self) -> bool:
        """Complete or Failed is stored: nothing starts again, whatever the Jobs say."""
        return any(self.is_true(name) for name in (Condition.COMPLETE, Condition.FAILED))

    def is_true(self, kind: Condition) -> bool:
        return any(c.get("type") == kind and c.get("status") == "True" for c in self.status.get("conditions") or ())

    def condition(self, kind: Condition) -> Mapping[str, Any]:
        return next((c for c in self.status.get("conditions") or () if c.get("type") == kind), {})


@dataclass(frozen=True, slots=True)
class ChildJob:
    """One attempt, or one run of the preflight or of the clean-up."""

    namespace: str
    name: str
    uid: str
    owner: str
    resource_version: str
    attempt: int
    created: datetime
    step: Step = Step.COMPRESS
    started: datetime | None = None
    """When the Job controller started it, or started it again after a suspension; None if it never did."""
    image: str = ""
    """Of the worker's container."""
    gpus: int = 0
    """That the worker's container asks for, in each pod."""
    queue: str = ""
    """Kueue's queue that admits it."""
    pods: int = 1
    """That work at once."""
    deleting: bool = False
    suspended: bool = False
    backoff_limit: int = 0
    ttl: int | None = None
    memory_plan: int = 0
    failures_before: int = 0
    active: int = 0
    failed: int = 0
    failing: str = ""
    """Why it is going to fail once its pods are gone; they are being stopped."""
    ended: str = ""
    """Complete, Failed, or empty while it goes on."""
    ended_reason: str = ""
    ended_message: str = ""
    ended_at: str = ""

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> ChildJob:
        meta, spec, status = body["metadata"], body.get("spec") or {}, body.get("status") or {}
        notes, labels = meta.get("annotations") or {}, meta.get("labels") or {}
        true = [c for c in status.get("conditions") or () if c["status"] == "True"]
        end: Mapping[str, Any] = next((c for c in true if c["type"] in ("Complete", "Failed")), {})
        return cls(
            namespace=sys.intern(meta["namespace"]),  # one text for all that have the same: there are tens of thousands
            name=sys.intern(meta["name"]),
            uid=meta["uid"],
            owner=sys.intern(owner_uid(meta)),
            resource_version=meta.get("resourceVersion", ""),
            attempt=number(labels.get(names.LABEL_ATTEMPT), 1),
            created=moment(meta.get("creationTimestamp")),
            step=step_of(labels),
            started=moment(status["startTime"]) if status.get("startTime") else None,
            image=sys.intern(str(_worker(spec).get("image", ""))),
            gpus=accelerators(_worker(spec)),
            queue=labels.get(names.QUEUE_LABEL, ""),
            pods=spec.get("completions") or 1,
            deleting="deletionTimestamp" in meta,
            suspended=bool(spec.get("suspend")),
            backoff_limit=spec.get("backoffLimit", 6),
            ttl=spec.get("ttlSecondsAfterFinished"),
            memory_plan=number(notes.get(names.ANNOTATION_MEMORY_PLAN), 0),
            failures_before=number(notes.get(names.ANNOTATION_FAILURES_BEFORE), 0),
            active=status.get("active") or 0,
            failed=status.get("failed") or 0,
            failing=next((c.get("reason", "") for c in true if c["type"] == "FailureTarget"), ""),
            ended=sys.intern(str(end.get("type", ""))),
            ended_reason=sys.intern(str(end.get("reason", ""))),
            ended_message=sys.intern(str(end.get("message", ""))),
            ended_at=status.get("completionTime") or end.get("lastTransitionTime") or "",
        )


@dataclass(frozen=True)
class Warned:
    """A Warning event about a child, as far as it says why nothing happens."""

    reason: str
    message: str
    seen: datetime

    @classmethod
    def parse(cls, event: Mapping[str, Any]) -> Warned:
        last = (event.get("series") or {}).get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
        return cls(event.get("reason", ""), event.get("message", ""), moment(last))


@dataclass(frozen=True)
class Observed:
    """The children of one CompressionJob."""

    jobs: tuple[ChildJob, ...] = ()
    """Those that compress, by attempt, rising."""
    pods: tuple[ChildPod, ...] = ()
    """Those that compress, by creation, rising."""
    preflight: ChildJob | None = None
    cleanup: ChildJob | None = None
    step_pods: tuple[ChildPod, ...] = ()
    """Pods of preflight and clean-up, by creation, rising."""
    live: bool = False
    """Read from the API server just now, not from what the watches have told so far."""
    warnings: tuple[Warned, ...] | None = field(default=None)
    """Warning events of the child that was asked about, newest first; None if nobody asked."""

    @property
    def current(self) -> ChildJob | None:
        return self.jobs[-1] if self.jobs else None

    def pods_of(self, job: ChildJob) -> tuple[ChildPod, ...]:
        """Of any step's Job."""
        among = self.pods if job.step is Step.COMPRESS else self.step_pods
        return tuple(pod for pod in among if pod.job == job.name)


def ours(body: Mapping[str, Any], job: CompressionJob) -> bool:
    """Does this object belong to this very CompressionJob?"""
    return owner_uid(body["metadata"]) == job.uid


def _worker(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """The worker's container in a Job's template; empty if a stranger's Job has none."""
    containers = ((spec.get("template") or {}).get("spec") or {}).get("containers") or ()
    return next((c for c in containers if c.get("name") == names.WORKER_CONTAINER), {})
