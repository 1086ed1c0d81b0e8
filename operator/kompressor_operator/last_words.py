"""Pods that are gone and have decided how their Jobs end, kept until the CompressionJob has taken in what they said.

A pod that has ended may be collected at any moment: the controller manager does so where a cluster has more than 12,500 of them. Where
thousands of jobs come at once the operator may not have looked at its job by then, and the plan of a preflight or the reason of a failure
would be lost. Best effort: an operator that starts anew does not know them, and decides without.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kompressor_operator.endings import decides
from kompressor_operator.observed import ChildJob
from kompressor_operator.pods import ChildPod


@dataclass
class LastWords:
    _kept: dict[str, tuple[tuple[str, ChildPod], ...]] = field(default_factory=dict)
    """uid of the CompressionJob -> uid of the Job and its pod as it was last seen."""

    def keep(self, pod: ChildPod, job: ChildJob | None) -> None:
        """Of a pod that was deleted; `job` as it is now. A namesake's pods are older than it is."""
        if job is not None and not job.deleting and job.created <= pod.created and decides(pod):
            self._kept[pod.owner] = (*self._kept.get(pod.owner, ()), (job.uid, pod))

    def of(self, owner: str, jobs: Iterable[ChildJob]) -> list[ChildPod]:
        """Those of these Jobs."""
        there = {job.uid for job in jobs}
        return [pod for job, pod in self._kept.get(owner, ()) if job in there]

    def forget(self, owner: str) -> None:
        self._kept.pop(owner, None)

    def forget_all_but(self, owners: Iterable[str]) -> None:
        wanted = set(owners)
        self._kept = {owner: kept for owner, kept in self._kept.items() if owner in wanted}
