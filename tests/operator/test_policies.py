"""The life of a CompressionJob as a table: what is seen, and what is decided."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from kcj_builders import NOW, SPEC, ago, child, complete, condition, ended_status, failed, judge, kcj, pod

from kompressor_api.names import Step
from kompressor_operator.conditions import Phase
from kompressor_operator.decide import Decision, JobPatch
from kompressor_operator.manifests import Attempt
from kompressor_operator.object_meta import stamp

FINAL = json.dumps({"reason": "CorruptSource", "message": "model-2.safetensors: truncated", "exitCode": 65})
SUMMARY = json.dumps(
    {"reason": "Completed", "message": "3.6x smaller", "exitCode": 0, "summary": {"ratio": "3.6x", "outputBytes": 7, "junk": 1}}
)


def said(decision: Decision) -> tuple[str, str]:
    assert decision.verdict is not None
    return decision.verdict.phase, decision.verdict.reason


def message(decision: Decision) -> str:
    assert decision.verdict is not None
    return decision.verdict.message


# ---- the beginning


def test_a_new_job_starts_at_once_without_asking_again() -> None:
    decision = judge(kcj(), live=False)
    assert decision.start == Attempt(1)
    assert said(decision) == ("Pending", "Pending")
    assert decision.verdict and decision.verdict.facts["attempt"] == 1
    assert decision.verdict.facts["specDigest"].startswith("sha256:")


def test_a_job_that_once_had_a_child_starts_nothing_before_the_api_server_was_asked() -> None:
    job = kcj(status={"jobName": "llama-1", "attempt": 1})
    assert judge(job, live=False) == Decision(confirm=True)
    assert judge(job, live=True).start == Attempt(1)


def test_a_job_that_was_deleted_comes_back_under_its_number() -> None:
    """The same name for every operator that notices it, so that two of them make one Job."""
    assert judge(kcj(status={"jobName": "llama-3", "attempt": 3})).start == Attempt(3)


@pytest.mark.parametrize("children", [[], [child()], [failed(), pod(exit=71)], [complete()]])
def test_a_job_that_is_being_deleted_is_left_alone(children: list[object]) -> None:
    assert judge(kcj(deleting=True), *children) == Decision()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ({"output": {"uri": "file:///tmp/x"}}, "spec.output.uri: file:///tmp/x"),
        ({"passes": [{"rtn": {"groupsize": 64}}]}, "did you mean groupSize?"),
        ({"passes": [{"rnt": {}}]}, "did you mean rtn?"),
        ({"outputs": {}}, "did you mean output?"),
        ({"passes": None}, "spec: give either passes, recipeRef or target"),
    ],
)
def test_an_invalid_spec_fails_at_once_for_good(spec: dict[str, object], named: str) -> None:
    decision = judge(kcj(**spec), live=False)
    assert decision.start is None
    assert said(decision) == ("Failed", "InvalidSpec")
    assert decision.verdict and not decision.verdict.validated and decision.verdict.facts["completionTime"]
    assert named in message(decision)


def test_a_spec_that_an_older_operator_accepted_goes_on() -> None:
    assert said(judge(kcj(outputs={}), child(), pod())) == ("Compressing", "Compressing")
    assert judge(kcj(outputs={}, status={"jobName": "llama-1", "attempt": 1})).start == Attempt(1)


def test_a_start_that_was_never_told_is_finished() -> None:
    """The Job is made beside the RoleBinding: whoever dies in between leaves a Job whose worker cannot report."""
    assert judge(kcj(), child(memory_plan=1, failures_before=2), pod(), live=False).start == Attempt(1, 1, 2)
    assert judge(kcj(status={"jobName": "llama-1"}), child(), pod(), live=False).start is None
    suspended = judge(kcj(suspend=True), child(suspended=True), live=False)
    assert suspended.verdict and "jobName" not in suspended.verdict.facts


# ---- the end


def test_complete_with_the_summary_of_the_pod() -> None:
    decision = judge(kcj(), complete(), pod(exit=0, said=SUMMARY), live=False)
    assert said(decision) == ("Complete", "Completed")
    assert decision.verdict and decision.verdict.facts["result"] == {"ratio": "3.6x", "outputBytes": 7}
    assert decision.verdict.facts["progress"] == {"percent": 100}
    assert message(decision) == "3.6x smaller"


def test_a_result_that_the_worker_pushed_itself_stays() -> None:
    decision = judge(kcj(status={"result": {"ratio": "9x"}}), complete(), live=False)
    assert decision.verdict and "result" not in decision.verdict.facts
    assert SPEC["output"]["uri"] in message(decision)


def test_complete_without_a_word_from_the_pod_is_looked_up_once_and_believed() -> None:
    assert judge(kcj(), complete(), live=False).confirm
    assert said(judge(kcj(), complete(), live=True)) == ("Complete", "Completed")


def test_a_summary_that_does_not_fit_the_schema_is_left_out() -> None:
    decision = judge(kcj(), complete(), pod(exit=0, said=json.dumps({"summary": {"outputBytes": "many"}})))
    assert decision.verdict and decision.verdict.facts["result"] is None


def test_a_gate_that_was_not_met_leaves_what_was_measured() -> None:
    gates = [{"metric": "kl", "value": "0.08", "limit": "0.05", "met": False}]
    told = {"reason": "GateFailed", "message": "0.08 nats", "summary": {"kl": "0.08", "perplexityAfter": "8.1", "gates": gates}}
    decision = judge(kcj(), failed(), pod(exit=67, said=json.dumps(told)))
    assert said(decision) == ("Failed", "GateFailed")
    assert decision.verdict and decision.verdict.facts["result"] == told["summary"]
    pushed = judge(kcj(status={"result": {"kl": "0.08"}}), failed(), pod(exit=67, said=json.dumps(told)))
    assert pushed.verdict and "result" not in pushed.verdict.facts


def test_already_compressed_is_said() -> None:
    decision = judge(kcj(), complete(), pod(exit=0, said=json.dumps({"reason": "AlreadyCompressed", "message": "same digest"})))
    assert said(decision) == ("Complete", "AlreadyCompressed")


def test_a_final_exit_code_fails_with_the_workers_own_words() -> None:
    assert judge(kcj(), failed(), pod(exit=65, said=FINAL), live=False).confirm
    decision = judge(kcj(), failed(), pod(exit=65, said=FINAL))
    assert said(decision) == ("Failed", "CorruptSource")
    assert message(decision).startswith("model-2.safetensors: truncated; upload the checkpoint again")
    assert decision.start is None


@pytest.mark.parametrize("kind", ["Complete", "Failed"])
@pytest.mark.parametrize("children", [[], [failed(), pod(exit=71)], [complete(ttl=5)], [child()]])
def test_a_terminal_job_never_gets_another_job(kind: str, children: list[object]) -> None:
    decision = judge(kcj(status=ended_status(kind)), *children, live=False)  # type: ignore[arg-type]
    assert decision == Decision(keep_generation=True)


def test_ttl_is_written_only_after_the_end_is_stored() -> None:
    ttl = {"ttlSecondsAfterFinished": 60}
    for children in ((child(),), (child(), pod()), (complete(), pod(exit=0, said=SUMMARY))):
        assert judge(kcj(**ttl), *children).patches == ()
    stored = judge(kcj(status=ended_status(), **ttl), failed(1), complete(2))
    assert stored.patches == (JobPatch("llama-1", ttl), JobPatch("llama-2", ttl))
    assert judge(kcj(status=ended_status(), **ttl), complete(ttl=60)).patches == ()


def test_a_ttl_that_comes_later_reaches_the_preflights_job_too() -> None:
    """But not below its own shortest, and not over and over."""

    def patched(spec_ttl: int, **fields: Any) -> tuple[JobPatch, ...]:
        looked = child(**({"name": "llama-preflight", "step": Step.PREFLIGHT, "ended": "Complete"} | fields))
        return judge(kcj(status=ended_status(), ttlSecondsAfterFinished=spec_ttl), looked, complete(ttl=spec_ttl)).patches

    for ttl, kept in ((60, 3600), (7200, 7200)):
        assert patched(ttl) == (JobPatch("llama-preflight", {"ttlSecondsAfterFinished": kept}),)
        assert patched(ttl, ttl=kept) == ()
    assert patched(60, ended="") == () and patched(60, deleting=True) == ()


def test_a_ttl_of_zero_is_a_ttl() -> None:
    assert judge(kcj(status=ended_status(), ttlSecondsAfterFinished=0), complete()).patches


# ---- retries


def test_out_of_memory_goes_on_smaller_twice_and_no_more() -> None:
    first = judge(kcj(), failed(1), pod(1, exit=71))
    assert first.start == Attempt(2, memory_plan=1)
    assert said(first) == ("Retrying", "Retrying") and "smaller memory plan, step 1" in message(first)
    second = judge(kcj(), failed(1), pod(1, exit=71), failed(2, memory_plan=1), pod(2, exit=137, killed="OOMKilled"))
    assert second.start == Attempt(3, memory_plan=2)
    last = judge(kcj(), failed(3, memory_plan=2), pod(3, exit=137, killed="OOMKilled"))
    assert last.start is None
    assert said(last) == ("Failed", "OutOfMemory")
    assert "spec.worker.resources.limits.memory" in message(last)


def test_out_of_memory_does_not_count_but_earlier_failures_of_the_same_job_do() -> None:
    assert judge(kcj(), failed(1, failed=3, failures_before=1), pod(exit=71)).start == Attempt(2, memory_plan=1, failures_before=3)


def test_killed_but_not_for_memory_counts_against_the_limit() -> None:
    assert judge(kcj(), failed(1, failed=2, ended_at=stamp(ago(20))), pod(exit=137)).start == Attempt(2, failures_before=2)
    decision = judge(kcj(), failed(2, failures_before=4, failed=1), pod(2, exit=137))
    assert decision.start is None
    assert said(decision) == ("Failed", "WorkerCrashed")
    assert "gave up after 5 failures (spec.retry.limit 4)" in message(decision)


def test_the_next_attempt_waits_for_the_api_servers_word() -> None:
    assert judge(kcj(), failed(), pod(exit=71), live=False) == Decision(confirm=True)


def test_the_history_is_in_the_jobs_alone() -> None:
    """Whatever the status claims: attempt, plan and count come from the newest Job."""
    job = kcj(status={"attempt": 9, "retries": 9, "jobName": "llama-9"})
    assert judge(job, failed(2, memory_plan=1, failures_before=3), pod(2, exit=71)).start == Attempt(3, 2, 3)


def test_retries_used_up_in_place_is_the_end_with_the_last_pods_reason() -> None:
    storage = json.dumps({"reason": "StorageFailed", "message": "s3://models: no answer; check the endpoint"})
    decision = judge(
        kcj(), failed(reason="BackoffLimitExceeded", failed=5), pod(suffix="a", exit=1, at=ago(30)), pod(suffix="b", exit=74, said=storage)
    )
    assert said(decision) == ("Failed", "StorageFailed")
    assert message(decision).startswith("gave up after 5 failures (spec.retry.limit 4): s3://models: no answer; check the endpoint; ")


def test_a_changed_limit_reaches_the_running_job() -> None:
    decision = judge(kcj(retry={"limit": 9}), child(failures_before=2), pod())
    assert decision.patches == (JobPatch("llama-1", {"backoffLimit": 7}),)
    assert judge(kcj(retry={"limit": 1}), child(failures_before=2, backoff_limit=0), pod()).patches == ()


def test_never_two_at_once_a_pod_of_before_is_awaited() -> None:
    decision = judge(kcj(), failed(), pod(exit=71), pod(suffix="b", deletion_due=NOW + timedelta(seconds=20)))
    assert decision.start is None and said(decision) == ("Pending", "Pending")
    lost = judge(kcj(), failed(), pod(exit=71), pod(suffix="b", deletion_due=ago(60)))
    assert lost.start is None and said(lost) == ("Retrying", "NodeLost")
    orphan = judge(kcj(status={"jobName": "llama-1", "attempt": 1}), pod())
    assert orphan.start is None


def test_a_job_that_is_being_deleted_is_awaited() -> None:
    decision = judge(kcj(), child(deleting=True), pod())
    assert decision.start is None and "is being deleted" in message(decision)


# ---- suspend


def test_suspended_before_the_start_creates_nothing() -> None:
    decision = judge(kcj(suspend=True))
    assert decision.start is None and decision.patches == ()
    assert said(decision) == ("Suspended", "Suspended")


def test_suspend_and_resume_toggle_the_jobs_own_field() -> None:
    stored = {"conditions": [condition("Suspended")]}
    assert judge(kcj(suspend=True, status=stored), child(), pod()).patches == (JobPatch("llama-1", {"suspend": True}),)
    assert judge(kcj(suspend=True, status=stored), child(suspended=True)).patches == ()
    assert judge(kcj(suspend=False, status=stored), child(suspended=True)).patches == (JobPatch("llama-1", {"suspend": False}),)


def test_suspension_is_stored_before_the_job_is_touched() -> None:
    """The stored condition proves who suspended a Job; if it came after, a crash in between would leave the Job to nobody."""
    decision = judge(kcj(suspend=True), child(), pod())
    assert decision.patches == () and said(decision) == ("Suspended", "Suspended")


@pytest.mark.parametrize("status", [{}, {"conditions": [condition("Suspended", "False")]}])
def test_what_something_else_suspends_is_not_fought_over(status: dict[str, object]) -> None:
    decision = judge(kcj(status=status), child(suspended=True))
    assert decision.patches == () and said(decision) == ("Queued", "Queued")


def test_a_queued_job_is_its_queues() -> None:
    decision = judge(kcj(queueName="gpu", status={"conditions": [condition("Suspended")]}), child(suspended=True, queue="gpu"))
    assert decision.patches == () and said(decision) == ("Queued", "Queued")


def test_suspended_while_an_attempt_is_due_starts_it_only_after_resume() -> None:
    assert judge(kcj(suspend=True), failed(), pod(exit=71)).start is None
    assert judge(kcj(suspend=False), failed(), pod(exit=71)).start == Attempt(2, memory_plan=1)


def test_an_end_is_an_end_also_while_suspended() -> None:
    assert said(judge(kcj(suspend=True), complete(), pod(exit=0, said=SUMMARY))) == ("Complete", "Completed")


def test_the_phase_is_for_display_only() -> None:
    assert judge(kcj(status={"phase": Phase.COMPLETE})).start == Attempt(1)
