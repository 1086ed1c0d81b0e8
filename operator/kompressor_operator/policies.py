"""The policies of a CompressionJob's life, in the order in which they are asked. Pure; the first hit wins.

deleting -> guarded -> finished -> resolve -> refused -> ended -> suspended -> waiting -> preflight -> start -> run. What needs more than a
few lines is in a file of its own: cleanup.py, recipes.py, suspension.py, retries.py, preflight.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kompressor_api.names import Reason
from kompressor_operator.cleanup import deleting, guarded
from kompressor_operator.conditions import Phase, Verdict
from kompressor_operator.decide import CONFIRM, Decision, JobPatch, Policy, View
from kompressor_operator.endings import Ending, ending_of
from kompressor_operator.facts import facts_of, facts_of_told, result_of
from kompressor_operator.group import foremost
from kompressor_operator.manifests import OUT_OF_MEMORY_CODES, Attempt, backoff_limit, job_name, service, spec_digest
from kompressor_operator.object_meta import stamp
from kompressor_operator.observed import ChildJob, Manifest
from kompressor_operator.planner import preflight_ttl
from kompressor_operator.preflight import preflight, with_plan
from kompressor_operator.progress import created, follows, running
from kompressor_operator.recipes import resolve
from kompressor_operator.retries import SMALLER_PLANS, again, counted, next_attempt, out_of_time, pause
from kompressor_operator.suspension import may_unsuspend, queued, resuming, stops_by, suspended, waits
from kompressor_operator.troubles import LOST_AFTER, lost
from kompressor_operator.validation import merely_unknown, problems_of, told
from kompressor_operator.worker_pod import worker_image


def finished(view: View) -> Decision | None:
    """The end is stored: no other Job ever. Only now may the Jobs get a TTL, since a Job that is gone tells nothing."""
    if not view.job.finished:
        return None
    wanted = [(job, view.job.ttl) for job in view.observed.jobs]
    if view.observed.preflight is not None:
        wanted.append((view.observed.preflight, preflight_ttl(view.job)))
    stale = [(job, ttl) for job, ttl in wanted if ttl is not None and job.ttl != ttl and job.ended and not job.deleting]
    patches = tuple(JobPatch(job.name, {"ttlSecondsAfterFinished": ttl}) for job, ttl in stale)
    return Decision(patches=patches, keep_generation=True)


def refused(view: View) -> Decision | None:
    """A spec that cannot work never gets a Job. One that has a Job was accepted, perhaps by an older operator."""
    if view.observed.jobs or view.job.status.get("jobName"):
        return None
    problems = problems_of(view.told.spec, view.passes, view.job.beside)
    if (unknown := merely_unknown(problems)) and not view.misspelt:
        return Decision(unknown=unknown)
    problem = told(problems)
    if problem and view.recipe:
        problem = f"with {view.recipe['kind']} {view.recipe['name']}: {problem}"
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
    return Decision(verdict=_failed(view, job, out_of_time(view) or ending))


def waiting(view: View) -> Decision | None:
    """Never two at once: the next Job waits until the one before and its pods are gone, and for a while after a failure."""
    attempt, job = next_attempt(view), view.observed.current
    if job is not None and job.deleting:
        message = f"Job {job.name} is being deleted; the next one starts when it is gone"
        return Decision(verdict=_pending(view, message))
    alive = [pod for pod in view.observed.pods if not pod.ended]
    if attempt is None or not alive:
        return _paused(view, job, attempt) if job and attempt else None
    pod = foremost(alive, view.now)
    trouble = lost(pod, view.now)
    if trouble and resuming(view):
        return Decision(verdict=_pending(view, trouble.message), again_after=LOST_AFTER.total_seconds())
    if trouble:
        verdict = Verdict(Phase.RETRYING, trouble.reason, trouble.message, facts=facts_of(view, job))
        return Decision(verdict=verdict, again_after=LOST_AFTER.total_seconds())
    message = f"pod {pod.name} of an earlier attempt is ending; the next one starts when it is gone"
    return Decision(verdict=_pending(view, message), again_after=LOST_AFTER.total_seconds())


def _paused(view: View, before: ChildJob, attempt: Attempt) -> Decision | None:
    """The Job controller makes a failed pod wait; it knows nothing of a Job that follows another."""
    seconds, due = pause(view, attempt)
    if not seconds:
        return None
    message = follows(view, before, attempt.number, attempt.memory_plan, due)
    return Decision(
        verdict=Verdict(Phase.RETRYING, Reason.RETRYING, message, facts=facts_of(view, before)),
        again_after=seconds,
    )


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
        "memoryPlan": attempt.memory_plan,
        "failures": attempt.failures_before,
        "workerImage": attempt.image or worker_image(view.told, view.settings),
        "startTime": view.job.status.get("startTime") or stamp(view.now),
        "specDigest": spec_digest(view.told.spec),
    }
    before = view.observed.current
    if before is None and view.job.spec.get("queueName"):  # it is created suspended
        queueing = Verdict(Phase.QUEUED, Reason.QUEUED, waits(view, name, attempt.memory_plan), facts=facts)
        return Decision(start=attempt, verdict=queueing)
    if before is None:
        return Decision(start=attempt, verdict=Verdict(Phase.PENDING, Reason.PENDING, created(name), facts=facts))
    message = follows(view, before, attempt.number, attempt.memory_plan)
    return Decision(start=attempt, verdict=Verdict(Phase.RETRYING, Reason.RETRYING, message, facts=facts))


def run(view: View) -> Decision | None:
    """A Job is there and goes on: keep its mutable fields as the spec says, and tell how it is doing."""
    job = view.observed.current
    if job is None:
        return None
    if resuming(view) and not view.observed.live:
        return CONFIRM  # its removal may be on the way to us, and what is said of it now would make its number come again
    wanted: dict[str, Any] = {}
    if job.suspended and may_unsuspend(view):
        wanted["suspend"] = False
    limit = backoff_limit(view.job, job.failures_before)
    if job.backoff_limit != limit:
        wanted["backoffLimit"] = limit
    patches = (JobPatch(job.name, wanted),) if wanted else ()
    if job.suspended and "suspend" not in wanted:
        decision = Decision(patches=patches, verdict=queued(view, job), again_after=stops_by(view, view.observed.pods_of(job)))
    else:
        decision = replace(running(view, job, patches, facts_of(view, job)), keep=meeting_place(view, job))
    if view.job.status.get("jobName") == job.name:
        return decision
    # its start was never told, so perhaps it was cut short: finish it, what is there already does no harm
    return replace(decision, start=again(view, job))


def meeting_place(view: View, job: ChildJob) -> tuple[Manifest, ...]:
    """The Service without which the pods of a group find one another no more, should one of them be started again."""
    return (service(view.told),) if job.pods > 1 and not job.failing else ()


POLICIES: tuple[Policy, ...] = (
    deleting,
    guarded,
    finished,
    resolve,
    refused,
    ended,
    suspended,
    waiting,
    preflight,
    with_plan(start),
    with_plan(run),
)


def _complete(view: View, job: ChildJob, ending: Ending) -> Verdict:
    reason = Reason.ALREADY_COMPRESSED if ending.reason == Reason.ALREADY_COMPRESSED else Reason.COMPLETED
    message = ending.message or f"the result is at {view.job.spec['output']['uri']}"
    facts = facts_of(view, job) | {"completionTime": job.ended_at or stamp(view.now), "progress": {"percent": 100}}
    if not view.job.status.get("result"):
        facts["result"] = result_of(ending.summary)
    return Verdict(Phase.COMPLETE, reason, message, facts=facts)


def _failed(view: View, job: ChildJob, ending: Ending) -> Verdict:
    facts = facts_of(view, job) | {"completionTime": job.ended_at or stamp(view.now)}
    if ending.summary and not view.job.status.get("result"):
        facts["result"] = result_of(ending.summary)  # what was measured before a gate was not met
    message, count = ending.message, counted(view, job)
    if ending.out_of_memory and job.memory_plan >= SMALLER_PLANS:
        message = f"out of memory with the smallest memory plan too: {message}"
    elif job.ended_reason == "BackoffLimitExceeded" or ending.exit_code in OUT_OF_MEMORY_CODES:
        message = f"gave up after {count} failures (spec.retry.limit {view.job.retry_limit}): {message}"
    return Verdict(Phase.FAILED, ending.reason, message, facts=facts)


def _pending(view: View, message: str) -> Verdict:
    facts = facts_of_told(view, view.observed.current)
    if resuming(view):
        return Verdict(Phase.SUSPENDED, Reason.SUSPENDED, message, facts=facts)
    return Verdict(Phase.PENDING, Reason.PENDING, message, facts=facts)
