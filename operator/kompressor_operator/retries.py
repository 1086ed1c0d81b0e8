"""Which attempt comes next, when, and with how much time left: from the Jobs alone, or from the status once no Job is left. Pure.

Nothing is remembered: an operator that was restarted, and one that only now takes over, decide the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

from kompressor_api.names import Condition, Reason
from kompressor_operator.decide import View
from kompressor_operator.endings import Ending, advised, ending_of, free
from kompressor_operator.manifests import OUT_OF_MEMORY_CODES, Attempt
from kompressor_operator.object_meta import moment, stamp
from kompressor_operator.observed import ChildJob

__all__ = ["SMALLER_PLANS", "again", "counted", "failures", "next_attempt", "out_of_time", "pause"]

SMALLER_PLANS = 2
"""How often a job that ran out of memory goes on with a smaller memory plan."""
FIRST_PAUSE, LONGEST_PAUSE = 10, 360
"""Seconds between a failed attempt and the next, doubled by each failure that counts: the Job controller's own between two pods."""


def next_attempt(view: View) -> Attempt | None:
    """The attempt that follows; None while one goes on, or if none may follow."""
    job = view.observed.current
    attempt = _after_none(view) if job is None else _after(view, job)
    return None if attempt is None or _no_time(attempt) else attempt


def again(view: View, job: ChildJob) -> Attempt:
    """The attempt that this Job is."""
    before = [other for other in view.observed.jobs if other.attempt < job.attempt]
    return Attempt(job.attempt, job.memory_plan, job.failures_before, job.image, _time_left(view, before))


def out_of_time(view: View) -> Ending | None:
    """How the job ends if another attempt might follow, but the earlier ones took all the time that there was."""
    job = view.observed.current
    attempt = _after(view, job) if job else None
    if attempt is None or not _no_time(attempt):
        return None
    text = f"{len(view.observed.jobs)} attempts took the {view.job.spec['activeDeadlineSeconds']} seconds of spec.activeDeadlineSeconds"
    return Ending(Reason.DEADLINE_EXCEEDED, advised(Reason.DEADLINE_EXCEEDED, text))


def pause(view: View, attempt: Attempt) -> tuple[float, str]:
    """Seconds until this attempt is due, and that moment; 0 for now. None is made to wait for memory, or by a clock that is behind."""
    job = view.observed.current
    if job is None or not job.ended_at or attempt.memory_plan > job.memory_plan:
        return 0.0, ""
    delay = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** max(0, attempt.failures_before - 1))
    ended = moment(job.ended_at)
    since = (view.now - ended).total_seconds()
    return (delay - since if 0 <= since < delay else 0.0), stamp(ended + timedelta(seconds=delay))


def counted(view: View, job: ChildJob) -> int:
    """Failures up to and with this Job that count against retry.limit; the one that ran out of memory has its own bound, and a pod that
    was removed before its worker ran is none."""
    ending = ending_of(job, view.observed.pods_of(job)) if job.ended_reason == "PodFailurePolicy" else None
    apart = ending is not None and (ending.out_of_memory or ending.never_ran)
    return max(0, job.failures_before + failures(view, job) - apart)


def failures(view: View, job: ChildJob) -> int:
    """Pods of this Job that failed of their own. Of a group that fails, the Job controller counts all that it stops for it: these are
    deleted, and those that failed stay."""
    if job.pods == 1 or not (job.ended == "Failed" or job.failing):
        return job.failed
    own = sum(pod.phase == "Failed" and pod.deletion_due is None and not free(pod) for pod in view.observed.pods_of(job))
    return min(job.failed, max(1, own))


def _after(view: View, job: ChildJob) -> Attempt | None:
    """What follows a Job that has ended, were there no deadline."""
    if job.ended != "Failed" or job.ended_reason != "PodFailurePolicy":
        return None  # it goes on, or has used up its own retries or time
    ending = ending_of(job, view.observed.pods_of(job))
    if ending.exit_code not in OUT_OF_MEMORY_CODES and not ending.out_of_memory:
        return None
    left = _time_left(view, view.observed.jobs)
    same = Attempt(job.attempt + 1, job.memory_plan, counted(view, job), job.image, left)
    if ending.out_of_memory:
        return replace(same, memory_plan=job.memory_plan + 1) if job.memory_plan < SMALLER_PLANS else None
    return same if same.failures_before <= view.job.retry_limit else None


def _after_none(view: View) -> Attempt:
    """The first, or one whose Job was deleted: then the status has to do. A namesake of the deleted one comes in its place, the same for
    every operator that notices, unless the stored Suspended says that it was deleted on purpose."""
    status = view.job.status
    removed = status.get("jobName") and view.job.spec.get("queueName") and view.job.is_true(Condition.SUSPENDED)
    return Attempt(
        number=max(1, int(status.get("attempt") or 1)) + bool(removed),
        memory_plan=min(SMALLER_PLANS, max(0, int(status.get("memoryPlan") or 0))),
        failures_before=max(0, int(status.get("failures") or 0)),
        image=str(status.get("workerImage") or ""),
        deadline=_time_left(view, ()),
    )


def _time_left(view: View, before: Sequence[ChildJob]) -> int | None:
    """Seconds of spec.activeDeadlineSeconds that these Jobs have left; None without a limit. A Job starts anew when it is resumed."""
    limit = view.job.spec.get("activeDeadlineSeconds")
    return None if limit is None else int(limit) - sum(map(_took, before))


def _took(job: ChildJob) -> int:
    if job.started is None or not job.ended_at:
        return 0
    return max(0, math.ceil((moment(job.ended_at) - job.started).total_seconds()))


def _no_time(attempt: Attempt) -> bool:
    return attempt.deadline is not None and attempt.deadline < 1
