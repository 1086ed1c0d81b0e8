"""The preflight as a table: when it is due, what each of its ends leads to, and what Validated says meanwhile."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from kcj_builders import NOW, SETTINGS, ago, child, condition, failed, judge, kcj, pod

from kompressor_api.names import Reason, Step
from kompressor_operator import manifests
from kompressor_operator.conditions import Phase, conditions, events
from kompressor_operator.decide import CONFIRM, Decision
from kompressor_operator.object_meta import stamp
from kompressor_operator.observed import ChildJob, CompressionJob
from kompressor_operator.planner import preflight_job
from kompressor_operator.pods import ChildPod

PLAN = {"sourceBytes": 400, "outputBytes": 100, "ratio": "4.00x", "hostMemoryBytes": 3 << 30, "seconds": 60, "units": 4, "warnings": []}
VALID = json.dumps({"reason": "Valid", "message": "writes 100 B, needs 3 GiB, takes about 1 min", "exitCode": 0, "summary": PLAN})
ALREADY = json.dumps({"reason": "AlreadyCompressed", "message": "s3://x holds it", "exitCode": 0, "summary": {"ratio": "4.0x"}})
TOLD = {"observedGeneration": 1, "conditions": [condition("Ready", "False", reason="Preflight")]}


def job(status: dict[str, Any] | None = None, **spec: Any) -> CompressionJob:
    return kcj(status=status, **({"preflight": None} | spec))


def looking(**fields: Any) -> ChildJob:
    return child(0, **({"name": "llama-preflight", "uid": "job-0", "step": Step.PREFLIGHT} | fields))


def planner(**fields: Any) -> ChildPod:
    return pod(0, **({"job": "llama-preflight", "step": Step.PREFLIGHT} | fields))


def done(**fields: Any) -> ChildJob:
    return looking(**({"ended": "Complete", "ended_at": stamp(ago(1))} | fields))


def validated(about: CompressionJob, decision: Decision) -> tuple[str, str, str]:
    assert decision.verdict
    (found,) = [c for c in conditions(about, decision.verdict, NOW) if c["type"] == "Validated"]
    return found["status"], found["reason"], found["message"]


def test_it_comes_first_with_what_it_needs_and_says_nothing_yet() -> None:
    decision = judge(job())
    assert [c["kind"] for c in decision.create] == ["ConfigMap", "Role", "ServiceAccount", "Job"]
    assert decision.create[-1]["metadata"]["labels"]["kompressor.io/step"] == "preflight"
    assert decision.start is None and decision.verdict is None and decision.dry_run is None and decision.again_after == 5
    assert len(judge(job(preflight="Job")).create) == 4, "it is the default, which no CRD writes into the spec"
    resumed = judge(job(TOLD))
    assert resumed.verdict and resumed.verdict.phase is Phase.VALIDATING, "what was told before must not stand"


def test_an_engine_is_looked_for_in_the_image_that_would_have_it() -> None:
    """Only there can be seen that it is missing; all other preflights run in the planner's."""
    settings = replace(SETTINGS, planner_image="slim:1")
    evaluation: dict[str, Any] = {"dataset": {"uri": "s3://data/a"}}
    for asked, image in (({}, "slim:1"), ({"runtime": {"engine": "vllm"}}, "served:1")):
        made = preflight_job(job(worker={"image": "served:1"}, evaluation=evaluation | asked), settings)
        assert made["spec"]["template"]["spec"]["containers"][0]["image"] == image


@pytest.mark.parametrize("about", [kcj(preflight="Skip"), job({"jobName": "llama-1"}), job({"plan": PLAN})])
def test_it_is_skipped_or_over(about: CompressionJob) -> None:
    decision = judge(about)
    assert decision.start is not None and decision.create == ()


def test_it_never_follows_a_worker() -> None:
    assert judge(job({"jobName": "llama-1"}), child(), pod()).create == ()
    assert judge(job(), child(), pod()).create == (), "a worker that nobody has told of yet"


def test_while_it_looks() -> None:
    assert judge(job(), looking(created=ago(1)), planner(created=ago(1))) == Decision(again_after=4)
    decision = judge(job(), looking(created=ago(6)), planner(created=ago(6)))
    assert decision.verdict and (decision.verdict.phase, decision.verdict.reason) == (Phase.VALIDATING, Reason.PREFLIGHT)
    assert validated(job(), decision)[:2] == ("Unknown", "Preflight") and events(job(), decision.verdict) == []
    assert judge(job(), looking(deleting=True)).create == (), "the next one has the same name"


@pytest.mark.parametrize(
    ("pods", "reason"),
    [
        ([planner(phase="Pending", waiting_reason="ImagePullBackOff")], "ImagePullFailed"),
        (
            [planner(phase="Pending", waiting_reason="CreateContainerConfigError", waiting_message='secret "models" not found')],
            "SecretMissing",
        ),
        ([planner(phase="Pending", unschedulable="0/1 nodes", node="")], "Unschedulable"),
        ([planner(exit=74, said=json.dumps({"reason": "StorageFailed", "message": "no answer"}))], "Retrying"),
    ],
)
def test_what_is_in_its_way_is_told_at_once_and_validated_is_open(pods: list[ChildPod], reason: str) -> None:
    decision = judge(job(), looking(created=ago(1), failed=int(reason == "Retrying")), *pods)
    assert decision.verdict and decision.verdict.reason == reason and decision.start is None
    assert validated(job(), decision)[0] == "Unknown" and "jobName" not in decision.verdict.facts


@pytest.mark.parametrize(
    ("pods", "warning", "advice", "never"),
    [
        ([planner(phase="Pending", waiting_reason="ErrImagePull")], "", "the operator's planner.image", "spec.worker.image or"),
        ([planner(phase="Pending", unschedulable="0/1 nodes", node="")], "", "spec.worker.tolerations", "nodeSelector"),
        ([], 'pods "x" is forbidden: exceeded quota: pods', "raise it", "spec.worker"),
        ([], 'pods "x" is forbidden: failed quota: cpu: must specify limits.cpu for: worker', "LimitRange", "spec.worker"),
    ],
)
def test_no_remedy_that_is_the_workers_alone(pods: list[ChildPod], warning: str, advice: str, never: str) -> None:
    """Its pod takes no more of spec.worker than tolerations and, where the planner has no image of its own, the image."""
    decision = judge(job(), looking(), *pods, warnings=[("FailedCreate", warning)] if warning else None)
    assert decision.verdict and advice in decision.verdict.message and never not in decision.verdict.message


def test_a_valid_plan_starts_the_worker_in_the_same_step() -> None:
    decision = judge(job(), done(), planner(exit=0, said=VALID))
    assert decision.start and decision.start.plan == PLAN and decision.verdict
    assert decision.verdict.facts["plan"] == PLAN and decision.verdict.facts["jobName"]
    assert validated(job(), decision) == ("True", "Valid", "writes 100 B, needs 3 GiB, takes about 1 min")
    assert events(job(), decision.verdict) == []
    body = manifests.worker_job(job(), decision.start, SETTINGS)
    limits = body["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"memory": "3840Mi"}
    again = manifests.worker_job(job({"plan": PLAN}), manifests.Attempt(2), SETTINGS)
    assert again["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"] == limits, "a later attempt reads it from the status"


def test_a_start_that_was_never_told_tells_the_plan_too() -> None:
    """Killed between the worker's Job and the status."""
    decision = judge(job(), done(), planner(exit=0, said=VALID), child(created=ago(1)))
    assert decision.verdict and decision.verdict.facts["plan"] == PLAN and decision.start and decision.start.plan == PLAN


def test_less_memory_than_planned_is_a_warning_once() -> None:
    about = job(worker={"resources": {"limits": {"memory": "1Gi"}}})
    decision = judge(about, done(), planner(exit=0, said=VALID))
    assert decision.start and decision.verdict and "1Gi of memory, and the plan estimates 3.0Gi" in validated(about, decision)[2]
    (event,) = events(about, decision.verdict)
    assert event.warning and event.reason == "ResourcesBelowPlan"
    stored = conditions(about, decision.verdict, NOW)
    later = replace(about, status={"conditions": stored, "jobName": "llama-1", "plan": PLAN})
    running = judge(later, child(), pod())
    assert running.verdict and validated(later, running)[2] == validated(about, decision)[2], "it stays for the rest of the job's life"
    assert [e.reason for e in events(later, running.verdict)] == ["Compressing"]


def test_a_result_that_is_there_ends_it_without_a_worker() -> None:
    decision = judge(job(), done(), planner(exit=0, said=ALREADY))
    assert decision.start is None and decision.verdict
    verdict = decision.verdict
    assert (verdict.phase, verdict.reason, verdict.facts["result"]) == (Phase.COMPLETE, "AlreadyCompressed", {"ratio": "4.0x"})
    assert "jobName" not in verdict.facts and validated(job(), decision)[0] == "True"


@pytest.mark.parametrize(
    ("ended", "code", "reason", "words"),
    [
        ("PodFailurePolicy", 64, "AccessDenied", "no such key"),
        ("BackoffLimitExceeded", 74, "AccessDenied", "gave up after 5 failures"),
        ("BackoffLimitExceeded", 137, "OutOfMemory", "more than its 1Gi of memory; with spec.preflight: Skip"),
    ],
)
def test_an_end_that_is_final(ended: str, code: int, reason: str, words: str) -> None:
    said = "" if code == 137 else json.dumps({"reason": "AccessDenied", "message": "no such key", "exitCode": code})
    over = looking(ended="Failed", ended_reason=ended, failed=5, ended_at=stamp(ago(1)))
    last = planner(exit=code, said=said, killed="OOMKilled" if code == 137 else "Error")
    assert judge(job(), over, last, live=False) == CONFIRM
    decision = judge(job(), over, last)
    assert decision.verdict and (decision.verdict.phase, decision.verdict.reason) == (Phase.FAILED, reason)
    assert words in decision.verdict.message and decision.start is None
    assert validated(job(), decision)[:2] == ("False", reason)


def test_an_outcome_that_nobody_heard_is_worked_out_again() -> None:
    assert judge(job(), done(), live=False) == Decision(again_after=1), "its pod is told within moments"
    late = done(ended_at=stamp(ago(10)))
    assert judge(job(), late, live=False) == CONFIRM
    assert judge(job(), late).deletes == (late,)
    silent = judge(job(), late, planner(exit=0))
    assert silent.start and silent.verdict and "plan" not in silent.verdict.facts, "an image that says nothing is not asked again"


def test_a_suspended_job_says_that_nobody_has_looked() -> None:
    decision = judge(job(suspend=True))
    assert decision.create == () and validated(job(suspend=True), decision)[0] == "Unknown"


def test_podtemplate_is_judged_before_anything_is_made() -> None:
    template = {"spec": {"priorityClassName": "high"}}
    for about in (job(worker={"podTemplate": template}), kcj(worker={"podTemplate": template})):
        decision = judge(about)
        assert decision.dry_run and decision.dry_run.number == 1
    later = kcj(worker={"podTemplate": template}, status={"jobName": "llama-1", "attempt": 1})
    retry = judge(later, failed(), pod(exit=71), pod(exit=71))
    assert retry.dry_run is None, "it was judged once, and a Job's template cannot change"
