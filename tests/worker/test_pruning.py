"""Jobs that prune: zeros counted in the published files by an independent reader, results that load as ordinary models."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_calibrated import TOLERANCE, compress, job_of, measured, rows_of

import jobs
from kompressor_worker.errors import UserError
from kompressor_worker.job import load_job
from kompressor_worker.plan import make_plan
from kompressor_worker.progress import Progress
from kompressor_worker.run import run
from models import trained_model

Passes = list[dict[str, Any]]
W4 = {"scheme": "W4A16", "groupSize": 64}


def published(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def linears(folder: Path) -> dict[str, torch.Tensor]:
    """The decoder's matrices as transformers sees them, quantised ones decoded by compressed-tensors."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return {name: parameter.detach() for name, parameter in model.named_parameters() if name.endswith("_proj.weight")}


def pattern_holds(weight: torch.Tensor, keep: int, of: int) -> bool:
    return bool(((weight.view(-1, of) != 0).sum(-1) <= keep).all())


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparseGPT"])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_exactly_so_many_are_zero(name: str, kind: str, tmp_path: Path) -> None:
    job = job_of(tmp_path, kind, [{name: {"sparsity": 0.5}}])
    report = compress(job)
    tensors, source = published(tmp_path / "out"), published(trained_model(kind))
    assert tensors.keys() == source.keys() and all(tensors[n].shape == source[n].shape for n in source)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    zeros = total = 0
    for linear, entry in report["pruned"].items():
        weight = tensors[f"{linear}.weight"]
        count = int((weight == 0).sum())
        assert count == entry["zeros"] == weight.numel() // 2, linear
        if name == "wanda":
            assert ((weight == 0).sum(1) == weight.shape[1] // 2).all(), linear
        zeros, total = zeros + count, total + weight.numel()
    assert report["result"]["sparsity"] == zeros / total == 0.5
    untouched = [n for n in tensors if n.removesuffix(".weight") not in report["pruned"]]
    assert any("embed" in n for n in untouched) and all(torch.equal(tensors[n], source[n]) for n in untouched)
    if kind == "qwen3_moe":
        assert any(n.endswith("mlp.gate.weight") for n in untouched), "routers stay exact"
    said = report["evaluation"]
    assert measured(tmp_path / "out", rows_of(job)) == pytest.approx(said["perplexityAfter"], rel=TOLERANCE)
    assert said["kl"] > 0


PATTERNS = {"sparseGPT": "2:4", "wanda": "4:8", "magnitude": "1:4"}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_hold_in_every_row(name: str, tmp_path: Path) -> None:
    compress(job_of(tmp_path, "llama", [{name: {"pattern": PATTERNS[name]}}]))
    keep, of = map(int, PATTERNS[name].split(":"))
    for linear, weight in linears(tmp_path / "out").items():
        assert pattern_holds(weight, keep, of), linear
        assert int((weight == 0).sum()) == weight.numel() * (of - keep) // of, linear


@pytest.mark.parametrize(
    "quantise",
    [{"gptq": W4}, {"rtn": W4}, {"awq": W4}, {"gptq": {"scheme": "W8A8"}}, {"rtn": {"scheme": "NVFP4A16"}}],
    ids=lambda p: "-".join([*p, *(v["scheme"] for v in p.values())]),
)
def test_what_quantises_afterwards_keeps_the_zeros(quantise: dict[str, Any], tmp_path: Path) -> None:
    job = job_of(tmp_path, "llama", [{"sparseGPT": {"pattern": "2:4"}}, quantise])
    report = compress(job)
    assert report["result"]["quantizedLinears"] == report["result"]["prunedLinears"] == len(report["pruned"])
    for name, weight in linears(tmp_path / "out").items():
        assert pattern_holds(weight, 2, 4), name
    if quantise != {"rtn": {"scheme": "NVFP4A16"}}:  # transformers decodes it to bf16 first
        assert measured(tmp_path / "out", rows_of(job)) == pytest.approx(report["evaluation"]["perplexityAfter"], rel=TOLERANCE)


def test_sparsity_by_rule(tmp_path: Path) -> None:
    passes: Passes = [
        {"wanda": {"sparsity": 0.7, "targets": ["re:.*down_proj"]}},
        {"sparseGPT": {"sparsity": 0.25, "ignore": ["re:.*q_proj"]}},
    ]
    report = compress(job_of(tmp_path, "llama", passes))
    tensors = published(tmp_path / "out")
    for name, tensor in tensors.items():
        if "_proj" in name:
            share = float((tensor == 0).float().mean())
            expected = 0.7 if "down_proj" in name else 0.0 if "q_proj" in name else 0.25
            assert share == pytest.approx(expected, abs=0.005), name
    assert {entry["asked"] for entry in report["pruned"].values()} == {"70%", "25%"}


def test_without_data_nothing_flows(tmp_path: Path) -> None:
    """Weights alone decide, stage by stage; everything else passes through as it is."""
    source = trained_model("llama")
    body = jobs.manifest(source.as_uri(), (tmp_path / "out").as_uri(), [{"magnitude": {"sparsity": 0.3}}])
    summary = run(load_job(jobs.write(tmp_path / "job.json", body), {}), {}, Progress(), threading.Event())
    result = summary.result("out")
    assert result["sparsity"] == "30%" and result["prunedTensors"] == 28 and result["quantizedTensors"] == 0
    before, after = published(source), published(tmp_path / "out")
    for name, weight in after.items():
        if "_proj" not in name:
            assert torch.equal(weight, before[name])
            continue
        kept = weight != 0
        assert torch.equal(weight[kept], before[name][kept])
        assert int((~kept).sum()) == round(0.3 * weight.numel())
        assert before[name][~kept].abs().max() <= weight[kept].abs().min()


@pytest.mark.parametrize(
    ("passes", "says"),
    [
        ([{"wanda": {}}], r"^passes\[0\]\.wanda: give either sparsity, such as 0\.5, or pattern, such as 2:4$"),
        ([{"wanda": {"sparsity": 0.5, "pattern": "2:4"}}], "give either sparsity"),
        ([{"sparseGPT": {"sparsity": 0.97}}], "less than or equal to 0.95"),
        ([{"magnitude": {"pattern": "4:2"}}], "pattern 4:2: N of every M weights are kept, with 1 <= N < M <= 32"),
        ([{"magnitude": {"pattern": "half"}}], "pattern: String should match pattern"),
        ([{"magnitude": {"pattern": "3:7"}}], "columns not divisible by the 7 of pattern 3:7; choose another pattern"),
        ([{"magnitude": {"sparsity": 0.5, "targets": ["lm_head"]}}], "lm_head is the head, which stays dense|matches no linear layer"),
        ([{"gptq": W4}, {"sparseGPT": {"sparsity": 0.5}}], "is W4A16 by an earlier pass; put sparseGPT before the passes that quantise"),
        (
            [{"sparseGPT": {"sparsity": 0.5}}, {"rotate": {}}],
            "is pruned by an earlier pass, and a rotation fills its zeros; put rotate",
        ),
        ([{"wanda": {"sparsity": 0.5}}, {"wanda": {"pattern": "2:4"}}], "leave no linear layer to prune"),
        ([{"wanda": {"sparsty": 0.5}}], "did you mean sparsity?"),
    ],
    ids=str,
)
def test_impossible_requests_are_refused_from_headers(passes: Passes, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says.replace("?", r"\?")):
        make_plan(load_job(job_of(tmp_path, "llama", passes), {}), {})


def test_the_plan_tells_what_is_pruned(tmp_path: Path) -> None:
    job = job_of(tmp_path, "llama", [{"sparseGPT": {"pattern": "2:4"}}, {"gptq": W4}])
    plan = make_plan(load_job(job, {}), {}).as_json()
    assert plan["pruned"] == {"2:4": 28} and plan["schemes"] == {"W4A16": 28}
    without = make_plan(load_job(job_of(tmp_path, "llama", [{"gptq": W4}]), {}), {}).as_json()
    assert plan["multiplyAdds"]["passes"] > without["multiplyAdds"]["passes"]
