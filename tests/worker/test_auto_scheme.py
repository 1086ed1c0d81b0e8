"""Schemes under a budget: the program finds the best there is, results stay within it and are what was chosen, the same after every
interruption; what cannot be is refused from headers."""

from __future__ import annotations

import itertools
import json
import logging
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import smaller
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_allocation import interrupted
from test_calibrated import TOLERANCE, compress, data, job_of, measured, rows_of
from test_resume import files_of

import jobs
from independent import decompressed, expand, tensors_of
from kompressor_worker.errors import UserError
from kompressor_worker.job import load_job
from kompressor_worker.passes.plan_trials import PlanTrials
from kompressor_worker.passes.scheme_choice import SchemeGroup, solved, total, weight_of
from kompressor_worker.passes.scheme_costs import price_at, spread
from kompressor_worker.passes.scheme_plans import APART, NEXT, plans
from kompressor_worker.pipeline import Limits
from kompressor_worker.plan import make_plan
from kompressor_worker.progress import Progress
from kompressor_worker.report_html import render
from kompressor_worker.run import run
from models import trained_model

Passes = list[dict[str, Any]]
CANDIDATES = ["W3A16", "W4A16", "W4A16:32", "W8A16"]
AUTO = {"budget": {"bits": 4.26}, "candidates": CANDIDATES}


def weigh(folder: Path) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(folder).values())


# ---- the program


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_no_other_choice_within_the_budget_costs_less(seed: int) -> None:
    """Beside every other one there is, with candidates that a group cannot have, and ties."""
    chance = random.Random(seed)
    sizes = [[chance.randrange(1, 9) for _ in range(4)] for _ in range(4)]
    costs = [{c: float(chance.randrange(5)) for c in range(4) if c == 0 or chance.random() < 0.8} for _ in range(4)]
    least = sum(min(size[c] for c in cost) for cost, size in zip(costs, sizes, strict=True))
    budget = least + chance.randrange(12)
    chosen = solved(costs, sizes, budget)

    def weight(choice: tuple[int, ...] | list[int]) -> int:
        return sum(size[c] for size, c in zip(sizes, choice, strict=True))

    assert weight(chosen) <= budget and all(c in cost for c, cost in zip(chosen, costs, strict=True))
    best = min(total(costs, choice) for choice in itertools.product(*costs) if weight(choice) <= budget)
    assert total(costs, chosen) == pytest.approx(best)


def test_of_groups_that_are_alike_the_first_gets_more() -> None:
    alike = [{0: 5.0, 1: 1.0}] * 4
    assert solved(alike, [[10, 20]] * 4, 60) == [1, 1, 0, 0]
    # of what costs the same the smaller, of what also weighs the same the first one asked for
    assert solved([{0: 1.0, 1: 1.0, 2: 1.0}], [[20, 10, 10]], 100) == [1]


@given(st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_plans_beside_the_programs(seed: int) -> None:
    """Each next best one is, of all that are apart enough from those before, beside every other one there is; what one would choose without
    measuring is the best of its kind that there is room for."""
    chance, layers = random.Random(seed), [0, 0, 1, 1, 2, 2]
    sizes = [tuple(sorted(chance.sample(range(1, 9), 3))) for _ in layers]
    costs = [dict(enumerate(sorted((chance.random() for _ in range(3)), reverse=True))) for _ in layers]
    groups = [SchemeGroup(f"{number}", (), size) for number, size in enumerate(sizes)]
    budget = sum(size[0] for size in sizes) + chance.randrange(16)
    found = plans(costs, [groups], layers, budget)
    assert all(weight_of(groups, plan.chosen) <= budget for plan in found) and len({plan.chosen for plan in found}) == len(found)
    possible = [c for c in itertools.product(range(3), repeat=len(layers)) if weight_of(groups, c) <= budget]
    chain, tried = [found[0].chosen], {plan.chosen for plan in found}  # a next best one may be what a uniform one is
    for _ in range(NEXT):
        far = [c for c in possible if all(sum(a != b for a, b in zip(c, known, strict=True)) >= -(-6 // APART) for known in chain)]
        if far:
            chain.append(min(far, key=lambda c: total(costs, c)))
    assert found[0].kind == "program" and total(costs, chain[0]) == pytest.approx(min(total(costs, c) for c in possible), rel=1e-5)
    assert set(chain) <= tried and sum(plan.kind == "next best" for plan in found) <= NEXT
    kinds = {"uniform": [(c,) * 6 for c in range(3)], "first and last": [(h, h, c, c, h, h) for h in range(3) for c in range(3) if h != c]}
    for kind, ways in kinds.items():
        fitting = [total(costs, way) for way in ways if weight_of(groups, way) <= budget]
        mine = [total(costs, plan.chosen) for plan in found if plan.kind == kind] or [total(costs, found[0].chosen)]
        assert not fitting or mine[0] <= min(fitting) + 1e-9


def test_prices_between_blocks_that_were_followed() -> None:
    assert spread(3, 16) == {0, 1, 2} and spread(1, 16) == {0}
    assert len(spread(80, 16)) == 16 and {0, 79} <= spread(80, 16)
    assert price_at(2, {0: 1.0, 4: 100.0}) == pytest.approx(10.0)
    assert (price_at(9, {0: 1.0, 4: 100.0}), price_at(3, {1: 7.0}), price_at(3, {})) == (100.0, 7.0, 1.0)


# ---- jobs


@pytest.mark.parametrize("algorithm", ["gptq", "rtn"])
def test_a_job_is_within_its_budget_and_is_what_it_says(algorithm: str, tmp_path: Path) -> None:
    passes: Passes = [{"smoothQuant": {}}, {"autoScheme": {**AUTO, "algorithm": algorithm}}, {"kvCache": {}}]
    job = job_of(tmp_path, "llama", passes)
    expected = make_plan(load_job(job, {}), {}).as_json()["autoScheme"]
    report = compress(job)
    said, out = report["autoScheme"], tmp_path / "out"
    assert {name: said[name] for name in expected} == expected
    assert weigh(out) == said["bytes"] == report["result"]["tensorBytes"] <= said["mostBytes"] <= said["budgetBytes"]
    schemes = {g["scheme"] for g in said["groups"]}
    assert len(schemes) > 1, "all alike"
    seen = {name: (scheme.weights.num_bits, scheme.weights.group_size) for name, _, scheme in decompressed(out)}
    asked = {"W3A16": (3, 128), "W4A16": (4, 128), "W4A16:32": (4, 32), "W8A16": (8, None)}
    for group in said["groups"]:
        members = [name for name in seen if name == group["name"] or fused(name) == group["name"]]
        assert len(members) == group["linears"] and {seen[name] for name in members} == {asked[group["scheme"]]}
        costs = [group["costs"][name] for name in CANDIDATES]
        assert costs[0] > costs[1] > costs[3] > 0, "fewer bits cost more"
    sizes, predicted = zip(*said["sweep"], strict=True)
    assert list(sizes) == sorted(set(sizes)) and list(predicted) == sorted(predicted, reverse=True)
    assert min(predicted) <= said["predictedKl"] <= max(predicted)
    assert measured(out, rows_of(job)) == pytest.approx(report["evaluation"]["perplexityAfter"], rel=TOLERANCE)
    page = render(report).decode()
    assert "Size against perplexity" in page and "Adaptive bits" in page and 'class="curve"' in page


@pytest.mark.parametrize("number", [0, 2])
def test_what_is_tried_is_what_comes_out(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of least KL is published, whichever that is, and has the KL that the trial says on the same rows, by transformers."""
    found = PlanTrials.found

    def favour(self: PlanTrials) -> dict[str, torch.Tensor]:
        kl = found(self)["kl"]
        kl[number] -= 1.0
        return {"kl": kl}

    monkeypatch.setattr(PlanTrials, "found", favour)
    job = job_of(tmp_path, "llama", [{"autoScheme": {**AUTO, "budget": {"bits": 6.2}}}])
    said, rows = compress(job)["autoScheme"], rows_of(job, "calibration")[:32]  # 16 and those in the same batch
    plan = said["plans"][number]
    assert plan["name"] == ("program", "W4A16:32 everywhere", "W8A16 in the first and last blocks, W4A16 between")[number]
    assert weigh(tmp_path / "out") == said["bytes"] == plan["bytes"]
    assert plan["kl"] + 1.0 == pytest.approx(float(smaller.divergences(trained_model("llama"), tmp_path / "out", rows).mean()), rel=0.15)


def fused(name: str) -> str:
    block, _, last = name.rpartition(".")
    return f"{block}.{'qkv' if last in ('q_proj', 'k_proj', 'v_proj') else 'gate_up'}" if last not in ("o_proj", "down_proj") else name


def test_an_earlier_pass_keeps_what_it_took_and_counts(tmp_path: Path) -> None:
    passes: Passes = [
        {"rtn": {"scheme": "W8A16", "targets": ["re:.*down_proj"]}},
        {"autoScheme": {"budget": {"bytes": "1900k"}, "candidates": ["W3A16:64", "W4A16:64", "none"]}},
    ]
    report = compress(job_of(tmp_path, "llama", passes))
    assert {e["scheme"] for n, e in report["linears"].items() if n.endswith("down_proj")} == {"W8A16"}
    assert not any("down_proj" in g["name"] for g in report["autoScheme"]["groups"])
    assert weigh(tmp_path / "out") == report["autoScheme"]["bytes"] <= 1_900_000
    assert 1_900_000 - report["autoScheme"]["bytes"] < 40_000, "room for more was left"


@pytest.mark.parametrize("before", [{"rotate": {}}, {"awq": {"scheme": "W4A16", "targets": ["re:.*o_proj"], "groupSize": 64}}])
def test_behind_passes_that_change_weights(before: dict[str, Any], tmp_path: Path) -> None:
    job = job_of(tmp_path, "llama", [before, {"autoScheme": AUTO}])
    report = compress(job)
    assert weigh(tmp_path / "out") == report["autoScheme"]["bytes"] <= report["autoScheme"]["budgetBytes"]
    assert measured(tmp_path / "out", rows_of(job)) == pytest.approx(report["evaluation"]["perplexityAfter"], rel=TOLERANCE)


def test_smaller_and_pruned_before(tmp_path: Path) -> None:
    passes: Passes = [{"pruneWidth": {"ratio": 0.25}}, {"wanda": {"pattern": "2:4"}}, {"autoScheme": AUTO}]
    report = compress(job_of(tmp_path, "llama", passes))
    assert weigh(tmp_path / "out") == report["autoScheme"]["bytes"] <= report["autoScheme"]["budgetBytes"]
    assert report["result"]["sparsity"] == pytest.approx(0.5, abs=0.01)


# ---- mixtures


def test_a_mixture_that_transformers_reads(tmp_path: Path) -> None:
    """All experts alike, whatever there is to choose from."""
    job = job_of(tmp_path, "qwen3_moe", [{"autoScheme": {**AUTO, "experts": "model"}}])
    report = compress(job)
    groups = report["autoScheme"]["groups"]
    assert len({g["scheme"] for g in groups if ".experts" in g["name"]}) == 1 and len({g["scheme"] for g in groups}) > 1
    assert not any("differ in their schemes" in w for w in report["warnings"])
    assert measured(tmp_path / "out", rows_of(job)) == pytest.approx(report["evaluation"]["perplexityAfter"], rel=TOLERANCE)


@pytest.mark.parametrize(("experts", "count", "says"), [("layer", 4, "serve this result with vLLM"), ("single", 32, "neither vLLM nor")])
def test_experts_by_layer_and_by_themselves(experts: str, count: int, says: str, tmp_path: Path) -> None:
    """Who reads that is said; here it is the library."""
    job = job_of(tmp_path, "qwen3_moe", [{"autoScheme": {**AUTO, "budget": {"bits": 3.6}, "experts": experts}}])
    report = compress(job)
    routed = {g["name"]: g["scheme"] for g in report["autoScheme"]["groups"] if ".experts" in g["name"]}
    assert len(routed) == count and len(set(routed.values())) > 1
    for name, entry in report["linears"].items():
        if ".experts." in name:
            group = name.rpartition(".")[0] if experts == "single" else name.partition(".experts.")[0] + ".experts"
            assert routed[group].partition(":")[0] == entry["scheme"]
    assert any(says in w for w in report["warnings"])
    assert weigh(tmp_path / "out") == report["autoScheme"]["bytes"] <= report["autoScheme"]["budgetBytes"]
    plain = expand(tmp_path / "out", tmp_path / "plain")
    assert measured(plain, rows_of(job)) == pytest.approx(report["evaluation"]["perplexityAfter"], rel=TOLERANCE)


# ---- interruptions


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_killed_in_the_survey_and_behind_it(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, sections = trained_model(kind).as_uri(), data(tmp_path, kind)

    def job(out: str) -> Path:
        body = jobs.manifest(source, (tmp_path / out).as_uri(), [{"autoScheme": AUTO}])
        body["spec"] |= sections
        return jobs.write(tmp_path / f"{out}.json", body)

    run(load_job(job("whole"), {}), {}, Progress(), threading.Event(), Limits(snapshot_seconds=0))
    whole = files_of(tmp_path / "whole")
    caplog.set_level(logging.INFO)
    for at in ("survey 1: model.layers.2", "survey 1: head", "survey 2: model.layers.1", "survey 2: head", "model.layers.2"):
        interrupted(job("cut"), at)
    run(load_job(job("cut"), {}), {}, Progress(), threading.Event(), Limits(snapshot_seconds=0))
    cut = files_of(tmp_path / "cut")
    assert cut.keys() == whole.keys()
    assert [n for n in whole if n != "report.html" and cut[n] != whole[n]] == []
    assert [r.getMessage() for r in caplog.records if "goes on at unit" in r.getMessage()]
    assert json.loads(whole["kompressor.json"])["autoScheme"]["groups"]


# ---- what is refused


@pytest.mark.parametrize(
    ("auto", "says"),
    [
        ({"budget": {"bits": 3.0}}, r"a budget of 3 bits a weight, and the smallest candidates take 3\.12\d+ with their scales; raise"),
        ({"budget": {"bytes": "1M"}}, r"a budget of 1M \(1,000,000 bytes\), and with the smallest candidates the result takes 1,4\d\d,\d"),
        ({"budget": {"bytes": "1M", "bits": 4.0}}, "give either bits, such as 4.25, or bytes, such as 12Gi"),
        ({"budget": {"bytes": "many"}}, "budget.bytes"),
        ({"candidates": ["W4A16", "W5A16"]}, "'W5A16' is not a scheme; did you mean W"),
        ({"candidates": ["W4A16", "W4A16:128"]}, "'W4A16:128' is 'W4A16' once more; leave one of them out"),
        ({"candidates": ["W4A16", "W8A16:7000"]}, r"candidate W8A16:7000 fits no targeted linear: model\.layers\.0\..*not divisible by"),
        ({"candidates": ["W4A16", "W8A8:32"]}, "the groups of W8A8 are fixed; leave 32 out"),
        ({"candidates": ["W4A16", "MXFP4"]}, "candidate MXFP4: gptq does not make it; choose algorithm: rtn"),
        ({"candidates": ["W4A16", "FP8"], "algorithm": "rtn"}, "candidate FP8: its activations have calibrated scales"),
        ({"candidates": ["W4A16:96", "W8A16:96"]}, r"no candidate fits model\.layers\.0\.self_attn\.\w+: .*not divisible by groupSize 96"),
        ({"targets": ["Linear", "lm_head"]}, "autoScheme: lm_head is the head, which no survey tries"),
        ({"targets": ["re:.*q_proj"]}, "would be left exact, but .*q_proj, which loaders fuse with it"),
    ],
    ids=str,
)
def test_impossible_requests_are_refused_from_headers(auto: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        make_plan(load_job(job_of(tmp_path, "llama", [{"autoScheme": {**AUTO, **auto}}]), {}), {})


@pytest.mark.parametrize(
    ("passes", "says"),
    [
        ([{"autoScheme": AUTO}, {"autoScheme": AUTO}], r"passes\[1\]\.autoScheme: there is one at passes\[0\] already"),
        ([{"pruneLayers": {"layers": 3}}, {"autoScheme": AUTO}], "an earlier pass takes blocks out of it; publish"),
        ([{"autoScheme": AUTO}, {"gptq": {"scheme": "W4A16"}}], r"leave no linear layer to quantise \(30 in the model, 28 taken"),
    ],
    ids=str,
)
def test_impossible_orders_are_refused_from_headers(passes: Passes, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        make_plan(load_job(job_of(tmp_path, "llama", passes), {}), {})
