"""The policies of a CompressionJob's life, in the order in which they are asked. Pure; the first hit wins.

deleting -> finished -> invalid -> ended -> suspended -> waiting -> start -> running. A deadline, a queue or a preflight step is one
more function in this list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from kompressor_api.names import Reason
from kompressor_api.v1alpha1 import Result
from kompressor_operator.conditions import Phase, Verdict
from kompressor_operator.decide import CONFIRM, NOTHING, Decision, JobPatch, Policy, View
from kompressor_operator.endings import Ending, ending_of
from kompressor_operator.manifests import OUT_OF_MEMORY_CODES, Attempt, backoff_limit, job_name, spec_digest
from kompressor_operator.observed import ChildJob, stamp
from kompressor_operator.progress import created, follows, running
from kompressor_operator.troubles import LOST_AFTER, lost
from kompressor_operator.validation import invalid

SMALLER_PLANS = 2
"""How often a job that ran out of memory goes on with a smaller memory plan."""


def deleting(view: View) -> Decision | None:
    """Owner references clean up; there is nothing to do and no finalizer to remove."""
    return NOTHING if view.job.deleting else None


def finished(view: View) -> Decision | None:
    """The end is stored: no other Job ever. Only now may the Jobs get a TTL, since a Job that is gone tells nothing."""
    if not view.job.finished:
        return None
    ttl = view.job.ttl
    stale = [job for job in view.observed.jobs if ttl is not None and job.ttl != ttl and job.ended and not job.deleting]
    patches = tuple(JobPatch(job.name, {"ttlSecondsAfterFinished": ttl}) for job in stale)
    return Decision(patches=patches, keep_generation=True)


def refused(view: View) -> Decision | None:
    """A spec that cannot work never gets a Job. One that has a Job was accepted, perhaps by an older operator."""
    if view.observed.jobs or view.job.status.get("jobName"):
        return None
    problem = invalid(view.job.spec, view.passes, view.job.beside)
    return Decision(verdict=invalid_spec(view, problem)) if problem else None


def invalid_spec(view: View, problem: str) -> Verdict:
    facts = {"completionTime": stamp(view.now)}
    return Verdict(Phase.FAILED, Reason.INVALID_SPEC, problem, validated=False, facts=facts)


def ended(view: View) -> Decision | None:
    """The last Job is over: complete, failed for good, or (None) due for another attempt."""
    job = view.observed.current
    if job is None or not job.ended:
        return None
    ending = ending_of(job, view.observed.pods_of(job))
    if job.ended == "Complete":
        untold = not view.job.status.get("result") and not ending.summary
        return CONFIRM if untold and not view.observed.live else Decision(verdict=_complete(view, job, ending))
    if not view.observed.live:
        return CONFIRM  # the pod that decided may not have reached us yet
    if next_attempt(view) is not None:
        return None
    return Decision(verdict=_failed(view, job, ending))


def suspended(view: View) -> Decision | None:
    """The Job's own `suspend` stops its pod, which commits its block; nothing starts meanwhile."""
    if not view.job.suspend:
        return None
    job = view.observed.current
    going = job is not None and not job.ended and not job.deleting
    patches = (JobPatch(job.name, {"suspend": True}),) if job and going and not job.suspended else ()
    alive = [pod.name for pod in view.observed.pods if not pod.ended]
    message = "spec.suspend is true; set it to false and the job goes on at its last committed block"
    if alive:
        message = f"pod {alive[-1]} commits its last block and stops; {message}"
    facts = _facts_of_told(view, job)
    return Decision(patches=patches, verdict=Verdict(Phase.SUSPENDED, Reason.SUSPENDED, message, facts=facts))


def waiting(view: View) -> Decision | None:
    """Never two at once: the next Job waits until the one before and its pods are gone."""
    attempt, job = next_attempt(view), view.observed.current
    if job is not None and job.deleting:
        message = f"Job {job.name} is being deleted; the next one starts when it is gone"
        return Decision(verdict=_pending(view, message))
    alive = [pod for pod in view.observed.pods if not pod.ended]
    if attempt is None or not alive:
        return None
    trouble = lost(alive[-1], view.now)
    if trouble:
        verdict = Verdict(Phase.RETRYING, trouble.reason, trouble.message, facts=_facts(view, job))
        return Decision(verdict=verdict, again_after=LOST_AFTER.total_seconds())
    message = f"pod {alive[-1].name} of an earlier attempt is ending; the next one starts when it is gone"
    return Decision(verdict=_pending(view, message), again_after=LOST_AFTER.total_seconds())


def start(view: View) -> Decision | None:
    """The first Job, or the next attempt. Only the very first is made without asking the API server again."""
    attempt, known = next_attempt(view), view.job.status.get("jobName")
    if attempt is None:
        return None
    if not view.observed.live and (known or view.observed.jobs):
        return CONFIRM
    name = job_name(view.job, attempt.number)
    facts = {
        "jobName": name,
        "attempt": attempt.number,
        "retries": 0,
        "startTime": view.job.status.get("startTime") or stamp(view.now),
        "specDigest": spec_digest(view.job.spec),
    }
    before = view.observed.current
    if before is None:
        return Decision(start=attempt, verdict=Verdict(Phase.PENDING, Reason.PENDING, created(name), facts=facts))
    message = follows(view, before, attempt.number, attempt.memory_plan)
    return Decision(start=attempt, verdict=Verdict(Phase.RETRYING, Reason.RETRYING, message, facts=facts))


def run(view: View) -> Decision | None:
    """A Job is there and goes on: keep its mutable fields as the spec says, and tell how it is doing."""
    job = view.observed.current
    if job is None:
        return None
    wanted: dict[str, Any] = {}
    if job.suspended:
        wanted["suspend"] = False
    limit = backoff_limit(view.job, job.failures_before)
    if job.backoff_limit != limit:
        wanted["backoffLimit"] = limit
    patches = (JobPatch(job.name, wanted),) if wanted else ()
    decision = running(view, job, patches, _facts(view, job))
    if view.job.status.get("jobName") == job.name:
        return decision
    # its start was never told, so perhaps it was cut short: finish it, what is there already does no harm
    return replace(decision, start=Attempt(job.attempt, job.memory_plan, job.failures_before))


POLICIES: tuple[Policy, ...] = (deleting, finished, refused, ended, suspended, waiting, start, run)


def next_attempt(view: View) -> Attempt | None:
    """The attempt that is due, from the Jobs alone; None while one goes on, or if none may follow."""
    job = view.observed.current
    if job is None:
        return Attempt(number=max(1, int(view.job.status.get("attempt") or 1)))
    if job.ended != "Failed":
        return None
    ending = ending_of(job, view.observed.pods_of(job))
    if ending.exit_code not in OUT_OF_MEMORY_CODES and not ending.out_of_memory:
        return None
    if job.ended_reason != "PodFailurePolicy":
        return None  # the Job used up its own retries
    counted = job.failures_before + job.failed
    if ending.out_of_memory:
        counted -= 1  # the one that ran out of memory has its own bound
        plan = job.memory_plan + 1
        return Attempt(job.attempt + 1, plan, max(0, counted)) if plan <= SMALLER_PLANS else None
    return Attempt(job.attempt + 1, job.memory_plan, counted) if counted <= view.job.retry_limit else None


def _complete(view: View, job: ChildJob, ending: Ending) -> Verdict:
    reason = Reason.ALREADY_COMPRESSED if ending.reason == Reason.ALREADY_COMPRESSED else Reason.COMPLETED
    message = ending.message or f"the result is at {view.job.spec['output']['uri']}"
    facts = _facts(view, job) | {"completionTime": job.ended_at or stamp(view.now), "progress": {"percent": 100}}
    if not view.job.status.get("result"):
        facts["result"] = _result(ending.summary)
    return Verdict(Phase.COMPLETE, reason, message, facts=facts)


def _failed(view: View, job: ChildJob, ending: Ending) -> Verdict:
    facts = _facts(view, job) | {"completionTime": job.ended_at or stamp(view.now)}
    if ending.summary and not view.job.status.get("result"):
        facts["result"] = _result(ending.summary)  # what was measured before a gate was not met
    message, count = ending.message, job.failures_before + job.failed
    if ending.out_of_memory and job.memory_plan >= SMALLER_PLANS:
        message = f"out of memory with the smallest memory plan too: {message}"
    elif job.ended_reason == "BackoffLimitExceeded" or ending.exit_code in OUT_OF_MEMORY_CODES:
        message = f"gave up after {count} failures (spec.retry.limit {view.job.retry_limit}): {message}"
    return Verdict(Phase.FAILED, ending.reason, message, facts=facts)


def _pending(view: View, message: str) -> Verdict:
    return Verdict(Phase.PENDING, Reason.PENDING, message, facts=_facts_of_told(view, view.observed.current))


def _facts(view: View, job: ChildJob | None) -> dict[str, Any]:
    """Which Job it is about, and since when."""
    if job is None:
        return {}
    first = view.job.status.get("startTime") or stamp(view.observed.jobs[0].created)
    facts = {"jobName": job.name, "attempt": job.attempt, "retries": job.failed, "startTime": first}
    return facts | {"specDigest": view.job.status.get("specDigest") or spec_digest(view.job.spec)}


def _facts_of_told(view: View, job: ChildJob | None) -> dict[str, Any]:
    """The same, but a Job is not named for the first time by a policy that has not made sure of its other children."""
    facts = _facts(view, job)
    if job is not None and view.job.status.get("jobName") != job.name:
        del facts["jobName"]
    return facts


def _result(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """The worker's own words, if it could not push them itself; what does not fit the schema is left out."""
    known = {name: summary[name] for name in Result.model_fields if name in summary}
    try:
        return Result.model_validate(known).model_dump(exclude_none=True) or None
    except ValidationError:
        return None
