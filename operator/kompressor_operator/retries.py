"""Which attempt comes next, from the Jobs alone. Pure."""

from __future__ import annotations

from kompressor_operator.decide import View
from kompressor_operator.endings import ending_of
from kompressor_operator.manifests import OUT_OF_MEMORY_CODES, Attempt

SMALLER_PLANS = 2
"""How often a job that ran out of memory goes on with a smaller memory plan."""


def next_attempt(view: View) -> Attempt | None:
    """The attempt that is due, from the Jobs alone; None while one goes on, or if none may follow."""
    job = view.observed.current
    if job is None:
        return Attempt(number=max(1, int(view.job.status.get("attempt") or 1)))
    if job.ended != "Failed":
        return None
    ending = ending_of(job, view.observed.pods_of(job))
    if ending.exit_code not in OUT_OF_MEMORY_CODES and not ending.out_of_memory:
        return None
    if job.ended_reason != "PodFailurePolicy":
        return None  # the Job used up its own retries
    counted = job.failures_before + job.failed
    if ending.out_of_memory:
        counted -= 1  # the one that ran out of memory has its own bound
        plan = job.memory_plan + 1
        return Attempt(job.attempt + 1, plan, max(0, counted)) if plan <= SMALLER_PLANS else None
    return Attempt(job.attempt + 1, job.memory_plan, counted) if counted <= view.job.retry_limit else None
