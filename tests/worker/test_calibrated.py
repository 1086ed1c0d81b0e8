"""Whole calibrated jobs on trained models: what the job says of its result is what transformers measures on the published files."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from nursery import Nursery

import jobs
from corpus import Corpus
from kompressor_worker.errors import GateFailed, UserError
from kompressor_worker.job import load_job
from kompressor_worker.plan import make_plan
from kompressor_worker.progress import Progress
from kompressor_worker.run import run
from models import RECIPES, perplexity, trained_model

TOLERANCE = 0.005
"""Relative difference of the perplexity that the job reports and the one that transformers measures."""
EXACT = 10.0
"""Weight of a scheme's damage, as KL in nats, above which something is wrong with it; far above what any of them does."""


def data(folder: Path, kind: str) -> dict[str, Any]:
    """Calibration and held-out text of the model's own language."""
    sections = {}
    for section, seed, samples in (("calibration", 21, 64), ("evaluation", 1_000_003, 64)):
        path = folder / f"{section}.jsonl"
        stories = Corpus(RECIPES[kind].language).text(seed, characters=samples * 127 * 5).splitlines()
        if not path.exists():  # its ETag is its size and time
            path.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
        sections[section] = {"dataset": {"uri": path.as_uri()}, "samples": samples, "sequenceLength": 128, "packing": True}
    return sections


def job_of(folder: Path, kind: str, passes: list[dict[str, Any]], **spec: Any) -> Path:
    body = jobs.manifest(trained_model(kind).as_uri(), (folder / "out").as_uri(), passes)
    body["spec"] |= {**data(folder, kind), **spec}
    return jobs.write(folder / "job.json", body)


def compress(job: Path) -> dict[str, Any]:
    """Runs it here; kompressor.json."""
    run(load_job(job, {}), {}, Progress(), threading.Event())
    report: dict[str, Any] = json.loads((job.parent / "out" / "kompressor.json").read_text())
    return report


def rows_of(job: Path, section: Literal["calibration", "evaluation"] = "evaluation") -> torch.Tensor:
    from kompressor_worker.calibration import read_rows
    from kompressor_worker.storage.locations import open_data, open_source
    from kompressor_worker.tokenizer import ModelTokenizer

    spec = load_job(job, {}).spec
    rows = getattr(spec, section)
    assert rows is not None
    return torch.stack(read_rows(open_data(rows, {}), rows, ModelTokenizer(open_source(spec.model.source, {}))).tokens)


def measured(folder: Path, tokens: torch.Tensor, **options: Any) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return perplexity(model, tokens)


BEFORE: dict[str, tuple[torch.Tensor, float]] = {}


def measured_before(kind: str, tokens: torch.Tensor) -> float:
    """Of the model as it was trained; once, since all cases have the same rows."""
    if kind not in BEFORE or not torch.equal(BEFORE[kind][0], tokens):
        BEFORE[kind] = tokens, measured(trained_model(kind), tokens)
    return BEFORE[kind][1]


W4 = {"scheme": "W4A16", "groupSize": 64}
CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "gptq W4A16": ("llama", [{"gptq": W4}]),
    "gptq W3A16": ("llama", [{"gptq": {"scheme": "W3A16", "groupSize": 64}}]),
    "awq W4A16": ("llama", [{"awq": W4}]),
    "gptq W2A16, recover": ("llama", [{"gptq": {**W4, "scheme": "W2A16"}}, {"recover": {"steps": 20}}]),
    "rotate, gptq W4A16": ("llama", [{"rotate": {}}, {"gptq": W4}]),
    "smoothQuant, gptq W8A8": ("llama", [{"smoothQuant": {}}, {"gptq": {"scheme": "W8A8"}}]),
    "rtn W8A8": ("llama", [{"rtn": {"scheme": "W8A8"}}]),
    "smoothQuant, rtn W8A8_STATIC": ("llama", [{"smoothQuant": {}}, {"rtn": {"scheme": "W8A8_STATIC"}}]),
    "rtn FP8": ("llama", [{"rtn": {"scheme": "FP8"}}]),
    "rtn FP8_DYNAMIC": ("llama", [{"rtn": {"scheme": "FP8_DYNAMIC"}}]),
    "moe gptq W4A16": ("qwen3_moe", [{"smoothQuant": {}}, {"gptq": W4}]),
    "moe awq W4A16": ("qwen3_moe", [{"awq": W4}]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_job_reports_is_what_transformers_measures(case: str, tmp_path: Path) -> None:
    kind, passes = CASES[case]
    job = job_of(tmp_path, kind, passes)
    report = compress(job)
    said, tokens = report["evaluation"], rows_of(job)
    assert said["tokens"] == 64 * 127
    assert measured_before(kind, tokens) == pytest.approx(said["perplexityBefore"], rel=TOLERANCE)
    assert measured(tmp_path / "out", tokens) == pytest.approx(said["perplexityAfter"], rel=TOLERANCE)
    assert 0 < said["kl"] < EXACT and said["perplexityAfter"] != said["perplexityBefore"]
    assert [block["name"] for block in report["blocks"]] == [f"model.layers.{n}" for n in range(len(report["blocks"]))]
    errors = [block["outputError"] for block in report["blocks"]]
    assert all(0 < error < 1 for error in errors), errors


def test_a_gate_that_is_not_met_publishes_nothing_and_says_why(nursery: Nursery, tmp_path: Path) -> None:
    gates = [{"metric": "kl", "maxKL": 1e-6}, {"metric": "perplexity", "maxIncrease": "50%"}]
    evaluation = data(tmp_path, "llama")["evaluation"] | {"gates": gates}
    job = job_of(tmp_path, "llama", [{"rtn": W4}], evaluation=evaluation)
    code, said = nursery.run(job)
    assert code == 67, said
    assert "mean KL divergence" in said and "allowed are 1e-06" in said
    assert "NOT met: KL divergence" in said and "met: perplexity rises by" in said
    assert (tmp_path / ".out.kompressor/work/report.html").as_uri() in said
    assert not (tmp_path / "out").exists()
    kept = sorted(p.name for p in (tmp_path / ".out.kompressor").rglob("*") if p.is_file())
    assert kept == ["kompressor.json", "report.html"]
    with pytest.raises(GateFailed):  # again, from the start: nothing of the first run stands in the way
        compress(job)
    evaluation["gates"] = [{"metric": "kl", "maxKL": 1.0}]
    assert compress(job_of(tmp_path, "llama", [{"rtn": W4}], evaluation=evaluation))["gates"][0]["met"]
    with pytest.raises(GateFailed, match="an earlier job with other gates stays published"):
        evaluation["gates"] = gates
        compress(job_of(tmp_path, "llama", [{"rtn": W4}], evaluation=evaluation))


def test_a_deployment_sample_of_another_language_drifts(tmp_path: Path) -> None:
    chance = Corpus(7).text(3, characters=40_000).upper().splitlines()
    (tmp_path / "deployment.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in chance))
    drift = {"dataset": {"uri": (tmp_path / "deployment.jsonl").as_uri()}, "samples": 16, "sequenceLength": 128, "packing": True}
    report = compress(job_of(tmp_path, "llama", [{"gptq": W4}], drift=drift))
    assert report["drift"]["drifting"], report["drift"]
    assert any(warning.startswith("drift: ") for warning in report["warnings"])
    same = drift | {"dataset": data(tmp_path, "llama")["calibration"]["dataset"], "samples": 64}
    (tmp_path / "same").mkdir()
    assert compress(job_of(tmp_path / "same", "llama", [{"gptq": W4}], drift=same))["drift"]["drifting"] == []


@pytest.mark.parametrize(
    ("name", "params", "remedy"),
    [
        ("gptq", W4, "use a pass and scheme that work without data, such as rtn with W4A16"),
        ("wanda", {"sparsity": 0.5}, "prune by magnitude, which works without data"),
        ("kvCache", {}, "leave it out"),
        ("pruneHeads", {"ratio": 0.5}, "leave it out"),
    ],
)
def test_a_pass_that_measures_needs_data(name: str, params: dict[str, Any], remedy: str, tmp_path: Path) -> None:
    body = jobs.manifest(trained_model("llama").as_uri(), (tmp_path / "out").as_uri(), [{name: params}])
    missing = rf"^passes\[0\].{name}: measures activations, and spec.calibration is missing; add spec.calibration.dataset, or {remedy}$"
    with pytest.raises(UserError, match=missing):
        make_plan(load_job(jobs.write(tmp_path / "job.json", body), {}), {})


def test_spilled_activations_are_the_same(tmp_path: Path) -> None:
    """With no room in memory at all, the states live in files; nothing else changes."""
    from kompressor_worker.pipeline import Limits

    digests = []
    for name, limit in (("roomy", 8 << 30), ("tight", 0)):
        (tmp_path / name).mkdir()
        job = job_of(tmp_path / name, "llama", [{"gptq": W4}])
        run(load_job(job, {}), {}, Progress(), threading.Event(), Limits(activations=limit))
        digests.append(json.loads((tmp_path / name / "out" / "kompressor.json").read_text())["result"]["digest"])
    assert digests[0] == digests[1]
