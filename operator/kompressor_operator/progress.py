"""How a Job that goes on is doing: its pod runs, starts, waits for something, or the next one is due. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from kompressor_api.names import Reason
from kompressor_operator.conditions import Phase, Verdict
from kompressor_operator.decide import Decision, Involved, JobPatch, View
from kompressor_operator.endings import ending_of_pod
from kompressor_operator.observed import ChildJob, ChildPod, moment
from kompressor_operator.troubles import LOST_AFTER, Trouble, creation_trouble, lost, mount_trouble, start_trouble

NO_POD_SECONDS = 3.0
"""A Job without a pod for this long deserves a look at its events; usually the pod is there within milliseconds."""
NO_RETRY_SECONDS = 30.0
"""After a failure the Job controller waits on purpose: ten seconds, and twice as long each time."""
NO_START_SECONDS = 10.0
"""A scheduled pod that does not start for this long deserves one too; pulling an image takes its time."""
LOOK_AGAIN_SECONDS = 60.0


def running(view: View, job: ChildJob, patches: tuple[JobPatch, ...], facts: Mapping[str, Any]) -> Decision:
    """What the status says while a Job goes on."""
    pods = view.observed.pods_of(job)
    alive = [pod for pod in pods if not pod.ended]
    told = _of_pod(view, job, alive[-1]) if alive else _of_none(view, job, pods)
    if isinstance(told, Involved):
        return Decision(look=told)
    phase, reason, message, again = told
    return Decision(patches=patches, verdict=Verdict(phase, reason, message, facts=facts), again_after=again)


def created(job_name: str) -> str:
    """One text from the first status write until the pod runs or something is wrong: each other text would be one more write."""
    return f"created Job {job_name}; its pod is about to start"


def retry_note(memory_plan: int) -> str:
    return f" (with a smaller memory plan, step {memory_plan}, since the worker ran out of memory)" if memory_plan else ""


Told = tuple[Phase, Reason, str, float | None]


def _of_pod(view: View, job: ChildJob, pod: ChildPod) -> Told | Involved:
    """A pod is there."""
    gone = lost(pod, view.now)
    if gone:
        return Phase.RETRYING, gone.reason, gone.message, LOST_AFTER.total_seconds()
    if pod.deletion_due is not None:
        why = f" ({pod.disrupted})" if pod.disrupted else ""
        message = f"pod {pod.name} is being stopped{why}; the next one goes on at the last committed block"
        return Phase.RETRYING, Reason.RETRYING, message, _seconds(view.now, pod.deletion_due + LOST_AFTER)
    trouble = start_trouble(pod)
    if trouble:
        return _troubled(trouble, None)
    if pod.phase == "Running":
        after = f", after {job.failed} failed" if job.failed else ""
        message = f"pod {pod.name} on node {pod.node} compresses (attempt {job.attempt}{after}){retry_note(job.memory_plan)}"
        return Phase.COMPRESSING, Reason.COMPRESSING, message, None
    return _starting(view, job, pod)


def _starting(view: View, job: ChildJob, pod: ChildPod) -> Told | Involved:
    age = (view.now - pod.created).total_seconds()
    if age < NO_START_SECONDS:
        return Phase.PENDING, Reason.PENDING, created(job.name), NO_START_SECONDS - age
    if not pod.node:
        return Phase.PENDING, Reason.PENDING, f"pod {pod.name} waits for a node", None
    message = f"pod {pod.name} starts on node {pod.node}"
    if view.observed.warnings is None:
        return Involved("Pod", pod.name, pod.uid)
    trouble = mount_trouble(pod, view.observed.warnings)
    return _troubled(trouble, age) if trouble else (Phase.PENDING, Reason.PENDING, message, _later(age))


def _of_none(view: View, job: ChildJob, pods: tuple[ChildPod, ...]) -> Told | Involved:
    """No pod is there: not yet, not again, or not allowed."""
    last = pods[-1] if pods else None
    ended_at = last.terminated.finished_at if last and last.terminated else ""
    since = moment(ended_at) if ended_at else job.created
    age = (view.now - since).total_seconds()
    if last:
        told = f"{ending_of_pod(last).message}; the next pod follows ({job.failed} of {job.backoff_limit + 1} failures)"
        phase, reason, message = Phase.RETRYING, Reason.RETRYING, told
    else:
        phase, reason, message = Phase.PENDING, Reason.PENDING, created(job.name)
    if job.suspended:
        return Phase.PENDING, Reason.PENDING, f"Job {job.name} goes on", None
    patience = NO_RETRY_SECONDS if last else NO_POD_SECONDS
    if age < patience:
        return phase, reason, message, patience - age
    if view.observed.warnings is None:
        return Involved("Job", job.name, job.uid)
    trouble = creation_trouble(job, view.observed.warnings, since)
    return _troubled(trouble, age) if trouble else (phase, reason, message, _later(age))


def _troubled(trouble: Trouble, age: float | None) -> Told:
    return Phase.PENDING, trouble.reason, trouble.message, None if age is None else _later(age)


def _later(age: float) -> float:
    """Ever more rarely: a look costs a request."""
    return min(LOOK_AGAIN_SECONDS, max(NO_POD_SECONDS, age))


def _seconds(now: datetime, until: datetime) -> float:
    return max(1.0, (until - now).total_seconds())
