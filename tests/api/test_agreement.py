"""The models and the API server take and refuse the same specs; a misspelt name is never dropped, whoever sends it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from api_server import Server, manifest
from pydantic import ValidationError
from specs import GOOD, MISSPELT, WRONG_VALUES, Spec

from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker.errors import UserError
from kompressor_worker.passes import build_passes
from local_cluster import CommandError


def model_refusal(spec: Spec) -> str:
    """What `kompressor run` says to a spec; empty if it is taken."""
    try:
        build_passes(CompressionJobSpec.model_validate(spec).passes)
    except (ValidationError, UserError) as error:
        return str(error)
    return ""


@pytest.mark.cluster
@pytest.mark.parametrize("space", ["open", "guarded"])
@pytest.mark.parametrize("case", GOOD)
def test_both_take_what_is_good(server: Server, space: str, case: str) -> None:
    job = manifest(space, **GOOD[case])
    assert model_refusal(job["spec"]) == ""
    assert server.create(job).refusal == ""
    assert server.apply(job).refusal == ""


@pytest.mark.cluster
@pytest.mark.parametrize("case", WRONG_VALUES)
def test_both_refuse_wrong_values(server: Server, case: str) -> None:
    spec, text = WRONG_VALUES[case]
    job = manifest("open", **spec)
    assert model_refusal(job["spec"])
    for answer in (server.create(job), server.create(job, validation="Ignore"), server.apply(job)):
        assert text in answer.refusal


@pytest.mark.cluster
@pytest.mark.parametrize("case", MISSPELT)
def test_policy_refuses_misspelt_names_of_every_client(server: Server, case: str) -> None:
    spec, _, text = MISSPELT[case]
    job = manifest("guarded", **spec)
    assert model_refusal(job["spec"])
    for answer in (server.create(job), server.create(job, validation="Ignore"), server.apply(job)):
        assert text in answer.refusal


@pytest.mark.cluster
@pytest.mark.parametrize("case", MISSPELT)
def test_misspelt_names_survive_where_there_is_no_policy(server: Server, case: str) -> None:
    """The operator can refuse only what the API server has kept."""
    spec, wrong, _ = MISSPELT[case]
    job = manifest("open", **spec)
    for answer in (server.create(job), server.create(job, validation="Ignore"), server.apply(job)):
        assert answer.refusal == ""
        assert f'"{wrong}":' in json.dumps(answer.object["spec"])


@pytest.mark.cluster
@pytest.mark.parametrize("flags", [[], ["--validate=false"], ["--validate=ignore"], ["--server-side"]])
@pytest.mark.parametrize("case", ["in the spec", "of a pass", "in a pass"])
def test_kubectl_refuses_misspelt_names(server: Server, case: str, flags: list[str]) -> None:
    spec, _, text = MISSPELT[case]
    with pytest.raises(CommandError) as refused:
        server.cluster.kubectl("apply", *flags, "-f", "-", stdin=json.dumps(manifest("guarded", **spec)))
    assert text in refused.value.stderr


@pytest.mark.cluster
def test_file_is_for_one_machine_only(server: Server) -> None:
    """The one thing that the models take and a cluster does not: there is no such disk there."""
    job = manifest("open", model={"source": {"uri": "file:///models/llama"}})
    assert model_refusal(job["spec"]) == ""
    assert "in a cluster use s3:// or pvc://" in server.create(job).refusal


@pytest.mark.parametrize("name", ["path_style", "credentials_secret"])
def test_models_take_no_python_names_from_manifests(name: str) -> None:
    job = manifest("open", output={"uri": "s3://models/out", name: "x"})
    assert name in model_refusal(job["spec"])


EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.yaml"))


@pytest.mark.cluster
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_taken(server: Server, example: Path) -> None:
    server.cluster.kubectl("apply", "--dry-run=server", "-n", "guarded", "-f", example)
    (job,) = [one for one in yaml.safe_load_all(example.read_text()) if one["kind"] == "CompressionJob"]
    assert model_refusal(job["spec"]) == ""


@pytest.mark.cluster
@pytest.mark.parametrize("stray", ["suspend", "Spec", "retries"])
def test_a_name_beside_spec_is_refused_and_never_dropped(server: Server, stray: str) -> None:
    """What was indented too little would otherwise silently mean the default."""
    guarded, free = manifest("guarded") | {stray: True}, manifest("open") | {stray: True}
    for answer in (server.create(guarded), server.create(guarded, validation="Ignore"), server.apply(guarded)):
        assert f"no such name: {stray}; fields of the job go under spec" in answer.refusal
    for answer in (server.create(free), server.create(free, validation="Ignore"), server.apply(free)):
        assert answer.refusal == "" and answer.object[stray] is True
    for flags in ([], ["--validate=false"], ["--server-side"]):
        with pytest.raises(CommandError, match=f"no such name: {stray}"):
            server.cluster.kubectl("apply", *flags, "-f", "-", stdin=json.dumps(guarded))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"uri": "pvc://models/a%62"}, {"uri": "pvc://models/ab"}),
        ({"uri": "pvc://models/%2e/ab"}, {"uri": "pvc://models/ab/"}),
        ({"uri": "s3://b/x", "endpoint": "http://store:80"}, {"uri": "s3://b/x/", "endpoint": "http://STORE/"}),
        ({"uri": "s3://b/x", "endpoint": "https://store"}, {"uri": "s3://b//x", "endpoint": "https://store:443"}),
    ],
)
def test_two_spellings_of_one_place(one: Spec, other: Spec) -> None:
    """More than the rules of the CRD can tell; the operator and `kompressor run` refuse these."""
    assert "is the source itself" in model_refusal(manifest("a", model={"source": one}, output=other)["spec"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"uri": "s3://b/x#1"}, {"uri": "s3://b/x#2"}),
        ({"uri": "s3://b/a%62"}, {"uri": "s3://b/ab"}),
        ({"uri": "s3://b/x"}, {"uri": "s3://B/x"}),
        ({"uri": "s3://b/x"}, {"uri": "s3://b/x..y"}),
        ({"uri": "s3://b/x", "endpoint": "http://store:8080"}, {"uri": "s3://b/x", "endpoint": "http://store"}),
        ({"uri": "pvc://models/x"}, {"uri": "pvc://models/xy"}),
    ],
)
def test_two_places_that_look_alike(one: Spec, other: Spec) -> None:
    assert model_refusal(manifest("a", model={"source": one}, output=other)["spec"]) == ""
