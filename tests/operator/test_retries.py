"""Next attempts as a table and as whole lives: which, when, and with how much time left."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kcj_builders import NOW, ago, child, complete, condition, failed, judge, kcj, pod

from kompressor_api.names import WORKER_CONTAINER
from kompressor_operator.conditions import Phase, Verdict, status_patch, transition
from kompressor_operator.decide import Decision
from kompressor_operator.endings import ending_of
from kompressor_operator.manifests import Attempt
from kompressor_operator.object_meta import stamp
from kompressor_operator.observed import ChildJob
from kompressor_operator.pods import ChildPod


def told(decision: Decision) -> Verdict:
    assert decision.verdict is not None
    return decision.verdict


# ---- when


@pytest.mark.parametrize(("failures", "seconds"), [(1, 10), (2, 20), (3, 40), (6, 320), (7, 360), (99, 360)])
def test_a_next_attempt_waits_as_a_next_pod_would(failures: int, seconds: int) -> None:
    job, before = kcj(retry={"limit": 100}), failed(failed=failures, ended_at=stamp(NOW))
    waiting = judge(job, before, pod(exit=137), now=NOW + timedelta(seconds=seconds - 1))
    assert waiting.start is None and waiting.again_after == 1
    assert told(waiting).reason == "Retrying" and stamp(NOW + timedelta(seconds=seconds)) in told(waiting).message
    due = judge(job, before, pod(exit=137), now=NOW + timedelta(seconds=seconds))
    assert due.start == Attempt(2, failures_before=failures)


def test_the_wait_is_told_once() -> None:
    """Each other text would be one more write."""
    looks = [judge(kcj(), failed(ended_at=stamp(NOW)), pod(exit=137), now=NOW + timedelta(seconds=s)) for s in (0, 4, 9)]
    assert looks[0].verdict == looks[1].verdict == looks[2].verdict


def test_out_of_memory_waits_for_nothing() -> None:
    assert judge(kcj(), failed(failed=4, ended_at=stamp(NOW)), pod(exit=71)).start == Attempt(2, memory_plan=1, failures_before=3)


UNSTARTED: dict[str, Any] = {"exitCode": 137, "reason": "ContainerStatusUnknown", "startedAt": None, "finishedAt": None}
"""As the kubelet puts it for a pod that is deleted while its container is being created."""


def removed(attempt: int = 1, **fields: Any) -> ChildPod:
    """A pod that was removed before its worker ran, read as it comes over the wire."""
    container = {"name": WORKER_CONTAINER, "state": {"terminated": UNSTARTED}}
    return replace(pod(attempt, phase="Failed"), terminated=ChildPod.parse(pod_body(container)).terminated, **fields)


def pod_body(container: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {"namespace": "team", "name": "p", "uid": "p"}, "status": {"phase": "Failed", "containerStatuses": [container]}}


@pytest.mark.parametrize("limit", [0, 4])
def test_a_pod_that_was_removed_before_its_worker_ran_counts_for_nothing(limit: int) -> None:
    """Whoever suspends a job while its image is being pulled has not used up a retry, though the Job takes 137 for a failure."""
    job, over = kcj(retry={"limit": limit}), failed(failures_before=limit, ended_at=stamp(ago(900)))
    decision = judge(job, over, removed())
    assert decision.start == Attempt(2, failures_before=limit)
    assert "pod llama-1-a was removed before the worker ran; " in told(decision).message and "SIGKILL" not in told(decision).message
    held = judge(kcj(retry={"limit": limit}, suspend=True, status={"conditions": [condition("Suspended")]}), over, removed())
    assert held.start is None and (told(held).phase, told(held).facts["failures"]) == (Phase.SUSPENDED, limit)
    killed = judge(job, over, pod(exit=137))
    assert killed.start is None and told(killed).reason == "WorkerCrashed", "one that ran and was killed counts"


def test_until_its_job_ends_a_removed_pod_is_not_said_to_compress() -> None:
    assert told(judge(kcj(), child(created=ago(1)), removed())).phase == Phase.RETRYING
    stored = kcj(status={"phase": "Pending", "conditions": [condition("Ready", "False", reason="Pending")]})
    assert told(judge(stored, child(created=ago(1), failing="PodFailurePolicy"), removed())).phase == Phase.PENDING
    assert ending_of(failed(reason="BackoffLimitExceeded"), [removed(), pod(suffix="b", exit=74, at=ago(50))]).exit_code == 74


@pytest.mark.parametrize(
    "container",
    [
        {"state": {"terminated": UNSTARTED}, "containerID": "containerd://1"},
        {"state": {"terminated": UNSTARTED | {"startedAt": "2026-01-02T03:04:00Z"}}},
        {"state": {"terminated": UNSTARTED | {"exitCode": 128, "reason": "StartError"}}},
        {"state": {"terminated": UNSTARTED | {"reason": "Error"}}},
    ],
    ids=["lost sight of", "began", "could not start", "killed"],
)
def test_any_other_container_has_run_or_failed(container: dict[str, Any]) -> None:
    ended = ChildPod.parse(pod_body({"name": WORKER_CONTAINER, **container})).terminated
    assert ended is not None and not ended.never_ran


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_jumps_holds_nothing_up(hours: int) -> None:
    assert judge(kcj(), failed(ended_at=stamp(NOW)), pod(exit=137), now=NOW + timedelta(hours=hours)).start == Attempt(2, failures_before=1)


# ---- what outlives the Jobs


def test_the_status_holds_what_the_next_attempt_is_made_from() -> None:
    facts = told(judge(kcj(), child(2, memory_plan=1, failures_before=2, failed=1, image="worker:7"), pod(2))).facts
    assert {name: facts[name] for name in ("attempt", "memoryPlan", "failures", "workerImage")} == {
        "attempt": 2,
        "memoryPlan": 1,
        "failures": 3,
        "workerImage": "worker:7",
    }
    stored = {name: value for name, value in facts.items() if value is not None}
    assert judge(kcj(status=stored)).start == Attempt(2, 1, 3, "worker:7"), "its Job was deleted"


def test_jobs_win_over_the_status() -> None:
    lies = {"jobName": "llama-9", "attempt": 9, "memoryPlan": 0, "failures": 99, "workerImage": "evil:1"}
    assert judge(kcj(status=lies), failed(1, image="worker:7"), pod(exit=71)).start == Attempt(2, 1, 0, "worker:7")


def test_a_pruned_status_is_a_first_attempt() -> None:
    assert judge(kcj(status={"jobName": "llama-1"})).start == Attempt(1)


def test_an_attempt_keeps_the_image_of_the_one_before_it() -> None:
    assert judge(kcj(worker={"image": "new:2"}), failed(image="old:1"), pod(exit=71)).start == Attempt(2, 1, image="old:1")


def test_the_unit_at_which_the_worker_went_on_is_told() -> None:
    status = {"progress": {"resumedFrom": "model.layers.7", "percent": 40}}
    assert told(judge(kcj(status=status), child(), pod())).facts["resumedFromBlock"] == "model.layers.7"
    assert told(judge(kcj(), child(), pod())).facts["resumedFromBlock"] is None


def test_where_an_earlier_worker_went_on_is_taken_away_by_one_that_begins_anew() -> None:
    """Its report has no resumedFrom; until it reports, and once it is taken away, there is nothing to write."""
    before = {"resumedFromBlock": "model.layers.7"}

    def written(status: dict[str, Any]) -> dict[str, Any]:
        job = kcj(status=status)
        return status_patch(job, told(judge(job, child(), pod())), NOW)

    assert "resumedFromBlock" not in written(before)
    patch = written({**before, "progress": {"percent": 0, "unit": "model.embed_tokens"}})
    assert patch["resumedFromBlock"] is None and "resumedFromBlock" in patch
    assert "resumedFromBlock" not in written({"progress": {"percent": 1}})
    assert written({"progress": {"resumedFrom": "model.layers.9"}} | before)["resumedFromBlock"] == "model.layers.9"


# ---- deadline


def ran(attempt: int, seconds: float, **fields: Any) -> ChildJob:
    """A Job that ended a second ago for want of memory, after so many seconds."""
    return failed(attempt, started=ago(1 + seconds), **fields)


def test_every_attempt_gets_what_earlier_ones_have_left() -> None:
    job = kcj(activeDeadlineSeconds=100)
    assert judge(job, live=False).start == Attempt(1, deadline=100)
    assert judge(job, ran(1, 30), pod(exit=71)).start == Attempt(2, 1, deadline=70)
    last = judge(job, ran(1, 30), pod(exit=71), ran(2, 69, memory_plan=1), pod(2, exit=71))
    assert last.start == Attempt(3, 2, deadline=1)
    untold = judge(job, ran(1, 30), pod(exit=71), child(2, memory_plan=1), pod(2), live=False)
    assert untold.start == Attempt(2, 1, deadline=70), "a start that was cut short is finished as it was begun"


def test_no_time_left_between_attempts_is_the_end() -> None:
    decision = judge(kcj(activeDeadlineSeconds=100), ran(1, 30), pod(exit=71), ran(2, 70, memory_plan=1), pod(2, exit=71))
    assert decision.start is None
    assert (told(decision).phase, told(decision).reason) == (Phase.FAILED, "DeadlineExceeded")
    assert "2 attempts took the 100 seconds" in told(decision).message and "raise spec.activeDeadlineSeconds" in told(decision).message
    smallest = judge(kcj(activeDeadlineSeconds=100), ran(3, 100, memory_plan=2), pod(3, exit=71))
    assert told(smallest).reason == "OutOfMemory", "nothing would have followed anyway"


def test_only_a_job_ends_a_job_by_the_clock() -> None:
    """The operator's clock may be wrong: as long as the Job goes on, so does everything."""
    late = judge(kcj(activeDeadlineSeconds=5), child(started=ago(3600)), pod(), now=NOW + timedelta(hours=1))
    assert told(late).reason == "Compressing"


def test_the_jobs_own_word_is_told_whatever_failed_before() -> None:
    over = failed(reason="DeadlineExceeded", ended_message="Job was active longer than specified deadline")
    decision = judge(kcj(activeDeadlineSeconds=5), over, pod(exit=137))
    assert (told(decision).phase, told(decision).reason) == (Phase.FAILED, "DeadlineExceeded") and decision.start is None


def test_a_pod_that_is_stopped_for_good_is_not_told_as_retried() -> None:
    stopping = pod(deletion_due=NOW + timedelta(seconds=5))
    assert "the next one goes on" in told(judge(kcj(), child(), stopping)).message
    assert (
        "(DeadlineExceeded); it commits its last block, and none follows"
        in told(judge(kcj(), child(failing="DeadlineExceeded"), stopping)).message
    )
    assert told(judge(kcj(), child(failing="DeadlineExceeded"), pod(deletion_due=ago(60)))).reason == "NodeLost"


@pytest.mark.parametrize(
    "pods",
    [
        [pod(deletion_due=NOW + timedelta(seconds=5))],
        [pod(exit=75, at=NOW)],
        [pod(exit=137, at=NOW, disrupted="TerminationByKubelet")],
        [],
    ],
    ids=["stopping", "stopped", "taken away", "gone"],
)
def test_a_job_that_is_ending_tells_no_retry_first(pods: list[ChildPod]) -> None:
    """Its end comes within seconds, and then that alone is told."""
    stored = kcj(status={"phase": "Compressing", "conditions": [condition("Ready", "False", reason="Compressing")]})
    goes_on = transition(stored, told(judge(stored, child(created=ago(1)), *pods)))
    assert goes_on is not None and goes_on.reason == "Retrying"
    ending = told(judge(stored, child(created=ago(1), failing="DeadlineExceeded"), *pods))
    assert transition(stored, ending) is None and "DeadlineExceeded" in ending.message
    assert (ending.phase, ending.reason) == (Phase.COMPRESSING, "Compressing")


# ---- whole lives

ENDS = {"memory": (71, "Error"), "kernel": (137, "OOMKilled"), "killed": (137, "Error"), "final": (66, "Error"), "done": (0, "Completed")}


@settings(max_examples=150, deadline=None)
@given(
    ends=st.lists(st.tuples(st.sampled_from([*ENDS, "memory", "killed"]), st.integers(1, 60), st.integers(0, 2)), min_size=12, max_size=12),
    limit=st.integers(0, 5),
    time=st.none() | st.integers(1, 200),
)
def test_any_life_ends_within_its_bounds(ends: list[tuple[str, int, int]], limit: int, time: int | None) -> None:
    """Every attempt ends somehow, after some seconds and some failures in place. Each look is a fresh operator's."""
    spec: dict[str, Any] = {"retry": {"limit": limit}, "activeDeadlineSeconds": time}
    now, children, status, spent = NOW, list[ChildJob | ChildPod](), dict[str, Any](), 0
    for number, (end, seconds, in_place) in enumerate(ends, 1):
        decision = judge(kcj(status=status, **spec), *children, now=now)
        if decision.again_after:
            assert decision.start is None
            now += timedelta(seconds=math.ceil(decision.again_after))
            decision = judge(kcj(status=status, **spec), *children, now=now)
        if decision.start is None:
            break
        attempt = decision.start
        assert attempt.number == number and attempt.memory_plan <= 2 and attempt.failures_before <= limit
        assert attempt.deadline == (None if time is None else time - spent) and (attempt.deadline is None or attempt.deadline >= 1)
        status = {"jobName": f"llama-{number}", "attempt": number}
        code, why = ENDS[end]
        late = attempt.deadline is not None and seconds > attempt.deadline
        seconds = min(seconds, attempt.deadline or seconds)
        failures = min(in_place, max(0, limit - attempt.failures_before))
        began, now, spent = now, now + timedelta(seconds=seconds), spent + seconds
        fields: dict[str, Any] = {"memory_plan": attempt.memory_plan, "failures_before": attempt.failures_before, "started": began}
        fields |= {"ended_at": stamp(now), "failed": failures + (code != 0 and not late)}
        why_failed = "DeadlineExceeded" if late else "PodFailurePolicy"
        job = complete(number, **fields) if code == 0 and not late else failed(number, why_failed, **fields)
        children += [job, replace(pod(number, exit=code, killed=why, at=now), created=began)]
    verdict = told(decision)
    assert verdict.phase in (Phase.COMPLETE, Phase.FAILED), "it ends, at the latest after limit + 1 failures and two smaller plans"
    assert len([c for c in children if isinstance(c, ChildJob)]) <= limit + 3
    assert time is None or spent <= time
    reasons = {"memory": "OutOfMemory", "kernel": "OutOfMemory", "killed": "WorkerCrashed", "final": "BadNumerics", "done": "Completed"}
    assert verdict.reason in (reasons[ends[len(children) // 2 - 1][0]], "DeadlineExceeded")


def test_suspended_is_not_the_place_to_count() -> None:
    """A wait that is over while the user holds the job starts nothing."""
    stored = {"conditions": [condition("Suspended")]}
    assert judge(kcj(suspend=True, status=stored), failed(ended_at=stamp(ago(999))), pod(exit=137)).start is None
