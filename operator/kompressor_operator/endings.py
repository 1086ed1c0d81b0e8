"""How an attempt ended: exit code, reason and words of the pod that decided it. Pure.

A worker says why it stopped in its termination message: `{"reason", "message", "exitCode", "summary"}`. A process that was killed
could not; then the exit code and the kubelet's own reason have to do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kompressor_api import names
from kompressor_api.failures import ADVICE, FAILURES, KILLED, failure_of_code
from kompressor_api.names import ExitCode, Reason
from kompressor_operator.observed import ChildJob
from kompressor_operator.pods import Beside, ChildPod, Terminated

TEXT_LIMIT = 1500
"""Characters of a worker's own words on the status; the log has the rest."""

REASON_OF_CODE: Mapping[int, Reason] = {ExitCode.DONE: Reason.COMPLETED} | {
    code: failure.reason for failure in FAILURES for code in failure.codes
}

KUBELET_REASONS: Mapping[str, Reason] = {
    "OOMKilled": Reason.OUT_OF_MEMORY,
    "StartError": Reason.CONTAINER_NOT_STARTED,
    "ContainerCannotRun": Reason.CONTAINER_NOT_STARTED,
}
"""What the kubelet knows better than the exit code."""

STOPPED_CODES = (KILLED, 143)
"""Of a container that did not handle the SIGTERM or SIGKILL of its pod's deletion."""

_POD_IN_MESSAGE = re.compile(r"for pod [^\s/]+/(?P<pod>\S+) failed with exit code (?P<code>\d+)")
_REASONS = frozenset(map(str, Reason))
_REASON = re.compile(r"^[A-Za-z][A-Za-z0-9]{0,62}$")


@dataclass(frozen=True)
class Ending:
    """Why a pod, and with it perhaps its Job, ended."""

    reason: str
    message: str
    exit_code: int | None = None
    out_of_memory: bool = False
    never_ran: bool = False
    """Its pod was removed before the worker began: nobody's failure, though the Job may have taken its exit code for one."""
    summary: Mapping[str, Any] = field(default_factory=dict)


def ending_of(job: ChildJob, pods: Sequence[ChildPod]) -> Ending:
    """How this finished Job ended, by the pod that its condition names, or else by the last one that ended."""
    if job.ended_reason == Reason.DEADLINE_EXCEEDED:  # the Job's own end, whatever happened to a pod before
        return Ending(Reason.DEADLINE_EXCEEDED, advised(Reason.DEADLINE_EXCEEDED, job.ended_message or f"Job {job.name} took too long"))
    named = _POD_IN_MESSAGE.search(job.ended_message)
    finished = [pod for pod in pods if pod.ended]
    if named:
        finished = [pod for pod in finished if pod.name == named["pod"]]
    elif job.ended == "Complete":
        finished = [pod for pod in finished if pod.phase == "Succeeded" and pod.index == 0]  # of a group, the one that publishes
    else:
        finished = [pod for pod in finished if not free(pod)] or finished  # what did not count does not speak for the rest
    if finished:
        return ending_of_pod(max(finished, key=lambda pod: (pod.finished_at, pod.created, pod.name)))
    if named:  # the pod is gone, its exit code is not
        return _ending(Terminated(int(named["code"])), f"pod {named['pod']}")
    if job.ended == "Complete":
        return Ending(Reason.COMPLETED, "", ExitCode.DONE)
    reason = job.ended_reason if _REASON.match(job.ended_reason) else Reason.WORKER_CRASHED
    return Ending(reason, advised(reason, job.ended_message or f"Job {job.name} failed and its pods are gone"))


def ending_of_pod(pod: ChildPod) -> Ending:
    """How one pod ended; also one that never got to run its container."""
    if pod.terminated is None:
        return _without_worker(pod)
    if pod.disrupted and pod.terminated.exit_code != ExitCode.DONE:  # whatever the worker made of it
        text = f"pod {pod.name} was taken away ({pod.disrupted})"
        return Ending(Reason.TERMINATED, advised(Reason.TERMINATED, text), pod.terminated.exit_code)
    if pod.terminated.never_ran:
        text = f"pod {pod.name} was removed before the worker ran"
        return Ending(Reason.TERMINATED, advised(Reason.TERMINATED, text), pod.terminated.exit_code, never_ran=True)
    if pod.phase == "Failed" and pod.terminated.exit_code == ExitCode.DONE and pod.beside and pod.beside.ended:
        return _of_beside(pod, pod.beside)
    return _ending(pod.terminated, f"pod {pod.name}")


def how_it_ended(beside: Beside) -> str:
    """Of a container that is not the worker's: its exit code, or what the kubelet knows better, and what it said last."""
    ended = beside.ended
    if ended is None:
        return f"{beside.who} ended"
    how = f"{beside.who} ended with exit code {ended.exit_code}"
    if ended.reason == "OOMKilled":
        how = f"{beside.who} was killed because it used more memory than its limit"
    elif KUBELET_REASONS.get(ended.reason) is Reason.CONTAINER_NOT_STARTED:
        how = f"{beside.who} could not be started"
    said = ended.message.strip()[-TEXT_LIMIT:]
    return f"{how}; it said last: {said}" if said else how


def advised(reason: str, text: str, code: int | None = None) -> str:
    """The text and what to do about it: for this reason, or else for this class of failures."""
    advice = ADVICE.get(Reason(reason)) if reason in _REASONS else None
    if advice is None and code:
        advice = failure_of_code(code).advice
    return f"{text.rstrip('. ')}; {advice}" if advice and advice not in text else text


def _without_worker(pod: ChildPod) -> Ending:
    """The pod ended before its worker ran, or nobody knows that it did."""
    failed = pod.beside.ended if pod.beside and not pod.disrupted else None
    stopped = failed is not None and pod.deletion_due is not None and failed.exit_code in STOPPED_CODES
    if pod.beside and failed and not stopped:
        return _of_beside(pod, pod.beside)
    why = ": ".join(part for part in (pod.disrupted or pod.reason, pod.message) if part) or "no container status"
    text = f"pod {pod.name} was removed before the worker ran" if stopped else f"pod {pod.name} ended without its worker: {why}"
    return Ending(Reason.TERMINATED, advised(Reason.TERMINATED, text))


def _of_beside(pod: ChildPod, beside: Beside) -> Ending:
    """Without an exit code: it is not the worker's."""
    return Ending(Reason.CONTAINER_FAILED, advised(Reason.CONTAINER_FAILED, f"pod {pod.name}: {how_it_ended(beside)}"))


def _ending(ended: Terminated, who: str) -> Ending:
    told = _report(ended.message)
    code = ended.exit_code
    memory = ended.reason == "OOMKilled" or code == ExitCode.OUT_OF_MEMORY
    own = told.get("reason")
    reason = str(own) if own and _REASON.match(str(own)) else REASON_OF_CODE.get(code, Reason.WORKER_CRASHED)
    reason = KUBELET_REASONS.get(ended.reason, reason)
    summary = told.get("summary")
    return Ending(
        reason=reason,
        message=_words(told, ended, who, reason),
        exit_code=code,
        out_of_memory=memory,
        summary=summary if isinstance(summary, dict) else {},
    )


def _words(told: Mapping[str, Any], ended: Terminated, who: str, reason: str) -> str:
    own = str(told.get("message") or "").strip()
    if ended.exit_code == ExitCode.DONE:
        return own[:TEXT_LIMIT]
    if own:
        return advised(reason, own[:TEXT_LIMIT], ended.exit_code)
    how = f"{who} ended with exit code {ended.exit_code}"
    if ended.reason == "OOMKilled":
        how = f"{who} was killed because it used more memory than its limit"
    elif reason == Reason.CONTAINER_NOT_STARTED:
        how = f"{who} could not start its container"
    elif ended.exit_code == KILLED:
        how = f"{who} was killed (SIGKILL), but not for memory"
    elif ended.exit_code in names.UNCAUGHT_EXIT_CODES:
        how = f"{who} crashed with exit code {ended.exit_code}"
    text = "" if told else ended.message.strip()[-TEXT_LIMIT:]
    return advised(reason, how, ended.exit_code) + (f"; it said last: {text}" if text else "")


def _report(message: str) -> Mapping[str, Any]:
    """The worker's own report, or nothing if the message is something else, such as the end of a log."""
    try:
        told = json.loads(message) if message.lstrip().startswith("{") else None
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def free(pod: ChildPod) -> bool:
    """Does its end not count, by the first two rules of the podFailurePolicy, or for want of a worker that failed?"""
    ended = pod.terminated
    return bool(pod.disrupted) or (ended is not None and (ended.never_ran or ended.exit_code in (ExitCode.TERMINATED, ExitCode.PEER_LOST)))


def decides(pod: ChildPod) -> bool:
    """An ended pod after which the Job ends: within a second it says so itself, and until then there is no news to tell."""
    ends, ended = {*names.FINAL_EXIT_CODES, ExitCode.OUT_OF_MEMORY, KILLED}, pod.terminated
    if pod.phase == "Succeeded" or ended is None:
        return pod.phase == "Succeeded" and pod.index == 0  # of a group, the one that publishes
    return ended.exit_code in ends and not (pod.disrupted or ended.never_ran)  # one that never ran was no news to begin with
