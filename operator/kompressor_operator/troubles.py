"""Early truth: why a pod does not run, read from its status and from the warnings about it, each with its remedy. Pure.

People should not have to hunt through pods and events for a wrong image name, a missing Secret or a full quota.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from kompressor_api.failures import ADVICE
from kompressor_api.names import Reason
from kompressor_operator.endings import how_it_ended
from kompressor_operator.observed import ChildJob, Warned
from kompressor_operator.pods import CRASH_LOOP, Beside, ChildPod

LOST_AFTER = timedelta(seconds=15)
"""A kubelet removes a pod within seconds after its grace period; beyond this nobody is there to do it."""

IMAGE_REASONS = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"})
START_REASONS = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "StartError"})

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


def start_trouble(pod: ChildPod) -> Trouble | None:
    """What keeps a pod from starting, as far as its own status tells: its worker's container, or one beside it."""
    own = _waits(f"pod {pod.name}", "the image", pod.waiting_reason, pod.waiting_message)
    if own:
        return own
    if pod.beside:
        return _beside_trouble(pod, pod.beside)
    if pod.unschedulable:
        return _trouble(Reason.UNSCHEDULABLE, f"pod {pod.name}: {pod.unschedulable.rstrip('. ')}")
    return None


def mount_trouble(pod: ChildPod, warnings: Sequence[Warned]) -> Trouble | None:
    """A volume that does not come, such as a caBundle whose ConfigMap is missing."""
    for warned in warnings:
        if warned.reason in ("FailedMount", "FailedAttachVolume"):
            return _trouble(Reason.VOLUME_NOT_MOUNTED, f"pod {pod.name}: {warned.message.strip()}")
    return None


def creation_trouble(job: ChildJob, warnings: Sequence[Warned], since: datetime) -> Trouble | None:
    """Why the Job controller cannot create a pod: quota, Pod Security, a service account that is not there."""
    for warned in warnings:
        if warned.reason != "FailedCreate" or warned.seen < since:
            continue
        said = f"Job {job.name}: {warned.message.strip()}"
        if "exceeded quota" in warned.message or "failed quota" in warned.message:
            return _trouble(Reason.QUOTA_EXCEEDED, said)
        if "serviceaccount" in warned.message.lower():
            return Trouble(Reason.POD_REFUSED, f"{said}; create the account that spec.worker.serviceAccountName names")
        return _trouble(Reason.POD_REFUSED, said)
    return None


def _beside_trouble(pod: ChildPod, beside: Beside) -> Trouble | None:
    if beside.waiting_reason == CRASH_LOOP:
        return _trouble(Reason.CONTAINER_FAILED, f"pod {pod.name}: {how_it_ended(beside)}")
    who = f"pod {pod.name}: {beside.who}"
    return _waits(who, "its image", beside.waiting_reason, beside.waiting_message)


def _waits(who: str, image: str, reason: str, said: str) -> Trouble | None:
    """A container that cannot be made."""
    text = said or reason
    if reason in IMAGE_REASONS:
        return _trouble(Reason.IMAGE_PULL_FAILED, f"{who}: {image} cannot be pulled: {_BACK_OFF.sub('', said) or text}")
    if reason not in START_REASONS:
        return None
    return _trouble(Reason.SECRET_MISSING if "secret" in text.lower() else Reason.CONTAINER_NOT_STARTED, f"{who}: {text}")


def _trouble(reason: Reason, said: str) -> Trouble:
    return Trouble(reason, f"{said}; {ADVICE[reason]}")
