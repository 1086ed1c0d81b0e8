"""The status by the rules of kstatus: which conditions exist when, what moves, and what is not written twice."""

from __future__ import annotations

from datetime import timedelta

import pytest
from kcj_builders import NOW, condition, ended_status, kcj

from kompressor_api.v1alpha1 import CompressionJobStatus
from kompressor_operator.conditions import (
    Event,
    Phase,
    Verdict,
    blocked_patch,
    conditions,
    events,
    generation_patch,
    status_patch,
    transition,
)
from kompressor_operator.object_meta import stamp
from kompressor_operator.observed import CompressionJob

LATER = NOW + timedelta(minutes=5)


def kinds(verdict: Verdict, job: CompressionJob | None = None) -> dict[str, str]:
    return {c["type"]: c["status"] for c in conditions(job or kcj(), verdict, NOW)}


TABLE: dict[Phase, dict[str, str]] = {
    Phase.PENDING: {"Ready": "False", "Reconciling": "True", "Validated": "True"},
    Phase.QUEUED: {"Ready": "False", "Reconciling": "True", "Validated": "True"},
    Phase.COMPRESSING: {"Ready": "False", "Reconciling": "True", "Validated": "True"},
    Phase.RETRYING: {"Ready": "False", "Reconciling": "True", "Validated": "True"},
    Phase.SUSPENDED: {"Ready": "False", "Suspended": "True", "Validated": "True"},
    Phase.COMPLETE: {"Ready": "True", "Complete": "True", "Validated": "True"},
    Phase.FAILED: {"Ready": "False", "Failed": "True", "Stalled": "True", "Validated": "True"},
}


@pytest.mark.parametrize("phase", TABLE)
def test_exactly_these_conditions(phase: Phase) -> None:
    """Reconciling and Stalled are absent, not False, where they do not hold. What kstatus makes of them: tests/gitops/test_health.py."""
    assert kinds(Verdict(phase, "Any", "")) == TABLE[phase]
    CompressionJobStatus.model_validate(status_patch(kcj(), Verdict(phase, "Any", ""), NOW))


def test_invalid_is_failed_and_not_validated() -> None:
    assert kinds(Verdict(Phase.FAILED, "InvalidSpec", "", validated=False))["Validated"] == "False"


def test_after_resume_suspended_is_false_and_never_before() -> None:
    suspended = kcj(status={"conditions": [condition("Suspended", "True")]})
    found = conditions(suspended, Verdict(Phase.COMPRESSING, "Compressing", ""), NOW)
    assert next(c for c in found if c["type"] == "Suspended")["status"] == "False"
    assert next(c for c in found if c["type"] == "Suspended")["reason"] == "Resumed"
    assert "Suspended" not in kinds(Verdict(Phase.COMPRESSING, "Compressing", ""))


def test_the_transition_time_moves_with_the_status_alone() -> None:
    stored = kcj(status={"conditions": [condition("Ready", "False"), condition("Validated", "False")]})
    found = {c["type"]: c for c in conditions(stored, Verdict(Phase.COMPRESSING, "Compressing", "new words"), NOW)}
    assert found["Ready"]["lastTransitionTime"] == "2025-01-01T00:00:00Z" and found["Ready"]["message"] == "new words"
    assert found["Validated"]["lastTransitionTime"] == stamp(NOW)
    assert found["Reconciling"]["lastTransitionTime"] == stamp(NOW)


def stored_after(verdict: Verdict) -> CompressionJob:
    return kcj(status=status_patch(kcj(), verdict, NOW))


@pytest.mark.parametrize("phase", list(Phase))
def test_what_is_stored_already_is_not_written_again(phase: Phase) -> None:
    verdict = Verdict(phase, "Any", "words", facts={"attempt": 1, "progress": {"percent": 100}, "result": None})
    assert status_patch(stored_after(verdict), verdict, LATER) == {}


def test_fields_of_the_worker_do_not_matter() -> None:
    verdict = Verdict(Phase.COMPLETE, "Completed", "", facts={"progress": {"percent": 100}})
    job = stored_after(verdict)
    job.status["progress"] = {"percent": 100, "unit": "lm_head"}
    assert status_patch(job, verdict, LATER) == {}
    job.status["progress"]["percent"] = 97
    assert status_patch(job, verdict, LATER) == {"progress": {"percent": 100}}


def test_only_what_changed_is_in_the_patch() -> None:
    job = stored_after(Verdict(Phase.COMPRESSING, "Compressing", "words", facts={"attempt": 1, "retries": 0}))
    patch = status_patch(job, Verdict(Phase.COMPRESSING, "Compressing", "words", facts={"attempt": 1, "retries": 1}), LATER)
    assert patch == {"retries": 1}


def test_a_strangers_condition_is_put_right() -> None:
    verdict = Verdict(Phase.COMPRESSING, "Compressing", "words")
    job = stored_after(verdict)
    job.status["conditions"].append(condition("Stalled"))
    assert [c["type"] for c in status_patch(job, verdict, LATER)["conditions"]] == ["Ready", "Reconciling", "Validated"]


def test_one_event_a_transition() -> None:
    running = Verdict(Phase.COMPRESSING, "Compressing", "words")
    assert transition(kcj(), running) == Event(False, "Compressing", "words")
    assert transition(stored_after(running), Verdict(Phase.COMPRESSING, "Compressing", "other words")) is None
    failed = transition(stored_after(running), Verdict(Phase.FAILED, "CorruptSource", "broken"))
    assert failed == Event(True, "CorruptSource", "broken")


def test_a_finished_jobs_end_holds_for_its_new_generation() -> None:
    job = kcj(generation=2, status=ended_status())
    patch = generation_patch(job)
    assert patch["observedGeneration"] == 2 and patch["conditions"][0]["observedGeneration"] == 2
    assert patch["conditions"][0]["lastTransitionTime"] == "2025-01-01T00:00:00Z"
    assert generation_patch(kcj(generation=1, status=ended_status())) == {}


def test_validated_is_unknown_while_a_preflight_looks() -> None:
    looking = Verdict(Phase.VALIDATING, "Preflight", "words", validated=None)
    (validated,) = [c for c in conditions(kcj(), looking, LATER) if c["type"] == "Validated"]
    assert (validated["status"], validated["reason"]) == ("Unknown", "Preflight")
    assert {c["type"]: c["status"] for c in conditions(kcj(), looking, LATER)}["Reconciling"] == "True"
    assert transition(kcj(), looking) is None, "on the usual way to the start each event is one more request"


def test_a_note_is_told_once() -> None:
    note = Event(True, "ResourcesBelowPlan", "8Gi is less than 9Gi")
    verdict = Verdict(Phase.COMPRESSING, "Compressing", "words", validated_message="valid, but 8Gi is less than 9Gi", note=note)
    assert note in events(kcj(), verdict)
    assert events(stored_after(verdict), verdict) == []


def test_a_job_that_ended_while_suspended_says_so() -> None:
    job = kcj(suspend=True, status={"conditions": [condition("Suspended")]})
    (told,) = [c for c in conditions(job, Verdict(Phase.COMPLETE, "Completed", "words"), LATER) if c["type"] == "Suspended"]
    assert (told["status"], told["reason"], told["message"]) == ("False", "Completed", "the job has ended")


def test_what_a_deletion_waits_for_stands_beside_how_the_job_ended_and_goes_again() -> None:
    before = ended_status()["conditions"]
    blocked = Event(True, "ImagePullFailed", "the clean-up waits: no image")
    told = blocked_patch(kcj(status=ended_status()), blocked, NOW)["conditions"]
    CompressionJobStatus.model_validate({"conditions": told})
    assert told[:-1] == before and (told[-1]["type"], told[-1]["status"]) == ("CleanupBlocked", "True")
    waits = kcj(status=ended_status(conditions=told))
    assert blocked_patch(waits, blocked, LATER) == {}, "not written again"
    (changed,) = [c for c in blocked_patch(waits, Event(True, "Unschedulable", "x"), LATER)["conditions"] if c["type"] == "CleanupBlocked"]
    assert (changed["reason"], changed["lastTransitionTime"]) == ("Unschedulable", stamp(NOW))
    assert blocked_patch(waits, None, LATER) == {"conditions": before}
    assert blocked_patch(kcj(status=ended_status()), None, NOW) == {}
