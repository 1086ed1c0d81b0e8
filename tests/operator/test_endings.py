"""How an attempt ended: the worker's own words where there are any, else what exit code and kubelet tell."""

from __future__ import annotations

import json

import pytest
from kcj_builders import ago, complete, failed, pod

from kompressor_api.failures import ADVICE, FAILURES, Failure
from kompressor_api.names import FINAL_EXIT_CODES, UNCAUGHT_EXIT_CODES, ExitCode, Reason
from kompressor_operator.endings import REASON_OF_CODE, TEXT_LIMIT, ending_of, ending_of_pod


def test_every_exit_code_has_a_reason() -> None:
    assert set(REASON_OF_CODE) >= {*ExitCode, *UNCAUGHT_EXIT_CODES}


@pytest.mark.parametrize("code", [*FINAL_EXIT_CODES, ExitCode.STORAGE, ExitCode.OUT_OF_MEMORY])
def test_a_code_alone_tells_the_class(code: ExitCode) -> None:
    ending = ending_of_pod(pod(exit=int(code)))
    assert ending.reason == REASON_OF_CODE[code] and str(int(code)) in ending.message


@pytest.mark.parametrize("code", UNCAUGHT_EXIT_CODES)
def test_a_crash_shows_the_end_of_the_log(code: int) -> None:
    """FallbackToLogsOnError puts the log's last lines where a worker would have put its report."""
    ending = ending_of_pod(pod(exit=code, said="Traceback ...\nKeyError: 'x'"))
    assert ending.reason == "WorkerCrashed"
    assert "KeyError" in ending.message and "kubectl logs" in ending.message


def test_the_workers_own_report_wins() -> None:
    report = {"reason": "AccessDenied", "message": "s3://models: 403; check the secret", "exitCode": 64}
    ending = ending_of_pod(pod(exit=64, said=json.dumps(report)))
    assert (ending.reason, ending.exit_code) == ("AccessDenied", 64)
    assert ending.message == f"s3://models: 403; check the secret; {ADVICE[Reason.ACCESS_DENIED]}"


@pytest.mark.parametrize(
    "said", ["", json.dumps({"message": "the worker's own words."}), json.dumps({"reason": "NobodyKnows", "message": "m"})]
)
@pytest.mark.parametrize("failure", FAILURES[1:], ids=lambda failure: failure.title)
def test_every_class_comes_with_its_advice_whatever_the_worker_said(failure: Failure, said: str) -> None:
    for code in failure.codes:
        ending = ending_of_pod(pod(exit=code, said=said))
        assert ending.message.count(failure.advice) == 1 and ".;" not in ending.message
        assert ending.reason == ("NobodyKnows" if "Nobody" in said else failure.reason)


def test_advice_that_the_worker_gave_itself_is_not_repeated() -> None:
    own = f"model-2: truncated; {ADVICE[Reason.CORRUPT_SOURCE]}"
    assert ending_of_pod(pod(exit=65, said=json.dumps({"message": own}))).message == own
    assert ending_of_pod(pod(exit=0, said=json.dumps({"reason": "AlreadyCompressed", "message": "same digest."}))).message == "same digest."


@pytest.mark.parametrize("said", ['{"reason": "no camel"}', '{"reason": 3}', "{", "[]", "null", "{}", '{"message": null}'])
def test_a_broken_report_falls_back_to_the_code(said: str) -> None:
    ending = ending_of_pod(pod(exit=65, said=said))
    assert ending.reason == "CorruptSource" and ending.message


def test_long_words_are_cut_in_the_report_from_its_end_in_a_log_from_its_beginning() -> None:
    report = ending_of_pod(pod(exit=64, said=json.dumps({"message": "a" * 3000})))
    assert report.message.count("a" * TEXT_LIMIT) == 1 and "a" * (TEXT_LIMIT + 1) not in report.message
    log = ending_of_pod(pod(exit=1, said="old" + "b" * 3000 + "new"))
    assert "new" in log.message and "old" not in log.message


def test_killed_for_memory_is_the_kubelets_word_not_the_code() -> None:
    assert ending_of_pod(pod(exit=137, killed="OOMKilled")).out_of_memory
    assert ending_of_pod(pod(exit=1, killed="OOMKilled")).reason == "OutOfMemory"
    plain = ending_of_pod(pod(exit=137))
    assert not plain.out_of_memory and "not for memory" in plain.message


def test_the_pod_that_the_job_names_decides() -> None:
    named = "Container worker for pod team/llama-1-b failed with exit code 65 matching FailJob rule at index 2"
    pods = [pod(suffix="a", exit=74, at=ago(0)), pod(suffix="b", exit=65, at=ago(9))]
    assert ending_of(failed(ended_message=named), pods).exit_code == 65


def test_a_named_pod_that_is_gone_leaves_its_code() -> None:
    named = "Container worker for pod team/llama-1-b failed with exit code 66 matching FailJob rule at index 2"
    ending = ending_of(failed(ended_message=named), [pod(suffix="a", exit=74)])
    assert (ending.exit_code, ending.reason) == (66, "BadNumerics")


def test_without_pods_the_jobs_own_reason_is_said() -> None:
    ending = ending_of(failed(reason="BackoffLimitExceeded", ended_message="Job has reached the specified backoff limit"), [])
    assert ending.reason == "BackoffLimitExceeded" and "spec.retry.limit" in ending.message
    assert ending_of(failed(reason="DeadlineExceeded"), []).reason == "DeadlineExceeded"
    assert ending_of(failed(reason=""), []).reason == "WorkerCrashed"


def test_a_deadline_is_the_jobs_own_end_whatever_a_pod_did_before() -> None:
    ending = ending_of(failed(reason="DeadlineExceeded", ended_message="Job was active longer than specified deadline"), [pod(exit=74)])
    assert ending.reason == "DeadlineExceeded" and "spec.activeDeadlineSeconds" in ending.message
    assert ending.exit_code is None, "or it would be taken for a failure that another attempt may cure"


def test_the_last_pod_speaks_for_a_job_that_used_up_its_retries() -> None:
    pods = [pod(suffix="a", exit=74, at=ago(5)), pod(suffix="b", exit=1, at=ago(50))]
    assert ending_of(failed(reason="BackoffLimitExceeded"), pods).exit_code == 74


def test_what_did_not_count_does_not_speak_for_a_job_that_gave_up() -> None:
    counts = pod(suffix="a", exit=74, at=ago(50))
    evicted = pod(suffix="b", exit=1, at=ago(5), disrupted="EvictionByEvictionAPI")
    for free in (evicted, pod(suffix="b", exit=75, at=ago(5))):
        assert ending_of(failed(reason="BackoffLimitExceeded"), [counts, free]).exit_code == 74
    ending = ending_of(failed(reason="BackoffLimitExceeded"), [evicted])
    assert ending.reason == "Terminated" and "EvictionByEvictionAPI" in ending.message, "not the crash that the eviction led to"


def test_success_is_told_by_the_pod_that_succeeded() -> None:
    pods = [pod(suffix="a", exit=0, at=ago(50), said='{"summary": {"ratio": "2x"}}'), pod(suffix="b", exit=75, at=ago(1))]
    assert ending_of(complete(), pods).summary == {"ratio": "2x"}


def test_an_evicted_pod_without_a_container_status() -> None:
    ending = ending_of_pod(pod(phase="Failed", disrupted="PreemptionByScheduler"))
    assert ending.exit_code is None and "PreemptionByScheduler" in ending.message
