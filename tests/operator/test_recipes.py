"""A recipe in a job: what is merged, when it is read, and that the ConfigMap is the truth from then on."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from kcj_builders import NOW, PASSES, SETTINGS, child, child_body, complete, kcj, pod

from kompressor_api.names import Step
from kompressor_operator import manifests
from kompressor_operator.cluster import ApiError
from kompressor_operator.decide import Decision, View, decide
from kompressor_operator.manifests import RECIPE_FILE, spec_digest, stem
from kompressor_operator.observed import ChildJob, CompressionJob, Manifest
from kompressor_operator.pods import ChildPod
from kompressor_operator.policies import POLICIES
from kompressor_operator.recipes import Resolved, combined, fetch
from kompressor_operator.refusals import Refusal
from kompressor_operator.store import observe

CALIBRATION = {"dataset": {"uri": "s3://data/a.jsonl"}, "samples": 8}
RECIPE: Manifest = {
    "passes": [{"gptq": {"scheme": "W4A16"}}],
    "calibration": CALIBRATION,
    "gates": [{"metric": "kl", "maxKL": 0.05}],
}
HELD_OUT = {"dataset": {"uri": "s3://data/b.jsonl"}}


def job(status: dict[str, Any] | None = None, kind: str = "CompressionRecipe", **spec: Any) -> CompressionJob:
    ref = {"kind": kind, "name": "gptq-4"}
    return kcj(status=status, **({"passes": None, "recipeRef": ref, "evaluation": HELD_OUT} | spec))


class Shelf:
    """An API server that holds one recipe at most, and ConfigMaps."""

    def __init__(self, recipe: Manifest | None) -> None:
        self.recipe, self.maps, self.refuses = copy.deepcopy(recipe), dict[str, Manifest](), 0
        self.made: list[str] = []

    async def get(self, kind: str, namespace: str, name: str) -> Manifest:
        if self.refuses and kind.endswith("Recipe"):
            raise ApiError("reading", self.refuses, "Forbidden", "may not")
        found = self.maps.get(name) if kind == "ConfigMap" else self.recipe
        if found is None:
            raise ApiError("reading", 404, "NotFound", f"no {name}")
        return found if kind == "ConfigMap" else {"kind": kind, "metadata": {"name": name, "generation": 7}, "spec": found}

    async def create(self, manifest: Manifest) -> Manifest:
        name = manifest["metadata"]["name"]
        if name in self.maps:
            raise ApiError("creating", 409, "AlreadyExists", "there")
        self.made.append(name)
        self.maps[name] = manifest
        return manifest


async def read(shelf: Shelf, about: CompressionJob) -> Resolved:
    found = await fetch(shelf, about)  # type: ignore[arg-type]
    assert isinstance(found, Resolved), found
    return found


def test_a_section_of_the_job_replaces_the_recipes_whole_one() -> None:
    plain = combined(job().spec, RECIPE)
    assert "recipeRef" not in plain and plain["passes"] == RECIPE["passes"] and plain["calibration"] == CALIBRATION
    assert plain["evaluation"] == HELD_OUT | {"gates": RECIPE["gates"]}
    own = {"dataset": {"uri": "s3://mine/x"}}
    gates = [{"metric": "perplexity", "maxIncrease": "1%"}]
    mine = combined(job(calibration=own, evaluation=HELD_OUT | {"gates": gates}).spec, RECIPE)
    assert mine["calibration"] == own and mine["evaluation"]["gates"] == gates
    assert combined(job(evaluation=HELD_OUT | {"gates": []}).spec, RECIPE)["evaluation"]["gates"] == RECIPE["gates"]


async def test_what_was_read_first_is_what_counts() -> None:
    """The recipe is edited and then deleted: between the ConfigMap and the status, and after."""
    shelf = Shelf(RECIPE)
    first = await read(shelf, job())
    assert first.recipe == {"kind": "CompressionRecipe", "name": "gptq-4", "generation": 7, "digest": spec_digest(RECIPE)}
    assert json.loads(shelf.maps[stem(job())]["data"][RECIPE_FILE])["spec"] == RECIPE
    for changed in (RECIPE | {"passes": [{"rtn": {"scheme": "W8A8"}}]}, None):
        shelf.recipe = changed
        for status in ({}, {"recipe": first.recipe}, {"jobName": "llama-1"}):
            assert await read(shelf, job(status)) == first
    assert len(shelf.made) == 1


async def test_what_may_change_while_it_runs_is_the_resources() -> None:
    shelf = Shelf(RECIPE)
    await read(shelf, job())
    later = await read(shelf, job({"jobName": "x"}, retry={"limit": 9}, suspend=None, ttlSecondsAfterFinished=5))
    assert later.spec["retry"] == {"limit": 9} and later.spec["ttlSecondsAfterFinished"] == 5 and "suspend" not in later.spec


@pytest.mark.parametrize(
    ("recipe", "refuses", "about", "reason", "words", "final"),
    [
        (None, 0, job(), "RecipeNotFound", "there is no CompressionRecipe gptq-4 in namespace team: create it", False),
        (RECIPE, 403, job(kind="ClusterCompressionRecipe"), "Forbidden", "name a CompressionRecipe", False),
        (RECIPE, 0, job(evaluation=None), "InvalidSpec", "has gates, and spec.evaluation is missing", True),
        (RECIPE, 0, job({"recipe": {"digest": "sha256:old"}}), "RecipeNotFound", "was deleted, and CompressionRecipe gptq-4 is not", False),
    ],
)
async def test_refusals(recipe: Manifest | None, refuses: int, about: CompressionJob, reason: str, words: str, final: bool) -> None:
    shelf = Shelf(recipe)
    shelf.refuses = refuses
    found = await fetch(shelf, about)  # type: ignore[arg-type]
    assert isinstance(found, Refusal) and (found.reason, found.final) == (reason, final) and words in found.message
    assert shelf.made == []


async def test_a_strangers_config_map_is_a_conflict() -> None:
    shelf = Shelf(RECIPE)
    shelf.maps[stem(job())] = child_body(owner="another")
    found = await fetch(shelf, job())  # type: ignore[arg-type]
    assert isinstance(found, Refusal) and found.reason == "NameConflict"


def view(about: CompressionJob, *children: ChildJob | ChildPod, spec: Manifest | None = None) -> Decision:
    observed = observe([c for c in children if isinstance(c, ChildJob)], [c for c in children if isinstance(c, ChildPod)], live=True)
    recipe = {"kind": "CompressionRecipe", "name": "gptq-4"} if spec else None
    return decide(View(about, observed, NOW, SETTINGS, PASSES | {"gptq": ["scheme"]}, spec, recipe, misspelt=True), POLICIES)


LOOKING = child(0, name="llama-preflight", step=Step.PREFLIGHT)


@pytest.mark.parametrize(
    ("about", "children", "wanted"),
    [
        (job(), [], True),
        (job(preflight="Job"), [], True),
        (job(preflight="Job"), [LOOKING], False),
        (job(preflight="Job"), [replace(LOOKING, ended="Complete")], True),
        (job({"jobName": "llama-1"}), [child(), pod()], False),
        (job({"jobName": "llama-1"}), [complete(), pod(exit=0)], True),
        (job(), [child(), pod()], True),
        (job(suspend=True), [], False),
    ],
)
def test_it_is_read_where_something_is_made_or_ends(about: CompressionJob, children: list[Any], wanted: bool) -> None:
    assert view(about, *children).resolve is wanted


def test_the_worker_is_given_what_was_resolved() -> None:
    spec = combined(job().spec, RECIPE)
    decision = view(job(), spec=spec)
    assert decision.start and decision.verdict and decision.verdict.facts["recipe"]["name"] == "gptq-4"
    assert decision.verdict.facts["specDigest"] == spec_digest(spec)
    body = manifests.worker_job(
        replace(
            job(), spec=combined(job(calibration=CALIBRATION | {"dataset": {"uri": "s3://d/x", "credentialsSecret": "data"}}).spec, RECIPE)
        ),
        decision.start,
        SETTINGS,
    )
    prefixes = [source["prefix"] for source in body["spec"]["template"]["spec"]["containers"][0]["envFrom"]]
    assert "DATA_" in prefixes, "the recipe's data comes with its credentials"
    first = view(job(preflight="Job"), spec=spec)
    assert [c["kind"] for c in first.create] == ["Role", "ServiceAccount", "Job"], "the ConfigMap is there"


def test_what_is_wrong_in_a_recipe_names_it() -> None:
    decision = view(job(), spec=combined(job().spec, {"passes": [{"gptq": {"shceme": "W4A16"}}]}))
    assert decision.verdict and decision.verdict.reason == "InvalidSpec"
    assert decision.verdict.message.startswith("with CompressionRecipe gptq-4: spec.passes[0].gptq.shceme: unknown parameter")


def test_a_job_without_a_recipe_never_asks() -> None:
    assert view(kcj()).resolve is False
