"""A manifest outside of a cluster: names that are misspelt, and what only a cluster, or only one machine, can have."""

from __future__ import annotations

from typing import Any

import pytest

from kompressor_worker.commands import refuse_file_uris
from kompressor_worker.errors import UserError
from kompressor_worker.job import Job, validate_spec

SPEC = {"model": {"source": {"uri": "s3://a/b"}}, "output": {"uri": "s3://a/c"}, "passes": [{"rtn": {"scheme": "W8A8"}}]}


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            {"calibration": {"dataset": {"uri": "s3://a/d", "feild": "x"}}},
            "spec.calibration.dataset.feild: is not a field; did you mean field?",
        ),
        (
            {"evaluation": {"dataset": {"uri": "s3://a/d"}, "gates": [{"metric": "kl", "maxKl": 1}]}},
            "spec.evaluation.gates.0.maxKl: is not a field; did you mean maxKL?",
        ),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(section: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        validate_spec(SPEC | section, "job.yaml")
    assert said in str(caught.value)


def test_a_recipe_needs_a_cluster() -> None:
    spec = {name: value for name, value in SPEC.items() if name != "passes"} | {"recipeRef": {"name": "w4"}}
    with pytest.raises(UserError, match=r"spec\.recipeRef: a recipe \(w4\) needs a cluster; write its passes into spec\.passes"):
        validate_spec(spec, "job.yaml")


def test_a_pods_own_disk_holds_no_data() -> None:
    spec = validate_spec(SPEC | {"calibration": {"dataset": {"uri": "file:///data/a.jsonl"}}}, "job.yaml")
    job = Job("a", "b", "c", spec, "d")
    refuse_file_uris(job, in_cluster=False)
    with pytest.raises(UserError, match=r"spec\.calibration\.dataset\.uri: file:///data/a\.jsonl is a pod's own disk"):
        refuse_file_uris(job, in_cluster=True)
