"""Stopped by its user, or kept waiting by a queue or something else. Pure.

Only what the operator has suspended itself it lets go again, and the stored Suspended condition is the proof: it is written before the
Job is touched. Whatever else suspends a Job, such as Kueue, is waited for and not fought. A Job in a queue is the queue's alone: Kueue
would unsuspend one that it has admitted, so there the user's suspend removes the Job, and resuming makes the next attempt.
"""

from __future__ import annotations

from collections.abc import Sequence

from kompressor_api.names import QUEUE_GROUP, Condition, Reason
from kompressor_operator.conditions import Phase, Verdict
from kompressor_operator.decide import CONFIRM, Decision, JobPatch, View
from kompressor_operator.facts import facts_of, facts_of_told
from kompressor_operator.group import foremost
from kompressor_operator.observed import ChildJob
from kompressor_operator.pods import ChildPod
from kompressor_operator.progress import retry_note
from kompressor_operator.troubles import due, lost


def suspended(view: View) -> Decision | None:
    """Nothing starts meanwhile, and what runs is stopped: it commits its block."""
    if not view.job.suspend:
        return None
    job = view.observed.current
    going = job is not None and not job.ended and not job.deleting and view.job.is_true(Condition.SUSPENDED)
    facts, again = facts_of_told(view, job), stops_by(view, view.observed.pods)
    if view.job.spec.get("queueName"):
        if going and not view.observed.live:
            return CONFIRM  # it may have ended, or been resumed
        # all of them, the newest last: with no Job left the status alone, which is stored by now, tells the history
        removed = tuple(each for each in view.observed.jobs if not each.deleting) if going else ()
        then = "a next attempt queues and goes on at the last committed block"
        return Decision(deletes=removed, verdict=_stopped(view, then, facts), again_after=again)
    patches = (JobPatch(job.name, {"suspend": True}),) if job and going and not job.suspended else ()
    return Decision(patches=patches, verdict=_stopped(view, "the job goes on at its last committed block", facts), again_after=again)


def may_unsuspend(view: View) -> bool:
    """Was it the operator that suspended the Job? A queued Job is its queue's."""
    return view.job.is_true(Condition.SUSPENDED) and not view.job.spec.get("queueName")


def queued(view: View, job: ChildJob) -> Verdict:
    """The Job is suspended, but not by its user."""
    message = _stopping(view, view.observed.pods_of(job)) + waits(view, job.name, job.memory_plan)
    return Verdict(Phase.QUEUED, Reason.QUEUED, message, facts=facts_of(view, job))


def stops_by(view: View, pods: Sequence[ChildPod]) -> float | None:
    """Seconds after which a pod that is being stopped should be gone; None if none is, or it is overdue already."""
    alive = [pod for pod in pods if not pod.ended]
    if not alive:
        return None
    pod = foremost(alive, view.now)
    return None if lost(pod, view.now) else due(pod, view.now)


def waits(view: View, job_name: str, memory_plan: int) -> str:
    """For what, and what to do if that never comes."""
    queue = view.job.spec.get("queueName")
    if not queue:
        return (
            f"something else keeps Job {job_name} suspended, and it goes on when that lets it go; if that is Kueue's "
            "manageJobsWithoutQueueName, apply the job again with spec.queueName"
        )
    text = f"Job {job_name}{retry_note(memory_plan)} waits in queue {queue} for admission"
    if view.kueue is False:
        return f"{text}; this cluster has no Kueue ({QUEUE_GROUP}): install it, or apply the job again without spec.queueName"
    return f"{text}; `kubectl get workloads` says what it waits for"


def resuming(view: View) -> bool:
    """A Job that was removed by its user's suspend is not gone yet. Until it is, Suspended stays stored, or its number would come again."""
    return bool(view.job.spec.get("queueName")) and view.job.is_true(Condition.SUSPENDED)


def _stopped(view: View, then: str, facts: dict[str, object]) -> Verdict:
    message = f"{_stopping(view, view.observed.pods)}spec.suspend is true; set it to false and {then}"
    return Verdict(Phase.SUSPENDED, Reason.SUSPENDED, message, facts=facts)


def _stopping(view: View, pods: Sequence[ChildPod]) -> str:
    """What becomes of a pod that is still there, in front of the rest of a message."""
    alive = [pod for pod in pods if not pod.ended]
    if not alive:
        return ""
    pod = foremost(alive, view.now)
    gone = lost(pod, view.now)
    return f"{gone.message}; " if gone else f"pod {pod.name} commits its last block and stops; "
