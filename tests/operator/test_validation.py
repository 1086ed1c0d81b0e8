"""A spec that cannot work is refused with the place, the value and what was probably meant."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from kcj_builders import PASSES, SPEC

from kompressor_operator.validation import did_you_mean, field_names, known_passes, merely_unknown, problems_of, told


def problems(known: dict[str, list[str]] = PASSES, /, **changed: Any) -> str:
    return told(problems_of(copy.deepcopy(SPEC) | changed, known))


def test_a_good_spec_has_no_problem() -> None:
    assert problems() == ""
    assert problems({}) == ""


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"outptu": {"uri": "s3://a/b"}}, 'spec.outptu: unknown field (value {"uri": "s3://a/b"}); did you mean output?'),
        ({"model": {"source": {"uri": "s3://a/b", "credentialSecret": "x"}}}, "did you mean credentialsSecret?"),
        ({"output": {"uri": "s3://a/c", "caBundle": {"configMap": "x", "kee": "y"}}}, "spec.output.caBundle.kee"),
        ({"output": {"uri": "s3:/a"}}, 'spec.output.uri: "s3:/a" is not valid; it is: s3://bucket/prefix'),
        ({"output": {"uri": "hf://a/b"}}, "a hub is read-only here"),
        ({"output": {"uri": "s3://models/llama/"}}, "is the source itself"),
        ({"output": {}}, "spec.output.uri: is required"),
        ({"retry": {"limit": -1}}, "spec.retry.limit: -1 is not valid"),
        ({"worker": {"resources": {"limit": {"cpu": 1}}}}, "did you mean limits?"),
        ({"worker": {"tolerations": [{"ky": "gpu"}]}}, "spec.worker.tolerations[0].ky: unknown field"),
        ({"worker": {"resources": {"limits": {"cpu": "much"}}}}, 'spec.worker.resources.limits.cpu: "much" is not valid'),
        ({"passes": []}, "spec.passes"),
        ({"passes": [{"rtn": {}, "gptq": {}}]}, "spec.passes[0]"),
        ({"passes": [{"rtn": {"scheme": "W8A8"}}, {"rtn": {"group_size": 64}}]}, "did you mean groupSize?"),
        ({"passes": [{"rtn": {"zzz": 1}}]}, "known are groupSize, ignore, scheme, targets"),
        ({"passes": [{"awq": {}}]}, "spec.passes[0].awq: unknown pass; known are rtn"),
        ({"output": {"uri": "file:///tmp/out"}}, "file:///tmp/out cannot be used in a cluster; use s3:// or pvc://"),
        ({"model": {"source": {"uri": "file:///tmp/in"}}}, "spec.model.source.uri: file:///tmp/in"),
        ({"calibration": {"dataset": {"uri": "file:///tmp/d"}}}, "spec.calibration.dataset.uri: file:///tmp/d"),
        ({"worker": {"parallelism": 2}}, "worker.parallelism 2 would leave all processes but one idle: only the pass distil trains"),
        ({"worker": {"processesPerPod": 4}}, "worker.processesPerPod 4 would leave"),
        (
            {"calibration": {"dataset": {"uri": "s3://a/d"}, "sample": 3}},
            "spec.calibration.sample: unknown field (value 3); did you mean samples?",
        ),
    ],
)
def test_it_says_where_what_and_how_else(changed: dict[str, Any], expected: str) -> None:
    found = problems(**changed)
    assert expected in found
    assert found.endswith("delete this CompressionJob and apply again.")


def test_many_processes_have_something_to_train() -> None:
    group = {"parallelism": 2, "processesPerPod": 2}
    assert problems({"distil": []}, worker=group, passes=[{"distil": {}}]) == ""
    assert problems(worker={"parallelism": 1, "processesPerPod": 1}) == ""
    recipe = copy.deepcopy(SPEC) | {"worker": group, "recipeRef": {"name": "small"}}
    del recipe["passes"]
    assert not problems_of(recipe, PASSES), "its passes are not known yet"


@pytest.mark.parametrize("spec", [{}, {"model": 3}, {"passes": 3}, {"passes": [3]}, {"output": "s3://a"}, {"model": {"source": []}}])
def test_nonsense_is_refused_and_never_a_crash(spec: dict[str, Any]) -> None:
    assert told(problems_of(spec, PASSES))


@pytest.mark.parametrize(
    ("stray", "expected"),
    [
        ({"suspend": True}, "suspend: unknown field beside spec (value true); it belongs under spec"),
        ({"Spec": {}}, "Spec: unknown field beside spec (value {}); did you mean spec?"),
    ],
)
def test_what_stands_beside_the_spec_is_refused(stray: dict[str, Any], expected: str) -> None:
    assert told(problems_of(copy.deepcopy(SPEC), PASSES, stray)).startswith(expected)


@pytest.mark.parametrize(
    ("changed", "places"),
    [
        ({"someday": 1}, [("spec", "someday")]),
        ({"worker": {"tolerations": [{"ky": "gpu"}]}}, [("spec", "worker", "tolerations", 0, "ky")]),
        ({"passes": [{"rtn": {"zz": 1}}, {"awq": {}}]}, [("spec", "passes", 0, "rtn", "zz"), ("spec", "passes", 1, "awq")]),
        ({"someday": 1, "retry": {"limit": -1}}, []),
        ({}, []),
    ],
)
def test_names_that_we_do_not_know_and_nothing_else(changed: dict[str, Any], places: list[Any]) -> None:
    assert list(merely_unknown(problems_of(copy.deepcopy(SPEC) | changed, PASSES))) == places


def test_one_complaint_a_place_and_not_too_many() -> None:
    assert problems(worker={"resources": {"limits": {"cpu": "much"}}}).count("spec.worker") == 1
    assert "and 2 more" in problems(**{f"wrong{n}": n for n in range(7)})


def test_without_the_generated_table_passes_are_the_workers_matter() -> None:
    assert problems({}, passes=[{"awq": {"x": 1}}]) == ""


def test_the_generated_table_knows_the_passes() -> None:
    assert {"scheme", "groupSize", "ignore"} <= set(known_passes().get("rtn", ["scheme", "groupSize", "ignore"]))


def test_neighbours_ignore_case() -> None:
    assert did_you_mean("GROUPSIZE", ["groupSize", "scheme"]) == "did you mean groupSize?"
    assert did_you_mean("x", []) == "nothing is known here"


def test_what_may_stand_where() -> None:
    assert {"model", "output", "passes"} <= set(field_names(()))
    assert {"uri", "revision"} <= set(field_names(("model", "source")))
    assert field_names(("passes", 0, "rtn")) == []
