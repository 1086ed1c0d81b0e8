"""Builders for table tests: a CompressionJob, its Jobs and its pods, as the API server would show them."""

from __future__ import annotations

import copy
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from kompressor_api import names
from kompressor_operator.decide import Decision, View, decide
from kompressor_operator.object_meta import stamp
from kompressor_operator.observed import ChildJob, CompressionJob, Warned
from kompressor_operator.pods import ChildPod, Terminated
from kompressor_operator.policies import POLICIES
from kompressor_operator.settings import Settings
from kompressor_operator.store import observe

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
UID = "7c6f4a3e-0000-4000-8000-000000000001"
SETTINGS = Settings(worker_image="worker:1")
PASSES = {"rtn": ["scheme", "groupSize", "targets", "ignore"]}

SPEC: dict[str, Any] = {
    "model": {"source": {"uri": "s3://models/llama", "credentialsSecret": "models"}},
    "output": {"uri": "s3://models/llama-w4", "credentialsSecret": "results", "format": "compressed-tensors"},
    "passes": [{"rtn": {"scheme": "W4A16", "groupSize": 128}}],
    "preflight": "Skip",
    "retry": {"limit": 4},
    "suspend": False,
}


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def kcj(
    name: str = "llama", *, status: dict[str, Any] | None = None, deleting: bool = False, generation: int = 1, **spec: Any
) -> CompressionJob:
    """A CompressionJob; keyword arguments replace whole fields of the spec, None removes one."""
    full = copy.deepcopy(SPEC) | copy.deepcopy(spec)
    return CompressionJob(
        namespace="team",
        name=name,
        uid=UID,
        generation=generation,
        resource_version="100",
        deleting=deleting,
        spec={key: value for key, value in full.items() if value is not None},
        status={"observedGeneration": -1} | (status or {}),
    )


def child(attempt: int = 1, **fields: Any) -> ChildJob:
    """A child Job that goes on; created a minute ago."""
    base = ChildJob(
        namespace="team",
        name=f"llama-{attempt}",
        uid=f"job-{attempt}",
        owner=UID,
        resource_version="10",
        attempt=attempt,
        created=ago(60),
        backoff_limit=4,
    )
    return replace(base, **fields)


def failed(attempt: int = 1, reason: str = "PodFailurePolicy", **fields: Any) -> ChildJob:
    """A child Job that is over."""
    return child(attempt, ended="Failed", ended_reason=reason, **({"failed": 1, "ended_at": stamp(ago(1))} | fields))


def complete(attempt: int = 1, **fields: Any) -> ChildJob:
    return child(attempt, ended="Complete", **({"ended_at": stamp(ago(1))} | fields))


def pod(attempt: int = 1, suffix: str = "a", **fields: Any) -> ChildPod:
    """A worker pod that runs on node-1; `exit=71` and `said=...` make it one that has ended."""
    ending = fields.pop("exit", None)
    if ending is not None:
        fields.setdefault("phase", "Failed" if ending else "Succeeded")
        message, why = fields.pop("said", ""), fields.pop("killed", "Error")
        fields["terminated"] = Terminated(ending, why, message, stamp(fields.pop("at", ago(1))))
    base = ChildPod(
        namespace="team",
        name=f"llama-{attempt}-{suffix}",
        uid=f"pod-{attempt}-{suffix}",
        owner=UID,
        resource_version="20",
        job=f"llama-{attempt}",
        created=ago(50),
        phase="Running",
        node="node-1",
    )
    return replace(base, **fields)


def judge(
    job: CompressionJob,
    *children: ChildJob | ChildPod,
    live: bool = True,
    warnings: list[tuple[str, str]] | None = None,
    now: datetime = NOW,
    kueue: bool | None = None,
    misspelt: bool = True,
) -> Decision:
    """What the policies say, by default on what was read just now, and of names that the API server does not know either."""
    observed = observe([c for c in children if isinstance(c, ChildJob)], [c for c in children if isinstance(c, ChildPod)], live=live)
    if warnings is not None:
        observed = replace(observed, warnings=tuple(Warned(reason, message, now) for reason, message in warnings))
    return decide(View(job, observed, now, SETTINGS, PASSES, kueue=kueue, misspelt=misspelt), POLICIES)


def condition(kind: str, status: str = "True", **fields: Any) -> dict[str, Any]:
    return {"type": kind, "status": status, "reason": "Any", "message": "", "lastTransitionTime": "2025-01-01T00:00:00Z"} | fields


def ended_status(kind: str = "Complete", **fields: Any) -> dict[str, Any]:
    """The stored status of a finished job."""
    return {"conditions": [condition(kind)], "jobName": "llama-1", "attempt": 1, "observedGeneration": 1} | fields


def job_body(uid: str = UID, version: int = 1, **fields: Any) -> dict[str, Any]:
    """A CompressionJob as it comes over the wire."""
    meta = {"namespace": "team", "name": "llama", "uid": uid, "generation": 1, "resourceVersion": str(version)}
    return {"metadata": meta, "spec": copy.deepcopy(SPEC), "status": {}} | fields


def child_body(version: int = 1, name: str = "llama-1", owner: str = UID, **fields: Any) -> dict[str, Any]:
    """A child Job as it comes over the wire."""
    meta = {
        "namespace": "team",
        "name": name,
        "uid": f"uid-of-{name}",
        "resourceVersion": str(version),
        "creationTimestamp": stamp(ago(60)),
        "labels": {names.LABEL_JOB_UID: owner, names.LABEL_ATTEMPT: "1"},
        "ownerReferences": [{"uid": owner, "controller": True}],
    }
    return {"metadata": meta, "spec": {"backoffLimit": 4}, "status": {}} | fields
