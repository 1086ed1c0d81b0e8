"""Stopped by its user, or kept waiting by something else. Pure.

Only what the operator has suspended itself it lets go again, and the stored Suspended condition is the proof: it is written before the
Job is touched. Whatever else suspends a Job, such as Kueue, is waited for and not fought.
"""

from __future__ import annotations

from kompressor_api.names import Condition, Reason
from kompressor_operator.conditions import Phase, Verdict
from kompressor_operator.decide import Decision, JobPatch, View
from kompressor_operator.facts import facts_of, facts_of_told
from kompressor_operator.observed import ChildJob


def suspended(view: View) -> Decision | None:
    """The Job's own `suspend` stops its pod, which commits its block; nothing starts meanwhile."""
    if not view.job.suspend:
        return None
    job = view.observed.current
    going = job is not None and not job.ended and not job.deleting and view.job.is_true(Condition.SUSPENDED)
    patches = (JobPatch(job.name, {"suspend": True}),) if job and going and not job.suspended else ()
    alive = [pod.name for pod in view.observed.pods if not pod.ended]
    message = "spec.suspend is true; set it to false and the job goes on at its last committed block"
    if alive:
        message = f"pod {alive[-1]} commits its last block and stops; {message}"
    facts = facts_of_told(view, job)
    return Decision(patches=patches, verdict=Verdict(Phase.SUSPENDED, Reason.SUSPENDED, message, facts=facts))


def may_unsuspend(view: View) -> bool:
    """Was it the operator that suspended the Job? A queued Job is its queue's."""
    return view.job.is_true(Condition.SUSPENDED) and not view.job.spec.get("queueName")


def queued(view: View, job: ChildJob) -> Verdict:
    """The Job is suspended, but not by its user."""
    message = f"Job {job.name} is kept suspended by something else, and goes on when that lets it go"
    return Verdict(Phase.QUEUED, Reason.QUEUED, message, facts=facts_of(view, job))
