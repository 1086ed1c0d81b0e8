"""Who stops and starts a Job: its user, its queue, or something else."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

from kcj_builders import NOW, child, condition, failed, judge, kcj, pod

from kompressor_operator.conditions import Verdict, conditions
from kompressor_operator.decide import CONFIRM, Decision
from kompressor_operator.manifests import Attempt

SUSPENDED = [condition("Suspended")]
TOLD = {"jobName": "llama-1", "attempt": 1, "memoryPlan": 0, "failures": 2, "workerImage": "worker:7"}


def told(decision: Decision) -> Verdict:
    assert decision.verdict is not None
    return decision.verdict


def queued_job(**fields: Any) -> Any:
    return child(queue="gpu", suspended=True, **fields)


def test_a_job_with_a_queue_is_queued_from_the_start() -> None:
    job = kcj(queueName="gpu")
    start = judge(job, live=False, kueue=True)
    assert start.start == Attempt(1) and (told(start).phase, told(start).reason) == ("Queued", "Queued")
    stored = told(start).facts | {"jobName": "llama-1"}
    again = judge(kcj(queueName="gpu", status=stored), queued_job(), kueue=True)
    assert told(again).message == told(start).message.replace(str(told(start).facts["jobName"]), child().name), "one write"
    states = {c["type"]: c["status"] for c in conditions(job, told(start), NOW)}
    assert states["Reconciling"] == "True" and "Suspended" not in states, "Flux takes Suspended for current"


def test_the_hint_is_given_only_where_it_is_known_that_there_is_no_kueue() -> None:
    said = {there: told(judge(kcj(queueName="gpu", status=TOLD), queued_job(), kueue=there)).message for there in (None, True, False)}
    assert "no Kueue" in said[False] and "spec.queueName" in said[False] and "no Kueue" not in said[None] + said[True]
    assert all("queue gpu" in text for text in said.values())
    other = told(judge(kcj(status=TOLD), child(suspended=True), kueue=True)).message
    assert "manageJobsWithoutQueueName" in other


def test_a_queue_alone_writes_suspend() -> None:
    """Whatever is stored, whoever has suspended it."""
    for stored in ([], SUSPENDED, [condition("Suspended", "False")]):
        for wish in (False, True):
            for job in (queued_job(), child(queue="gpu")):
                decision = judge(kcj(queueName="gpu", suspend=wish, status=TOLD | {"conditions": stored}), job)
                assert not any("suspend" in patch.spec for patch in decision.patches)


def test_admitted_it_runs_and_taken_back_it_queues() -> None:
    job = kcj(queueName="gpu", status=TOLD)
    assert told(judge(job, child(queue="gpu"), pod())).reason == "Compressing"
    back = told(judge(job, queued_job(), pod(deletion_due=NOW + timedelta(seconds=5))))
    assert back.reason == "Queued" and "pod llama-1-a commits its last block" in back.message


def test_suspend_is_stored_with_what_the_job_knows_and_then_removes_it() -> None:
    running = child(queue="gpu", memory_plan=1, failures_before=1, failed=2, image="worker:7")
    first = judge(kcj(queueName="gpu", suspend=True, status=TOLD), running, pod())
    assert first.deletes == () and told(first).reason == "Suspended"
    assert (told(first).facts["failures"], told(first).facts["memoryPlan"]) == (3, 1)
    stored = kcj(queueName="gpu", suspend=True, status=TOLD | {"conditions": SUSPENDED})
    assert judge(stored, running, pod(), live=False) == CONFIRM, "a removal cannot be taken back"
    earlier = failed(1, failed=1)
    second = replace(running, name="llama-2", uid="job-2", attempt=2)
    assert judge(stored, earlier, pod(exit=71), second).deletes == (earlier, second), "the newest last: until then it tells the history"
    assert judge(stored, replace(second, deleting=True)).deletes == ()


def test_a_pod_on_a_lost_node_commits_nothing_and_is_not_said_to() -> None:
    overdue, stopping = pod(deletion_due=NOW - timedelta(hours=1)), pod(deletion_due=NOW + timedelta(seconds=5))
    for job, children in ((kcj(suspend=True, status=TOLD), child()), (kcj(queueName="gpu", status=TOLD), queued_job())):
        for each in (overdue, pod(silent=True)):
            said = told(judge(job, children, each))
            assert said.reason in ("Suspended", "Queued") and "commits" not in said.message, said.message
            assert "node node-1 does not answer" in said.message and "out-of-service" in said.message
        decision = judge(job, children, stopping)
        assert "commits its last block" in told(decision).message and decision.again_after == 20, "then it is overdue"


def test_resuming_makes_the_next_attempt_from_the_status() -> None:
    stored = TOLD | {"conditions": SUSPENDED, "memoryPlan": 1}
    assert judge(kcj(queueName="gpu", status=stored)).start == Attempt(2, 1, 2, "worker:7")
    started = stored | {"attempt": 2, "conditions": [condition("Suspended", "False")]}
    assert judge(kcj(queueName="gpu", status=started)).start == Attempt(2, 1, 2, "worker:7"), "by a second operator too"
    assert judge(kcj(queueName="gpu", status={"conditions": SUSPENDED})).start == Attempt(1), "suspended before it ever started"
    assert judge(kcj(status=TOLD | {"conditions": SUSPENDED})).start == Attempt(1, 0, 2, "worker:7"), "without a queue its Job was toggled"


def test_until_the_removed_job_is_gone_suspended_stays_stored() -> None:
    """It is what makes the number rise."""
    job = kcj(queueName="gpu", status=TOLD | {"conditions": SUSPENDED})
    for left in ([child(queue="gpu", deleting=True), pod()], [pod(deletion_due=NOW + timedelta(seconds=5))]):
        decision = judge(job, *left)  # type: ignore[arg-type]
        assert decision.start is None and told(decision).reason == "Suspended"
    stuck = judge(job, pod(deletion_due=NOW - timedelta(hours=1)))
    assert told(stuck).phase == "Suspended" and "out-of-service" in told(stuck).message, "nor does a lost node make it come again"


def test_resumed_before_anything_was_removed_it_just_goes_on() -> None:
    job = kcj(queueName="gpu", status=TOLD | {"conditions": SUSPENDED})
    assert judge(job, child(queue="gpu"), pod(), live=False) == CONFIRM, "or its removal has not reached us yet"
    decision = judge(job, child(queue="gpu"), pod())
    assert told(decision).reason == "Compressing" and decision.deletes == () and decision.start is None
