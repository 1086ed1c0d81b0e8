"""A mixture's experts one at a time: memory that does not grow with them, statistics for those that few tokens reach, the same bytes."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from nursery import Nursery
from safetensors.torch import load_file, save_file
from test_calibrated_resume import data
from test_plan_calibrated import high_water
from test_resume import refuse_other_bytes

import jobs
from kompressor_api.names import ENV_MEMORY_PLAN
from kompressor_worker import kernels, parts
from kompressor_worker.forward import Projection
from kompressor_worker.job import load_job
from kompressor_worker.plan import make_plan
from kompressor_worker.progress import Progress
from kompressor_worker.run import run

GPTQ: list[dict[str, Any]] = [{"gptq": {"scheme": "W4A16", "groupSize": 32}}]
PER_EXPERT = 3 * 256 * 768 * 2
"""Bytes of one, of the sizes that `mixture` makes."""


def mixture(folder: Path, experts: int, hidden: int = 64, ffn: int = 64, layers: int = 2, top_k: int = 2) -> Path:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=hidden, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, vocab_size=512,
        head_dim=32, num_experts=experts, num_experts_per_tok=top_k, moe_intermediate_size=ffn, decoder_sparse_step=1,
        tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def job(folder: Path, model: Path, out: str, passes: list[dict[str, Any]], rows: int = 16, length: int = 64, **calibration: Any) -> Path:
    chance = random.Random(1)
    body = jobs.manifest(model.as_uri(), (folder / out).as_uri(), passes)
    for section in ("calibration", "evaluation"):
        path = folder / f"{section}.jsonl"
        if not path.exists():
            path.write_text("\n".join(json.dumps({"ids": [chance.randrange(3, 500) for _ in range(length)]}) for _ in range(rows)))
        body["spec"][section] = {"dataset": {"uri": path.as_uri(), "tokens": "ids"}, "samples": rows, "sequenceLength": length}
    body["spec"]["calibration"] |= calibration
    return jobs.write(folder / f"{out}.json", body)


def report(job: Path) -> dict[str, Any]:
    run(load_job(job, {}), {}, Progress(), threading.Event())
    said: dict[str, Any] = json.loads((job.parent / job.stem / "kompressor.json").read_text())
    return said


def test_memory_does_not_grow_with_the_number_of_experts(tmp_path: Path) -> None:
    """All experts of the larger model at once would take twice as much; what is read ahead is kept small, so that it is no part of it."""
    peaks, said = {}, {}
    for experts in (8, 64):
        (tmp_path / str(experts)).mkdir()
        model = mixture(tmp_path / str(experts) / "model", experts, hidden=256, ffn=768, layers=1)
        path = job(tmp_path / str(experts), model, "out", GPTQ)
        process = jobs.worker(path, {ENV_MEMORY_PLAN: "2"})
        peaks[experts] = 0
        while process.poll() is None:
            peaks[experts] = max(peaks[experts], high_water(process.pid))
            time.sleep(0.02)
        words = process.communicate()[1]
        assert process.returncode == 0, words
        said[experts] = make_plan(load_job(job(tmp_path / str(experts), model, "other", GPTQ), {}), {})
    assert max(peaks.values()) < 1.1 * min(peaks.values()), peaks
    assert len({plan.flow.block for plan in said.values() if plan.flow is not None}) == 1


def test_the_same_bytes_as_with_all_experts_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixture(tmp_path / "model", 8)
    passes = [{"rotate": {}}, {"pruneWidth": {"ratio": 0.5, "multiple": 32}}, *GPTQ, {"kvCache": {}}]
    one = report(job(tmp_path, model, "one", passes))
    monkeypatch.setattr("kompressor_worker.calibrated.held", lambda passes: "all")
    monkeypatch.setattr("kompressor_worker.calibrated.parts_of", lambda unit, passes=(), schemes=None: parts.whole_block(unit))
    whole = report(job(tmp_path, model, "whole", passes))
    assert one["result"]["digest"] == whole["result"]["digest"]
    assert one["evaluation"] == whole["evaluation"]
    assert [{**block, "notes": None} for block in one["blocks"]] == [{**block, "notes": None} for block in whole["blocks"]]


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """Expert 3's score is always the mean of the others', so it is never the best."""
    model = mixture(tmp_path / "cold", 4, layers=1, top_k=1)
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    router = tensors["model.layers.0.mlp.gate.weight"].float()
    router[3] = router[:3].mean(0)
    tensors["model.layers.0.mlp.gate.weight"] = router.to(torch.bfloat16)
    save_file(tensors, file, {"format": "pt"})
    return model


def test_an_expert_that_no_token_reaches_is_measured_on_all(cold: Path, tmp_path: Path) -> None:
    alone = report(job(tmp_path, cold, "alone", GPTQ, minTokensPerExpert=0))
    helped = report(job(tmp_path, cold, "helped", GPTQ, minTokensPerExpert=1))
    (before,), (after,) = alone["blocks"], helped["blocks"]
    assert before["expertTokens"] == after["expertTokens"] and sum(after["expertTokens"]) == 16 * 64 and after["expertTokens"][3] == 0
    assert "expertsOnAllTokens" not in before and after["expertsOnAllTokens"] == [3]
    notes = before["notes"]["model.layers.0.mlp.gate_up"]["gptq"]["roundedToNearest"]
    assert set(notes) == {f"model.layers.0.mlp.experts.3.{x}_proj" for x in ("gate", "up")}
    assert not any("roundedToNearest" in said.get("gptq", {}) for said in after.get("notes", {}).values())
    first, second = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("alone", "helped"))
    assert all(bool(t.isfinite().all()) for tensors in (first, second) for t in tensors.values() if t.is_floating_point())
    changed = {name.rpartition(".")[0] for name in first if not torch.equal(first[name], second[name])}
    assert changed == {f"model.layers.0.mlp.experts.3.{x}_proj" for x in ("gate", "up", "down")}, "the others are what their tokens say"
    assert alone["evaluation"] == helped["evaluation"], "what is computed follows the true routing"


@pytest.mark.parametrize(
    "passes", [[{"awq": {"scheme": "W4A16", "groupSize": 32}}], [{"smoothQuant": {}}, *GPTQ], [{"rtn": {"scheme": "FP8"}}]]
)
def test_a_cold_expert_in_passes_that_need_all_of_them(passes: list[dict[str, Any]], cold: Path, tmp_path: Path) -> None:
    """They hold the mixture, and say so; scales are finite with and without all tokens."""
    for least in (0, 1, 10_000):
        path = job(tmp_path, cold, f"least-{least}", passes, minTokensPerExpert=least)
        (warning,) = [w for w in make_plan(load_job(path, {}), {}).status()["warnings"] if "in memory at once" in w]
        assert "all 4 experts" in warning
        (block,) = report(path)["blocks"]
        assert block.get("expertsOnAllTokens", []) == {0: [], 1: [3], 10_000: [0, 1, 2, 3]}[least]
        tensors = load_file(next((tmp_path / f"least-{least}").glob("*.safetensors")))
        assert all(bool(t.float().isfinite().all()) for t in tensors.values() if t.is_floating_point())


@pytest.fixture(scope="module")
def nursery(nursery: Nursery) -> Nursery:
    """In whose workers a block's tensors are kept for a restart in many small pieces."""
    return nursery.after("import kompressor_worker.snapshots; kompressor_worker.snapshots.PIECE_BYTES = 1")


@pytest.mark.parametrize("rows", [2, 100], ids=["snapshots", "blocks"])
def test_killed_in_the_middle_of_a_mixture(rows: int, nursery: Nursery, tmp_path: Path) -> None:
    """Few rows are smaller than a block, so every commit leaves a snapshot; many are larger, so it leaves the block, in pieces."""
    model = mixture(tmp_path / "model", 4, layers=20)

    def asked(out: str) -> Path:
        body = jobs.manifest(model.as_uri(), (tmp_path / out).as_uri(), GPTQ)
        for section, seed in (("calibration", 1), ("evaluation", 2)):
            uri = data(tmp_path / f"{section}-{rows}.jsonl", rows, 24, seed)
            body["spec"][section] = {"dataset": {"uri": uri, "tokens": "ids"}, "samples": rows, "sequenceLength": 24}
        return jobs.write(tmp_path / f"{out}.json", body)

    code, said = nursery.run(asked("whole"))
    assert code == 0, said
    refuse_other_bytes(nursery, asked, 10, rows)


def resident() -> int:
    """Bytes of this process in memory now."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def test_every_number_of_tokens_leaves_no_code_behind() -> None:
    """oneDNN keeps what it compiles for a product's shape: without bounds on them memory grows with every block."""
    if not kernels.fast_bf16(torch.device("cpu")):
        pytest.skip("this CPU multiplies bf16 no faster than fp32, so the forward is fp32")
    weights = {"x.weight": torch.randn(512, 384, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)}
    project = Projection.as_a_runtime(weights, torch.bfloat16, torch.device("cpu"))
    x = torch.randn(4096, 384, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    project("x", x)
    expected, before = x.float() @ weights["x.weight"].float().T, resident()
    for rows in range(1, 1024, 3):
        said = project("x", x[:rows])
        assert len(said) == rows
        torch.testing.assert_close(said.float(), expected[:rows], rtol=2e-2, atol=0.3)
    grown = resident() - before
    assert grown < 120e6, grown  # 309 MB where each number has code of its own
