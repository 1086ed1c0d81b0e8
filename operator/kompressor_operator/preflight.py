"""A small Job that looks at everything before the worker's is created, and what follows from what it says. Pure.

It is due until a worker's Job is there or the status has its plan, so that nothing is remembered: an outcome that was lost on the way is
worked out again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import wraps
from typing import Any

from pydantic import ValidationError

from kompressor_api.names import Condition, Reason
from kompressor_api.v1alpha1 import PlanStatus
from kompressor_operator.conditions import Event, Phase, Verdict
from kompressor_operator.decide import CONFIRM, Decision, Policy, View
from kompressor_operator.endings import Ending, ending_of
from kompressor_operator.facts import result_of
from kompressor_operator.manifests import spec_digest, supports
from kompressor_operator.object_meta import moment, stamp
from kompressor_operator.observed import ChildJob
from kompressor_operator.planner import MEMORY_LIMIT, preflight_job
from kompressor_operator.pod_template import overlay_of
from kompressor_operator.progress import running
from kompressor_operator.resources import below_plan
from kompressor_operator.retries import next_attempt

QUIET_SECONDS = 5.0
"""It usually takes less, and then it is no status of its own."""
POD_SECONDS = 2.0
"""From the end of the Job until its pod's is told too."""
ON_THE_WAY = (Reason.PENDING, Reason.COMPRESSING)


def preflight(view: View) -> Decision | None:
    """Run it, tell how it is doing, and end what cannot work or is done already. What is fine is left to the start."""
    job, status = view.observed.preflight, view.job.status
    if not view.job.preflight or view.observed.jobs or status.get("jobName") or status.get("plan"):
        return None
    if job is None:
        return _begin(view)
    if job.deleting:
        return Decision(verdict=_checking(view, f"preflight Job {job.name} is being deleted, and runs again when it is gone"))
    if not job.ended:
        return _looking(view, job)
    return _complete(view, job) if job.ended == "Complete" else _failed(view, job)


def with_plan(policy: Policy) -> Policy:
    """A policy whose first start also tells the plan, asks for what it says, and has podTemplate judged where no preflight did."""

    @wraps(policy)
    def told(view: View) -> Decision | None:
        decision = policy(view)
        if decision is None or decision.start is None or decision.verdict is None:
            return decision
        attempt, verdict = decision.start, decision.verdict
        facts = dict(verdict.facts) | ({"recipe": view.recipe} if view.recipe else {})
        if plan := _found(view):
            ending, attempt = plan[0], replace(attempt, plan=plan[1])
            warning = below_plan(view.told.spec, plan[1])
            note = Event(True, Reason.RESOURCES_BELOW_PLAN, warning) if warning else None
            message = "; ".join(part for part in (ending.message, warning) if part)
            verdict = replace(verdict, validated_message=message, note=note)
            facts["plan"] = plan[1]
        judged = view.observed.preflight or view.observed.jobs or view.job.status.get("jobName")
        dry_run = attempt if overlay_of(view.told.spec) and not judged else None
        return replace(decision, start=attempt, dry_run=dry_run, verdict=replace(verdict, facts=facts))

    return told


def _begin(view: View) -> Decision:
    """podTemplate is judged first, as part of the worker's Job: what is wrong with it should not wait for the preflight."""
    job = view.told
    children = (*supports(job, config=view.resolved is None), preflight_job(job, view.settings))
    dry_run = next_attempt(view) if overlay_of(job.spec) else None
    verdict = _checking(view) if view.job.condition(Condition.READY) else None
    return Decision(dry_run=dry_run, create=children, verdict=verdict, again_after=QUIET_SECONDS)


def _looking(view: View, job: ChildJob) -> Decision:
    """As a worker's Job that goes on, in other words: what is in its way is told in the same."""
    decision = running(view, job, (), {})
    verdict, age = decision.verdict, (view.now - job.created).total_seconds()
    if verdict is None:
        return decision
    if job.suspended:
        return replace(decision, verdict=_checking(view, f"preflight Job {job.name} is kept suspended by something else"))
    stopped = verdict.reason == Reason.RETRYING and not job.failed
    if verdict.reason not in ON_THE_WAY and not stopped:
        return decision
    if 0 <= age < QUIET_SECONDS and not view.job.condition(Condition.READY):
        return Decision(again_after=QUIET_SECONDS - age)
    return replace(decision, verdict=_checking(view))


def _complete(view: View, job: ChildJob) -> Decision | None:
    ending = ending_of(job, view.observed.pods_of(job))
    if ending.reason == Reason.ALREADY_COMPRESSED:
        facts = _facts(view, job) | {"progress": {"percent": 100}, "result": result_of(ending.summary)}
        message = ending.message or f"{view.job.spec['output']['uri']} already holds this result"
        return Decision(verdict=Verdict(Phase.COMPLETE, Reason.ALREADY_COMPRESSED, message, facts=facts))
    if ending.summary or any(pod.phase == "Succeeded" for pod in view.observed.pods_of(job)):
        return None
    if view.observed.live:
        return Decision(deletes=(job,))  # its pod is gone, and what it said: once more
    since = (view.now - moment(job.ended_at)).total_seconds()
    return Decision(again_after=POD_SECONDS - since) if 0 <= since < POD_SECONDS else CONFIRM


def _failed(view: View, job: ChildJob) -> Decision:
    if not view.observed.live:
        return CONFIRM  # the pod that decided may not have reached us yet
    ending = ending_of(job, view.observed.pods_of(job))
    facts, message = _facts(view, job), ending.message
    if ending.summary:
        facts["result"] = result_of(ending.summary)  # what a gate measures of a result that is there already
    if ending.out_of_memory:
        message = f"the preflight needs more than its {MEMORY_LIMIT} of memory; with spec.preflight: Skip the worker looks for itself"
    elif job.ended_reason == "BackoffLimitExceeded":
        message = f"the preflight gave up after {job.failed} failures (spec.retry.limit {view.job.retry_limit}): {message}"
    return Decision(verdict=Verdict(Phase.FAILED, ending.reason, message, validated=False, facts=facts))


def _facts(view: View, job: ChildJob) -> dict[str, Any]:
    """Of a job that ends without a worker."""
    return {
        "startTime": stamp(job.created),
        "completionTime": job.ended_at or stamp(view.now),
        "specDigest": spec_digest(view.told.spec),
        "recipe": view.recipe,
    }


def _checking(view: View, message: str = "the preflight Job looks at source, data and passes") -> Verdict:
    return Verdict(Phase.VALIDATING, Reason.PREFLIGHT, message, validated=None, facts={"recipe": view.recipe})


def _found(view: View) -> tuple[Ending, dict[str, Any]] | None:
    """How the preflight ended and its plan, while the status does not have it."""
    job = view.observed.preflight
    if job is None or job.ended != "Complete" or view.job.status.get("plan"):
        return None
    ending = ending_of(job, view.observed.pods_of(job))
    plan = _plan_of(ending.summary)
    return (ending, plan) if plan else None


def _plan_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of status.plan; nothing if one of them does not fit the schema, which an older worker's may not."""
    known = {name: summary[name] for name in PlanStatus.model_fields if name in summary}
    try:
        return PlanStatus.model_validate(known).model_dump(exclude_none=True)
    except ValidationError:
        return {}
