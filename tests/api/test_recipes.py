"""What the API server takes as a recipe: the same passes, data and gates as in a job, with the same strictness about names."""

from __future__ import annotations

import json
from typing import Any

import pytest
from api_server import Server
from pydantic import ValidationError

from kompressor_api import names
from kompressor_api.v1alpha1 import RecipeSpec
from local_cluster import CommandError

pytestmark = pytest.mark.cluster

Spec = dict[str, Any]

PASSES = [{"rtn": {"scheme": "W4A16", "groupSize": 128}}]
DATA = {"uri": "s3://data/a.jsonl"}
GATE = {"metric": "kl", "maxKL": 0.1}

WRONG: dict[str, tuple[Spec, str]] = {
    "no passes": ({}, "spec.passes: Required value"),
    "two in one": ({"passes": [{"rtn": {"scheme": "W8A8"}, "gptq": {}}]}, "spec.passes[0]"),
    "an unknown scheme": ({"passes": [{"rtn": {"scheme": "W5"}}]}, "spec.passes[0].rtn.scheme"),
    "two gates of a metric": ({"passes": PASSES, "gates": [GATE, {"metric": "kl", "maxKL": 1}]}, "a metric has one gate"),
    "a gate with the other's limit": (
        {"passes": PASSES, "gates": [{"metric": "perplexity", "maxKL": 1}]},
        "has maxIncrease and no other",
    ),
    "two columns": ({"passes": PASSES, "calibration": {"dataset": {**DATA, "field": "a", "tokens": "b"}}}, "exclude each other"),
    "a laptop's disk": ({"passes": PASSES, "calibration": {"dataset": {"uri": "file:///tmp/a"}}}, "in a cluster use s3:// or pvc://"),
}
MISSPELT: dict[str, tuple[Spec, str]] = {
    "in the recipe": ({"passes": PASSES, "gate": [GATE]}, "spec: no such name: gate; known are passes, calibration, gates"),
    "of a pass": ({"passes": [{"rtm": {}}]}, "spec.passes[]: no such name: rtm"),
    "in a pass": ({"passes": [{"rtn": {"scheme": "W8A8", "groupsize": 64}}]}, "spec.passes[].rtn: no such name: groupsize"),
    "what only jobs have": ({"passes": PASSES, "output": {"uri": "s3://a/b"}}, "spec: no such name: output"),
}


def apply(server: Server, spec: Spec, kind: str = names.RECIPE_KIND, namespace: str = "open", *flags: str) -> str:
    """What is refused; empty if nothing is."""
    body = {"apiVersion": names.API_VERSION, "kind": kind, "metadata": {"name": "w4"}, "spec": spec}
    try:
        server.cluster.kubectl("apply", "-n", namespace, *flags, "-f", "-", stdin=json.dumps(body))
    except CommandError as error:
        return error.stderr
    return ""


@pytest.mark.parametrize("kind", [names.RECIPE_KIND, names.CLUSTER_RECIPE_KIND])
def test_a_recipe_is_kept_and_may_be_edited(server: Server, kind: str) -> None:
    spec = {"passes": PASSES, "calibration": {"dataset": DATA, "samples": 64}, "gates": [GATE]}
    RecipeSpec.model_validate(spec)
    assert apply(server, spec, kind, "guarded") == ""
    assert apply(server, {**spec, "passes": [{"rtn": {"scheme": "W8A8"}}]}, kind, "guarded") == ""
    server.cluster.kubectl("delete", kind.lower(), "w4", "-n", "guarded")


@pytest.mark.parametrize("case", WRONG)
def test_models_and_server_refuse_what_is_wrong(server: Server, case: str) -> None:
    spec, text = WRONG[case]
    assert text in apply(server, spec, names.RECIPE_KIND, "open", "--dry-run=server")
    if case not in ("an unknown scheme", "a laptop's disk"):  # a pass's parameters are its own; a laptop has that disk
        with pytest.raises(ValidationError):
            RecipeSpec.model_validate(spec)


@pytest.mark.parametrize("kind", [names.RECIPE_KIND, names.CLUSTER_RECIPE_KIND])
@pytest.mark.parametrize("case", MISSPELT)
def test_misspelt_names_are_refused_for_every_client(server: Server, case: str, kind: str) -> None:
    spec, text = MISSPELT[case]
    for flags in (["--validate=false"], ["--server-side"]):
        assert text in apply(server, spec, kind, "guarded", "--dry-run=server", *flags)
