"""What the status is to say beside the conditions: which Job it is about, since when, with what. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from kompressor_api.v1alpha1 import Result
from kompressor_operator.conditions import CLEARED
from kompressor_operator.decide import View
from kompressor_operator.manifests import spec_digest
from kompressor_operator.object_meta import stamp
from kompressor_operator.observed import ChildJob
from kompressor_operator.retries import counted, failures

__all__ = ["facts_of", "facts_of_told", "result_of"]


def facts_of(view: View, job: ChildJob | None) -> dict[str, Any]:
    """Which Job it is about, since when, and what must outlive it: with no Job left the next attempt is made from these."""
    if job is None:
        return {}
    status = view.job.status
    return {
        "jobName": job.name,
        "attempt": job.attempt,
        "retries": failures(view, job),
        "startTime": status.get("startTime") or stamp(view.observed.jobs[0].created),
        "specDigest": status.get("specDigest") or spec_digest(view.told.spec),
        "memoryPlan": job.memory_plan,
        "failures": counted(view, job),
        "workerImage": job.image or None,
        "resumedFromBlock": _went_on_at(status),
    }


def _went_on_at(status: Mapping[str, Any]) -> str | None:
    """Where the worker that reported last went on: nowhere, if it began anew; None until one has reported."""
    progress = status.get("progress")
    return str(progress.get("resumedFrom") or CLEARED) if progress else None


def facts_of_told(view: View, job: ChildJob | None) -> dict[str, Any]:
    """The same, but a Job is not named for the first time by a policy that has not made sure of its other children."""
    facts = facts_of(view, job)
    if job is not None and view.job.status.get("jobName") != job.name:
        del facts["jobName"]
    return facts


def result_of(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """The worker's own words, if it could not push them itself; what does not fit the schema is left out."""
    known = {name: summary[name] for name in Result.model_fields if name in summary}
    try:
        return Result.model_validate(known).model_dump(exclude_none=True) or None
    except ValidationError:
        return None
