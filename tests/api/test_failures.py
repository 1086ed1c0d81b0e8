"""The table of failures covers every exit code once, in the order of the Job's own policy, and every reason has its remedy."""

from __future__ import annotations

from typing import Any

import pytest

from kompressor_api.failures import ADVICE, ANEW, FAILURES, Retry, advice_for, failure_of_code
from kompressor_api.names import FINAL_EXIT_CODES, UNCAUGHT_EXIT_CODES, ExitCode, Reason, Step
from kompressor_api.pod import accelerators

ON_THE_WAY = {Reason.PENDING, Reason.PREFLIGHT, Reason.QUEUED, Reason.COMPRESSING, Reason.RETRYING, Reason.SUSPENDED, Reason.RESUMED}
GOOD = {Reason.VALID, Reason.COMPLETED, Reason.ALREADY_COMPRESSED, Reason.CLEANED_UP}


def test_every_exit_code_is_in_exactly_one_class() -> None:
    told = [code for failure in FAILURES for code in failure.codes]
    assert sorted(told) == sorted({*map(int, ExitCode), *UNCAUGHT_EXIT_CODES, 137} - {0})
    assert failure_of_code(3) is failure_of_code(1), "an unknown code is a crash"


def test_classes_are_retried_as_the_jobs_rules_do() -> None:
    retries = {code: failure.retry for failure in FAILURES for code in failure.codes}
    assert {code for code, retry in retries.items() if retry is Retry.NEVER} == set(FINAL_EXIT_CODES)
    assert {code for code, retry in retries.items() if retry in (Retry.SMALLER, Retry.NEXT)} == {ExitCode.OUT_OF_MEMORY, 137}
    ranks = {Retry.FREE: 0, Retry.NEVER: 1, Retry.SMALLER: 2, Retry.NEXT: 3, Retry.IN_PLACE: 4}
    order = [ranks[failure.retry] for failure in FAILURES]
    assert order == sorted(order), "first hit wins, in the Job and in the table"


def test_every_reason_that_ends_a_job_or_holds_it_up_has_its_advice() -> None:
    assert set(ADVICE) == set(Reason) - ON_THE_WAY - GOOD
    assert all(failure.advice == ADVICE[failure.reason] for failure in FAILURES)
    assert not [advice for advice in ADVICE.values() if advice.endswith(".") or advice[0].isupper()], "half sentences, joined to others"


@pytest.mark.parametrize("step", Step)
def test_what_holds_a_pod_up_has_a_remedy_that_its_job_can_have(step: Step) -> None:
    held_up = ("ImagePullFailed", "Unschedulable", "QuotaExceeded", "PodRefused", "ContainerNotStarted")
    for advice in (advice_for(Reason(reason), step) for reason in held_up):
        assert not advice.startswith(("ask", "change", ANEW)), "first what cures it as it is, for its spec cannot change"
        assert step is not Step.CLEANUP or "apply" not in advice, "it is being deleted"


@pytest.mark.parametrize(
    ("worker", "count"),
    [
        ({}, 0),
        ({"resources": {"limits": {"memory": "24Gi", "cpu": 4}}}, 0),
        ({"resources": {"limits": {"nvidia.com/gpu": "2", "example.org/gpus": 4}}}, 2),
        ({"resources": {"limits": {"amd.com/gpu": 1}}}, 1),
        ({"resources": {"limits": {"nvidia.com/mig-1g.10gb": 3}}}, 3),
        ({"resources": {"limits": {"nvidia.com/gpu.shared": 1}}}, 1),
        ({"resources": {"limits": {"gpu.intel.com/i915": 1}}}, 1),
        ({"resources": {"requests": {"nvidia.com/gpu": 1}}}, 0),
        ({"podTemplate": {"spec": {"containers": [{"name": "worker", "resources": {"limits": {"nvidia.com/gpu": 4}}}]}}}, 4),
        ({"podTemplate": {"spec": {"containers": [{"name": "sidecar", "resources": {"limits": {"nvidia.com/gpu": 4}}}]}}}, 0),
        (
            {
                "resources": {"limits": {"nvidia.com/gpu": 1}},
                "podTemplate": {"spec": {"containers": [{"name": "worker", "resources": {"limits": {"nvidia.com/gpu": 2}}}]}},
            },
            2,
        ),
    ],
)
def test_accelerators_whoever_makes_them(worker: dict[str, Any], count: int) -> None:
    assert accelerators(worker) == count
