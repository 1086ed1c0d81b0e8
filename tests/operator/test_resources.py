"""Quantities beside the official client's parser, and who says what the worker asks for."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kcj_builders import SETTINGS, kcj
from kubernetes.utils.quantity import parse_quantity
from pydantic import TypeAdapter, ValidationError

from kompressor_api.pod import Quantity
from kompressor_api.quantity import parse, readable, rounded_up
from kompressor_operator.observed import Manifest
from kompressor_operator.resources import below_plan, worker_resources

PLAN = {"hostMemoryBytes": 3 << 30}
SUFFIXES = ["", "n", "u", "m", "k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"]
AMOUNT: TypeAdapter[Any] = TypeAdapter(Quantity)
PATTERN = next(one["pattern"] for one in AMOUNT.json_schema()["anyOf"] if "pattern" in one)
NUMBERS = st.decimals(min_value=-(10**6), max_value=10**6, places=3).map(str)


@given(st.builds(str.__add__, NUMBERS, st.sampled_from(SUFFIXES)))
def test_quantities_are_read_as_the_official_client_does(text: str) -> None:
    assert parse(text) == Fraction(parse_quantity(text))


@given(st.from_regex(PATTERN, fullmatch=True).map(str.strip))
def test_a_spec_takes_no_quantity_that_the_official_client_cannot_read(text: str) -> None:
    """One that the API server alone refused would be refused at the Job, after the job was taken."""
    assert math.isclose(parse(text), parse_quantity(text)), "the client keeps 28 digits"


def test_an_exponent_is_a_small_whole_number() -> None:
    for wrong in ("1e1.5", "1e.5", "1e", "1e999999999"):
        with pytest.raises(ValidationError):
            AMOUNT.validate_python(wrong)
        assert below_plan(kcj(worker={"resources": {"limits": {"memory": wrong}}}).spec, PLAN) == "", "nor does arithmetic run for ever"


def test_quantities_that_are_numbers_or_none() -> None:
    assert parse(8) == 8 and parse("1e3") == 1000 and parse("1.5Gi") == 1610612736
    for wrong in ("", "Gi", "1GiB", "1ki", "one"):
        with pytest.raises(ValueError, match="no quantity"):
            parse(wrong)


@given(st.integers(1, 2**50))
def test_bytes_are_rounded_up_to_steps(amount: int) -> None:
    step = 256 << 20
    assert 0 <= parse(rounded_up(amount, step)) - amount < step
    assert readable(amount).endswith(("Mi", "Gi"))


def asked(settings: Manifest | None = None, plan: Manifest = PLAN, **worker: Any) -> Manifest:
    job = kcj(worker=worker)
    return worker_resources(job.spec, replace(SETTINGS, worker_resources=settings or {}), plan)


def test_memory_defaults_from_the_plan_with_some_room() -> None:
    memory = {"memory": f"{math.ceil(3 * 1.2 * 4) * 256}Mi"}
    assert asked() == {"requests": memory, "limits": memory}
    assert asked(settings={"limits": {"memory": "64Gi", "cpu": 2}}) == {"requests": memory, "limits": {"cpu": 2} | memory}
    assert asked(plan={}) == {} and asked(plan={}, settings={"limits": {"memory": "1Gi"}}) == {"limits": {"memory": "1Gi"}}


def test_whoever_names_a_resource_says_its_request_and_its_limit() -> None:
    assert asked(resources={"requests": {"memory": "8Gi"}}) == {"requests": {"memory": "8Gi"}}, "the plan's limit would be below it"
    gpu = asked(resources={"limits": {"nvidia.com/gpu": 1}})
    assert gpu["limits"].keys() == {"memory", "nvidia.com/gpu"}, "the rest still comes from the plan"
    template = {"spec": {"containers": [{"name": "worker", "resources": {"limits": {"memory": "2Gi"}}}]}}
    assert asked(resources={"limits": {"memory": "1Gi"}}, podTemplate=template) == {"limits": {"memory": "2Gi"}}
    claims = [{"name": "gpu"}]
    assert asked(plan={}, settings={"limits": {"cpu": 1}}, resources={"claims": claims}) == {"limits": {"cpu": 1}, "claims": claims}


@pytest.mark.parametrize(
    ("spec", "gpus"),
    [
        ({"calibration": {"dataset": {"uri": "s3://d/x"}}}, 1),
        ({"evaluation": {"dataset": {"uri": "s3://d/x"}}}, 1),
        ({}, None),
        ({"calibration": {"dataset": {}}, "worker": {"resources": {"limits": {"nvidia.com/gpu": 0}}}}, 0),
        ({"calibration": {"dataset": {}}, "worker": {"resources": {"limits": {"nvidia.com/mig-1g.10gb": 1}}}}, None),
    ],
)
def test_a_gpu_by_default_only_where_activations_flow_and_the_operator_knows_its_name(spec: Manifest, gpus: int | None) -> None:
    named = replace(SETTINGS, worker_gpu_resource="nvidia.com/gpu")
    assert worker_resources(kcj(**spec).spec, named, {}).get("limits", {}).get("nvidia.com/gpu") == gpus
    assert "nvidia.com/gpu" not in worker_resources(kcj(calibration={"dataset": {}}).spec, SETTINGS, {}).get("limits", {})


@pytest.mark.parametrize(
    ("worker", "less"),
    [
        ({}, False),
        ({"resources": {"limits": {"memory": "3Gi"}}}, False),
        ({"resources": {"limits": {"memory": "2.9Gi"}}}, True),
        ({"resources": {"requests": {"memory": "1Gi"}}}, True),
        ({"resources": {"requests": {"memory": "1Gi"}, "limits": {"memory": "4Gi"}}}, False),
        ({"podTemplate": {"spec": {"containers": [{"name": "worker", "resources": {"limits": {"memory": "1Gi"}}}]}}}, True),
    ],
)
def test_less_memory_than_the_plan_is_said(worker: Manifest, less: bool) -> None:
    words = below_plan(kcj(worker=worker).spec, PLAN)
    assert bool(words) is less
    assert not less or ("estimates 3.0Gi" in words and "raise spec.worker.resources" in words)
