"""What a job has used of GPUs, by its pods. Pure."""

from __future__ import annotations

from dataclasses import replace

from kompressor_operator.conditions import Phase, Verdict
from kompressor_operator.decide import View
from kompressor_operator.object_meta import moment
from kompressor_operator.pods import ChildPod


def with_usage(view: View, verdict: Verdict) -> Verdict:
    """The same verdict; an end of a job whose workers asked for GPUs also says for how many seconds they had them."""
    if verdict.phase not in (Phase.COMPLETE, Phase.FAILED) or view.job.finished:
        return verdict
    seconds = sum(job.gpus * _ran(pod) for job in view.observed.jobs for pod in view.observed.pods_of(job) if job.gpus)
    return replace(verdict, facts={**verdict.facts, "gpuSeconds": round(seconds)}) if seconds else verdict


def _ran(pod: ChildPod) -> float:
    """Seconds that its container ran; waiting for a node or an image holds no GPU."""
    ended = pod.terminated
    if ended is None or not ended.started_at or not ended.finished_at:
        return 0.0
    return max(0.0, (moment(ended.finished_at) - moment(ended.started_at)).total_seconds())
