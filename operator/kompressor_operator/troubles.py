"""Early truth: why a pod does not run, read from its status and from the warnings about it, each with its remedy. Pure.

People should not have to hunt through pods and events for a wrong image name, a missing Secret or a full quota.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from kompressor_api.failures import ADVICE, ANEW, advice_for
from kompressor_api.names import Reason, Step
from kompressor_operator.endings import how_it_ended
from kompressor_operator.observed import ChildJob, Warned
from kompressor_operator.pods import CRASH_LOOP, Beside, ChildPod

LOST_AFTER = timedelta(seconds=15)
"""A kubelet removes a pod within seconds after its grace period; beyond this nobody is there to do it."""

IMAGE_REASONS = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
        "ImageInspectError",
        "RegistryUnavailable",
        "SignatureValidationFailed",
    }
)
START_REASONS = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "StartError"})

CREATION_REASONS = frozenset({"FailedCreate"})
MOUNT_REASONS = frozenset({"FailedMount", "FailedAttachVolume"})
"""Of warning events, the ones that are read."""

_SECRET = re.compile(r'\bsecret "[^"]+" not found|\bin Secret ')
_CLAIM = re.compile(r'persistentvolumeclaim "[^"]+" (not found|is being deleted)|unbound immediate PersistentVolumeClaims')
_BACK_OFF = re.compile(r'^Back-off pulling image "(?P<image>[^"]*)"(: \w+: )?')


@dataclass(frozen=True)
class Trouble:
    reason: Reason
    message: str


def lost(pod: ChildPod, now: datetime) -> Trouble | None:
    """A pod whose node does not answer, or that should be gone and is not. Kompressor never force-deletes it, since its process may
    still be writing; whoever knows that the node is dead must say so."""
    if pod.ended or not pod.node:
        return None
    overdue = pod.deletion_due is not None and now > pod.deletion_due + LOST_AFTER
    if not (overdue or pod.silent or pod.reason == "NodeLost"):
        return None
    return Trouble(
        Reason.NODE_LOST,
        f"pod {pod.name}: its node {pod.node} does not answer; {ADVICE[Reason.NODE_LOST]}",
    )


def due(pod: ChildPod, now: datetime) -> float | None:
    """Seconds after which a pod that is being deleted is overdue; None if it is not being deleted."""
    return None if pod.deletion_due is None else max(1.0, (pod.deletion_due + LOST_AFTER - now).total_seconds())


def start_trouble(pod: ChildPod) -> Trouble | None:
    """What keeps a pod from starting, as far as its own status tells: its worker's container, or one beside it."""
    own = _waits(pod.step, f"pod {pod.name}", "the image", pod.waiting_reason, pod.waiting_message)
    if own:
        return own
    if pod.beside:
        return _beside_trouble(pod, pod.beside)
    if pod.unschedulable:
        missing = _CLAIM.search(pod.unschedulable)  # no other node would do
        reason = Reason.VOLUME_NOT_MOUNTED if missing else Reason.UNSCHEDULABLE
        return _trouble(reason, pod.step, f"pod {pod.name}: {pod.unschedulable.rstrip('. ')}")
    return None


def end_trouble(pod: ChildPod) -> Trouble:
    """The worker has ended, and its pod has not, for a container that still runs."""
    assert pod.beside is not None and pod.terminated is not None
    said = f"pod {pod.name}: the worker has ended with exit code {pod.terminated.exit_code}, and {pod.beside.who} still runs"
    return _trouble(Reason.CONTAINER_LINGERS, pod.step, said)


def mount_trouble(pod: ChildPod, warnings: Sequence[Warned]) -> Trouble | None:
    """A volume that does not come, such as a caBundle whose ConfigMap is missing."""
    for warned in warnings:
        if warned.reason in MOUNT_REASONS:
            return _trouble(Reason.VOLUME_NOT_MOUNTED, pod.step, f"pod {pod.name}: {warned.message.strip()}")
    return None


def creation_trouble(job: ChildJob, warnings: Sequence[Warned], since: datetime) -> Trouble | None:
    """Why the Job controller cannot create a pod: quota, Pod Security, a service account that is not there."""
    for warned in warnings:
        if warned.reason not in CREATION_REASONS or warned.seen < since:
            continue
        said = f"Job {job.name}: {warned.message.strip()}"
        if "exceeded quota" in warned.message:
            return _trouble(Reason.QUOTA_EXCEEDED, job.step, said)
        if "failed quota" in warned.message:
            return Trouble(Reason.POD_REFUSED, f"{said}; {_unsaid(job.step)}")
        if "serviceaccount" in warned.message.lower():
            return Trouble(Reason.POD_REFUSED, f"{said}; create the account that spec.worker.serviceAccountName names")
        return _trouble(Reason.POD_REFUSED, job.step, said)
    return None


def _beside_trouble(pod: ChildPod, beside: Beside) -> Trouble | None:
    who = f"pod {pod.name}: {beside.who}"
    if beside.waiting_reason == CRASH_LOOP:
        return _trouble(Reason.CONTAINER_FAILED, pod.step, f"pod {pod.name}: {how_it_ended(beside)}")
    return _waits(pod.step, who, "its image", beside.waiting_reason, beside.waiting_message)


def _waits(step: Step, who: str, image: str, reason: str, said: str) -> Trouble | None:
    """A container that cannot be made."""
    text = said or reason
    if reason in IMAGE_REASONS:
        return _trouble(Reason.IMAGE_PULL_FAILED, step, f"{who}: {image} cannot be pulled: {_BACK_OFF.sub('', said) or text}")
    if reason not in START_REASONS:
        return None
    return _trouble(Reason.SECRET_MISSING if _SECRET.search(text) else Reason.CONTAINER_NOT_STARTED, step, f"{who}: {text}")


def _unsaid(step: Step) -> str:
    """A quota counts a resource that the pod does not name."""
    remedy = "give the namespace a LimitRange with a default for it, and the pod follows by itself"
    return f"{remedy}; or name it in spec.worker.resources, {ANEW}" if step is Step.COMPRESS else remedy


def _trouble(reason: Reason, step: Step, said: str) -> Trouble:
    return Trouble(reason, f"{said}; {advice_for(reason, step)}")
