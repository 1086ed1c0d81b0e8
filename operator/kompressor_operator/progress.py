"""How a Job that goes on is doing: its pod runs, starts, waits for something, or the next one is due. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kompressor_api.names import Condition, ExitCode, Reason
from kompressor_operator.conditions import Phase, Verdict
from kompressor_operator.decide import Decision, Involved, JobPatch, View
from kompressor_operator.endings import decides, ending_of, ending_of_pod
from kompressor_operator.group import LEADER, foremost
from kompressor_operator.object_meta import moment
from kompressor_operator.observed import ChildJob
from kompressor_operator.pods import ChildPod
from kompressor_operator.troubles import LOST_AFTER, Trouble, creation_trouble, due, end_trouble, lost, mount_trouble, start_trouble

NO_POD_SECONDS = 3.0
"""A Job without a pod for this long deserves a look at its events; usually the pod is there within milliseconds."""
NO_RETRY_SECONDS = 30.0
"""After a failure the Job controller waits on purpose: ten seconds, and twice as long each time."""
NO_START_SECONDS = 10.0
"""A scheduled pod that does not start for this long deserves one too; pulling an image takes its time."""
NO_END_SECONDS = 10.0
"""What runs beside a worker may still have something to write when that has ended."""
LOOK_AGAIN_SECONDS = 60.0


def running(view: View, job: ChildJob, patches: tuple[JobPatch, ...], facts: Mapping[str, Any]) -> Decision:
    """What the status says while a Job goes on."""
    alive = [pod for pod in view.observed.pods_of(job) if not pod.ended or decides(pod)]
    told = _of_group(view, job, alive) if alive and job.pods > 1 else _of_pod(view, job, alive[-1]) if alive else _of_none(view, job)
    if isinstance(told, Involved):
        return Decision(look=told)
    phase, reason, message, again = told
    return Decision(patches=patches, verdict=Verdict(phase, reason, message, facts=facts), again_after=again)


def created(job_name: str) -> str:
    """One text from the first status write until the pod runs or something is wrong: each other text would be one more write."""
    return f"created Job {job_name}; its pod is about to start"


def follows(view: View, before: ChildJob, attempt: int, memory_plan: int, due: str = "") -> str:
    """Why there is another attempt, and when if not at once."""
    ending = ending_of(before, view.observed.pods_of(before))
    when = f" at {due}" if due else ""
    return f"attempt {before.attempt} ended: {ending.message}; attempt {attempt}{retry_note(memory_plan)} follows{when}"


def retry_note(memory_plan: int) -> str:
    return f" (with a smaller memory plan, step {memory_plan}, since the worker ran out of memory)" if memory_plan else ""


Told = tuple[Phase, str, str, float | None]


def _of_pod(view: View, job: ChildJob, pod: ChildPod) -> Told | Involved:
    """A pod is there."""
    gone = lost(pod, view.now)
    if gone:
        return Phase.RETRYING, gone.reason, gone.message, LOST_AFTER.total_seconds()
    if pod.deletion_due is not None and not pod.ended:
        why = f" ({pod.disrupted or job.failing})" if pod.disrupted or job.failing else ""
        if job.failing:
            return *_as_stored(view), f"pod {pod.name} is being stopped{why}; it commits its last block, and none follows", None
        message = f"pod {pod.name} is being stopped{why}; the next one goes on at the last committed block"
        return Phase.RETRYING, Reason.RETRYING, message, due(pod, view.now)
    trouble = start_trouble(pod) if pod.phase == "Pending" else None
    if trouble:
        return _troubled(trouble, None)
    if pod.phase == "Pending":
        return _starting(view, job, pod)
    over = _since_the_worker(view, pod)
    if over is not None and over >= NO_END_SECONDS:
        return _troubled(end_trouble(pod), None)
    after = f", after {job.failed} failed" if job.failed else ""
    message = f"pod {pod.name} on node {pod.node} compresses (attempt {job.attempt}{after}){retry_note(job.memory_plan)}"
    return Phase.COMPRESSING, Reason.COMPRESSING, message, None if over is None else NO_END_SECONDS - over


def _of_group(view: View, job: ChildJob, alive: Sequence[ChildPod]) -> Told | Involved:
    """Some pods of a group are there: the one that is worst off, or who is missing."""
    told = _of_pod(view, job, foremost(alive, view.now))
    if isinstance(told, Involved) or told[0] is not Phase.COMPRESSING:
        return told
    over = {pod.index for pod in view.observed.pods_of(job) if pod.phase == "Succeeded"}
    decided = any(pod.ended for pod in alive)  # the Job ends, and those that are stopped for it are not missed
    if not decided and len(over | {pod.index for pod in alive}) < job.pods:
        return _of_none(view, job)
    leader = next((pod for pod in alive if pod.index == LEADER), alive[-1])
    after = f", after {job.failed} failed" if job.failed else ""
    here = f"{sum(not pod.ended for pod in alive)} of {job.pods} pods"
    message = f"{here} work together, pod {leader.name} on node {leader.node} leads (attempt {job.attempt}{after})"
    return *told[:2], message + retry_note(job.memory_plan), told[3]


def _since_the_worker(view: View, pod: ChildPod) -> float | None:
    """Seconds from its end, where another container keeps the pod running."""
    if pod.ended or pod.terminated is None or pod.beside is None or not pod.beside.runs:
        return None
    return (view.now - moment(pod.terminated.finished_at)).total_seconds()


def _starting(view: View, job: ChildJob, pod: ChildPod) -> Told | Involved:
    age = (view.now - pod.created).total_seconds()
    if age < NO_START_SECONDS:
        return *_before_running(view, job), NO_START_SECONDS - age
    if not pod.node:
        return Phase.PENDING, Reason.PENDING, f"pod {pod.name} waits for a node", None
    if pod.beside and pod.beside.runs:
        return Phase.PENDING, Reason.PENDING, f"pod {pod.name} on node {pod.node}: the worker waits for {pod.beside.who}, which runs", None
    if view.observed.warnings is None:
        return Involved("Pod", pod.name, pod.uid)
    trouble = mount_trouble(pod, view.observed.warnings)
    message = f"pod {pod.name} starts on node {pod.node}"
    return _troubled(trouble, age) if trouble else (Phase.PENDING, Reason.PENDING, message, _later(age))


def _of_none(view: View, job: ChildJob) -> Told | Involved:
    """No pod is there: not yet, not again, or not allowed."""
    last = _last_ended(view, job)
    since = max(job.created, moment(last.finished_at), last.created) if last else job.created
    age = (view.now - since).total_seconds()
    if job.suspended:
        return Phase.PENDING, Reason.PENDING, f"Job {job.name} goes on", None
    told, patience = _before_running(view, job), NO_RETRY_SECONDS if last else NO_POD_SECONDS
    if age < patience:
        return *told, patience - age
    if view.observed.warnings is None:
        return Involved("Job", job.name, job.uid)
    trouble = creation_trouble(job, view.observed.warnings, since)
    return _troubled(trouble, age) if trouble else (*told, _later(age))


def _before_running(view: View, job: ChildJob) -> tuple[Phase, str, str]:
    """Why we are waiting for a pod: it is the first, or it follows one that failed."""
    if job.failing:
        return *_as_stored(view), f"Job {job.name} is ending ({job.failing})"
    last = _last_ended(view, job)
    if last:
        return Phase.RETRYING, Reason.RETRYING, f"{ending_of_pod(last).message}; the next pod follows"
    if len(view.observed.jobs) > 1:
        return Phase.RETRYING, Reason.RETRYING, follows(view, view.observed.jobs[-2], job.attempt, job.memory_plan)
    if job.failed or view.job.condition(Condition.READY).get("reason") in (Reason.COMPRESSING, Reason.RETRYING, Reason.NODE_LOST):
        return Phase.RETRYING, Reason.RETRYING, f"a pod of Job {job.name} is gone; the next one goes on at the last committed block"
    return Phase.PENDING, Reason.PENDING, created(job.name)


def _as_stored(view: View) -> tuple[Phase, str]:
    """Phase and reason as the status has them: a Job that is ending says within seconds why, and another reason until then is an event."""
    phase, reason = view.job.status.get("phase"), view.job.condition(Condition.READY).get("reason")
    if reason and phase in (Phase.COMPRESSING, Phase.RETRYING):
        return Phase(phase), str(reason)
    return Phase.PENDING, str(reason) if reason and phase == Phase.PENDING else Reason.PENDING


def _last_ended(view: View, job: ChildJob) -> ChildPod | None:
    """Of a group rather the pod that failed than those that ended for it."""
    ended = [pod for pod in reversed(view.observed.pods_of(job)) if pod.ended]
    if job.pods > 1:
        ended = [pod for pod in ended if pod.phase == "Failed"]
        newest = {pod.index: pod for pod in reversed(ended)}.values()
        return next((pod for pod in newest if not _followed(pod)), next(iter(ended), None))
    return next(iter(ended), None)


def _followed(pod: ChildPod) -> bool:
    return pod.terminated is not None and pod.terminated.exit_code == ExitCode.PEER_LOST


def _troubled(trouble: Trouble, age: float | None) -> Told:
    return Phase.PENDING, trouble.reason, trouble.message, None if age is None else _later(age)


def _later(age: float) -> float:
    """Ever more rarely: a look costs a request."""
    return min(LOOK_AGAIN_SECONDS, max(NO_POD_SECONDS, age))
