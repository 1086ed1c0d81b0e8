"""Zeros that are allocated by measured error: as many as were asked for, where they cost least, the same after every interruption."""

from __future__ import annotations

import itertools
import json
import logging
import random
import threading
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_calibrated import compress, data, job_of
from test_resume import files_of

import jobs
from kompressor_worker.errors import UserError
from kompressor_worker.job import load_job
from kompressor_worker.passes.allocation import LARGEST, SHARES, allocate
from kompressor_worker.passes.error_curves import by_magnitude, by_row
from kompressor_worker.passes.zeroing import least
from kompressor_worker.pipeline import Limits
from kompressor_worker.plan import make_plan
from kompressor_worker.progress import Progress, Snapshot
from kompressor_worker.report_html import render
from kompressor_worker.run import run
from kompressor_worker.sparsity import Sparsity
from models import trained_model

Passes = list[dict[str, Any]]
ALLOCATED = {"sparsity": 0.6, "allocation": "error"}


def published(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


# ---- the allocation


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_no_other_allocation_has_less_error(seed: int) -> None:
    """Beside every other one there is, on convex curves."""
    chance = random.Random(seed)
    weights = {name: chance.randrange(2, 20) for name in "abc"}
    most = {name: round(LARGEST * n) for name, n in weights.items()}
    errors = {name: sorted(chance.random() for _ in range(most[name])) for name in weights}
    total = {name: list(itertools.accumulate(errors[name], initial=0.0)) for name in weights}  # by zeros
    curves = {name: [total[name][most[name] * i // (len(SHARES) - 1)] for i in range(len(SHARES))] for name in weights}
    zeros = chance.randint(0, sum(most.values()))
    given = allocate(curves, weights, zeros)
    assert sum(given.values()) == zeros and all(0 <= given[name] <= most[name] for name in weights)
    others = (dict(zip(weights, z, strict=True)) for z in itertools.product(*(range(m + 1) for m in most.values())) if sum(z) == zeros)
    best = min(sum(total[name][count] for name, count in z.items()) for z in others)
    assert sum(total[name][count] for name, count in given.items()) == pytest.approx(best)


@pytest.mark.parametrize("rows", [7, 1500])
def test_curves_are_the_errors_of_the_masks(rows: int) -> None:
    """What a curve says is what pruning so much would cost, summed over the weights that go."""
    torch.manual_seed(rows)
    weight, squares = torch.randn(rows, 40).to(torch.bfloat16), torch.rand(40) * 10
    costs = weight.float().square().double() * squares.double()
    scores = weight.abs().float() * squares.sqrt()
    for share in (0.0, 0.05, 0.5, 0.95, 1.0):
        gone = least(scores, Sparsity(share), by_row=True)
        assert float(by_row(weight, squares)[round(share * 40)]) == pytest.approx(float(costs[gone].sum()), rel=1e-5)
        gone = least(weight.abs().float(), Sparsity(share), by_row=False)
        # of equal magnitudes the mask takes the first, the curve a part of each
        assert float(by_magnitude(weight, squares)[round(share * 1000)]) == pytest.approx(float(costs[gone].sum()), rel=0.02)


# ---- jobs


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparseGPT"])
def test_as_many_zeros_as_asked_for_and_not_everywhere_alike(name: str, kind: str, tmp_path: Path) -> None:
    report = compress(job_of(tmp_path, kind, [{name: {"sparsity": 0.61, "allocation": "error"}}]))
    tensors, zeros, total, shares = published(tmp_path / "out"), 0, 0, {}
    for linear, entry in report["pruned"].items():
        weight = tensors[f"{linear}.weight"]
        count = int((weight == 0).sum())
        assert count == entry["zeros"] <= round(LARGEST * weight.numel()), linear
        if name == "wanda":
            in_row = (weight == 0).sum(1)
            assert int(in_row.max() - in_row.min()) <= 1, linear
        zeros, total, shares[linear] = zeros + count, total + weight.numel(), count / weight.numel()
        assert entry["asked"] == f"{100 * shares[linear]:.3g}%"
    assert zeros == sum(round(0.61 * prod(entry["shape"])) for entry in report["pruned"].values())
    assert abs(zeros - 0.61 * total) <= len(shares) / 2
    assert max(shares.values()) - min(shares.values()) > 0.1
    said = report["allocation"]
    for end, find in (("smallest", min), ("largest", max)):
        assert said[end]["sparsity"] == pytest.approx(find(shares.values()), abs=1e-5)
        assert shares[said[end]["linear"]] == find(shares.values())
    assert list(said["blocks"]) == [f"model.layers.{i}" for i in range(4)]
    page = render(report).decode()
    assert "Zeros by layer" in page and f"in {said['largest']['linear']}." in page


def test_together_with_other_passes(tmp_path: Path) -> None:
    """By rule and by error at once, with what quantises behind it; what is uniform is not shifted."""
    passes: Passes = [
        {"magnitude": {"sparsity": 0.3, "targets": ["re:.*down_proj"]}},
        {"sparseGPT": ALLOCATED},
        {"gptq": {"scheme": "W4A16", "groupSize": 64}},
    ]
    report = compress(job_of(tmp_path, "llama", passes))
    down = {n: e for n, e in report["pruned"].items() if n.endswith("down_proj")}
    assert {entry["asked"] for entry in down.values()} == {"30%"}
    others = [entry for name, entry in report["pruned"].items() if name not in down]
    assert sum(e["zeros"] for e in others) == sum(round(0.6 * prod(e["shape"])) for e in others)
    assert len({e["asked"] for e in others}) > 5 and len(report["linears"]) == 28


# ---- interruptions


class Killed(BaseException):
    """As if the process had ended there: nothing is put in order."""


def interrupted(job: Path, at: str) -> None:
    """A worker that ends when it comes to a unit."""

    def listener(snapshot: Snapshot) -> None:
        if snapshot.unit == at:
            raise Killed

    with pytest.raises(Killed):
        run(load_job(job, {}), {}, Progress([listener]), threading.Event(), Limits(snapshot_seconds=0))


@pytest.mark.parametrize("name", ["magnitude", "sparseGPT"])
def test_killed_in_the_survey_and_behind_it(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, sections = trained_model("llama").as_uri(), data(tmp_path, "llama")

    def job(out: str) -> Path:
        body = jobs.manifest(source, (tmp_path / out).as_uri(), [{name: ALLOCATED}])
        body["spec"] |= sections
        return jobs.write(tmp_path / f"{out}.json", body)

    run(load_job(job("whole"), {}), {}, Progress(), threading.Event(), Limits(snapshot_seconds=0))
    whole = files_of(tmp_path / "whole")
    caplog.set_level(logging.INFO)
    for at in ("survey 1: model.layers.0", "survey 1: model.layers.2", "survey 1: model.layers.3", "embeddings", "model.layers.2"):
        interrupted(job("cut"), at)
    run(load_job(job("cut"), {}), {}, Progress(), threading.Event(), Limits(snapshot_seconds=0))
    cut = files_of(tmp_path / "cut")
    assert cut.keys() == whole.keys()
    assert [n for n in whole if n != "report.html" and cut[n] != whole[n]] == []
    went_on = [r.getMessage() for r in caplog.records if "goes on at unit" in r.getMessage()]
    assert went_on == [f"survey 1 goes on at unit {unit}" for unit in (1, 3, 4)]
    assert json.loads(whole["kompressor.json"])["allocation"]["blocks"]


# ---- what is refused

ERROR = {"sparsity": 0.5, "allocation": "error"}


@pytest.mark.parametrize(
    ("passes", "says"),
    [
        (
            [{"wanda": {"pattern": "2:4", "allocation": "error"}}],
            r"^passes\[0\]\.wanda: pattern 2:4 is the same everywhere",
        ),
        ([{"wanda": {"sparsity": 0.5, "allocation": "owl"}}], "allocation: Input should be 'uniform' or 'error'"),
        ([{"rotate": {}}, {"sparseGPT": ERROR}], "an earlier rotate has turned the weights since; use allocation: uniform, or publish"),
        ([{"pruneWidth": {"ratio": 0.25}}, {"wanda": ERROR}], r"an earlier pass has made model\.layers\.0\.mlp\.\w+ smaller since"),
        ([{"pruneLayers": {"layers": 3}}, {"magnitude": ERROR}], "an earlier pass has taken blocks out since"),
        ([{"gptq": {"scheme": "W4A16", "groupSize": 64}}, {"sparseGPT": ERROR}], "is W4A16 by an earlier pass"),
    ],
    ids=str,
)
def test_impossible_requests_are_refused_from_headers(passes: Passes, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        make_plan(load_job(job_of(tmp_path, "llama", passes), {}), {})


def test_magnitude_needs_data_only_to_allocate(tmp_path: Path) -> None:
    def plan(params: dict[str, Any]) -> dict[str, Any]:
        body = jobs.manifest(trained_model("llama").as_uri(), (tmp_path / "out").as_uri(), [{"magnitude": params}])
        return make_plan(load_job(jobs.write(tmp_path / "job.json", body), {}), {}).as_json()

    assert plan({"sparsity": 0.5})["pruned"] == {"50%": 28}
    with pytest.raises(UserError, match=r"^passes\[0\]\.magnitude: measures activations, and spec\.calibration is missing"):
        plan(ERROR)
