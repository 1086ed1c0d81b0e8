"""Pods that train together: an Indexed Job, and a headless Service by whose name they find the first of them. Pure.

Pod 0 leads: it alone publishes, and when it succeeds the Job has. The others meet it at `<its host name>.<the Service>`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from kompressor_api import names
from kompressor_api.pod import accelerators
from kompressor_api.worker import trains
from kompressor_operator.observed import Manifest
from kompressor_operator.pods import ChildPod
from kompressor_operator.troubles import lost, start_trouble

__all__ = ["LEADER", "environment", "foremost", "indexed", "pods_in", "service_name", "service_spec"]

LEADER = 0
"""Index of the pod that leads."""
FAILURES_OF_ONE = 100
"""More than `retry.limit` can be, so that the limit on all pods together decides. It is set at all for the pause before a pod's next run,
which then doubles by the failures of that pod alone: else those of a group of eight that fail at once would make it wait ten minutes."""


def pods_in(spec: Mapping[str, Any]) -> int:
    """Pods that work at once, by the spec of a CompressionJob."""
    return int((spec.get("worker") or {}).get("parallelism") or 1)


def indexed(pods: int) -> Manifest:
    """What the Job of a group has beside parallelism and completions. Whoever follows ends when there is nothing left to train."""
    return {
        "completionMode": "Indexed",
        "backoffLimitPerIndex": FAILURES_OF_ONE,
        "successPolicy": {"rules": [{"succeededIndexes": str(LEADER)}]},
    }


def service_name(stem: str) -> str:
    """A Service's name begins with a letter, where a job's may begin with a digit."""
    return stem if stem[0].isalpha() else f"k-{stem}"


def service_spec(selector: Mapping[str, str]) -> Manifest:
    """Names for pods, no address of its own. Those that are not ready have names too: they find one another before they are."""
    return {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": dict(selector),
        "ports": [{"name": "group", "port": names.GROUP_PORT}],
    }


def environment(spec: Mapping[str, Any], job_name: str, service: str, resources: Mapping[str, Any]) -> dict[str, str]:
    """What a worker is told of its group, and of the processes that are its own to start."""
    told: dict[str, str] = {}
    if (pods := pods_in(spec)) > 1:
        told |= {names.ENV_PODS: str(pods), names.ENV_LEADER: f"{job_name}-{LEADER}.{service}", names.ENV_PORT: str(names.GROUP_PORT)}
    if trains(spec.get("passes") or ()):
        own = (spec.get("worker") or {}).get("processesPerPod")
        told[names.ENV_PROCESSES_PER_POD] = str(own or max(1, accelerators({"resources": resources})))
    return told


def foremost(pods: Iterable[ChildPod], now: datetime) -> ChildPod:
    """Of the pods that there are, the one to be told about: of each index the newest, of these the one that is worst off."""
    newest = {pod.index: pod for pod in sorted(pods, key=lambda pod: (pod.created, pod.name))}

    def rank(pod: ChildPod) -> int:
        waits = pod.phase == "Pending"
        worse = (lost(pod, now), pod.ended, waits and start_trouble(pod), pod.deletion_due is not None, waits)
        return next((place for place, true in enumerate(worse) if true), len(worse))

    return min(newest.values(), key=lambda pod: (rank(pod), pod.index))
