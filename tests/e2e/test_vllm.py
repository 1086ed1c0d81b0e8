"""vLLM, which we did not write, loads our files as they are and sees what the job says of them. `make test-vllm`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm_perplexity import PROMPT, TOKENS

import jobs
from calibrated_jobs import evaluation_rows, samples, write_data
from kompressor_worker.cli import run_cli
from models import held_out_tokens, perplexity, trained_model
from setup import other_python

pytestmark = pytest.mark.vllm
avx512, amx = torch.cpu._is_avx512_supported, torch.cpu._is_amx_tile_supported
TOLERANCE = 0.005
"""Relative difference of the perplexity that the job reports and the one that vLLM measures."""
TRUNCATED = 0.01
"""The same with a KV cache in FP8: vLLM's CPU kernel rounds keys and values towards zero, transformers and what GPUs do to nearest."""


@dataclass(frozen=True)
class Case:
    passes: list[dict[str, Any]]
    measures: bool = True
    """A job with calibration and evaluation; else data-free, and transformers measures its result."""
    tolerance: float = TOLERANCE
    runs: Callable[[], bool] = field(default=lambda: True)
    """Whether vLLM's CPU build has kernels for it here; W8A16, MXFP4 and NVFP4A16 need a GPU there."""
    kind: str = "llama"
    """Of model, a key of models.RECIPES."""


def rtn(scheme: str) -> list[dict[str, Any]]:
    return [{"rtn": {"scheme": scheme}}]


HEADS, WIDTH = {"pruneHeads": {"kvHeads": 3}}, {"pruneWidth": {"intermediateSize": 384}}
HIDDEN, LAYERS = {"pruneHidden": {"hiddenSize": 192}}, {"pruneLayers": {"layers": 3}}
W4 = {"gptq": {"scheme": "W4A16", "groupSize": 64}}

CASES = {
    "smoothQuant, gptq W8A8": Case([{"smoothQuant": {}}, {"gptq": {"scheme": "W8A8"}}]),
    "smoothQuant, rtn W8A8_STATIC": Case([{"smoothQuant": {}}, *rtn("W8A8_STATIC")]),
    "rtn FP8_DYNAMIC": Case(rtn("FP8_DYNAMIC")),
    "rtn FP8": Case(rtn("FP8")),
    "rotate, gptq W4A16": Case([{"rotate": {}}, {"gptq": {"scheme": "W4A16", "groupSize": 64}}], runs=avx512),
    "awq W4A16_ASYM": Case([{"awq": {"scheme": "W4A16_ASYM", "groupSize": 64}}], runs=avx512),
    "sparseGPT 2:4": Case([{"sparseGPT": {"pattern": "2:4"}}]),
    "sparseGPT 50%, gptq W4A16": Case([{"sparseGPT": {"sparsity": 0.5}}, {"gptq": {"scheme": "W4A16", "groupSize": 64}}], runs=avx512),
    "gptq W8A8, kvCache": Case([{"gptq": {"scheme": "W8A8"}}, {"kvCache": {}}], tolerance=TRUNCATED, runs=avx512),
    # vLLM's CPU kernel takes the largest of a layer's scales: what this shows is that its loader reads one a head.
    "kvCache by head": Case([{"kvCache": {"strategy": "head"}}], tolerance=TRUNCATED, runs=avx512),
    "pruneHeads": Case([HEADS]),  # 6 heads on 256 channels: not published as a llama
    "pruneHidden, pruneLayers": Case([LAYERS, HIDDEN]),
    "all four, gptq W4A16": Case([LAYERS, HEADS, WIDTH, HIDDEN, W4], runs=avx512),
    "qwen2 pruneHeads": Case([{"pruneHeads": {"kvHeads": 2}}], kind="qwen2"),  # 4 heads of 32 channels on 256
    "qwen3 all four": Case([LAYERS, HEADS, WIDTH, HIDDEN], kind="qwen3"),
    "qwen3_moe all four": Case([LAYERS, HEADS, {"pruneWidth": {"intermediateSize": 64}}, HIDDEN], kind="qwen3_moe"),
    "qwen2_moe pruneWidth": Case([{"pruneWidth": {"ratio": 0.25, "multiple": 32}}], kind="qwen2_moe"),
    "mixtral pruneHeads, pruneWidth": Case([HEADS, {"pruneWidth": {"intermediateSize": 192}}], kind="mixtral"),
    "mixtral pruneExperts": Case([{"pruneExperts": {"experts": 6}}], kind="mixtral"),
    "mixtral mergeExperts": Case([{"mergeExperts": {"experts": 6}}], kind="mixtral"),
    "qwen3_moe pruneExperts, pruneWidth": Case(
        [{"pruneExperts": {"experts": 5}}, {"pruneWidth": {"intermediateSize": 64}}], kind="qwen3_moe"
    ),
    "data-free W8A8": Case(rtn("W8A8"), measures=False),
    "data-free FP8_DYNAMIC": Case(rtn("FP8_DYNAMIC"), measures=False),
    "data-free W4A16": Case(rtn("W4A16"), measures=False, runs=avx512),
    "data-free W4A16_ASYM": Case(rtn("W4A16_ASYM"), measures=False, runs=avx512),
    "data-free FP8_BLOCK": Case(rtn("FP8_BLOCK"), measures=False, runs=amx),
}


@dataclass(frozen=True)
class Seen:
    folder: Path
    ours: float
    """Perplexity."""
    rows: list[list[int]]
    theirs: dict[str, Any] | str
    """Perplexity and generated tokens, or why there are none."""


@pytest.fixture(scope="module")
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """Every case that was asked for and can run, all loaded by one vLLM process."""
    here = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    chosen = {item.callspec.params["case"] for item in here}
    folder = tmp_path_factory.mktemp("vllm")
    data = samples({section: path.as_uri() for section, path in write_data(folder, "llama").items()})
    ours, rows = {}, {}
    for number, case in enumerate(name for name in CASES if name in chosen and CASES[name].runs()):
        (folder / str(number)).mkdir()
        ours[case], rows[case] = compress(folder / str(number), CASES[case], data)
    theirs = measure(folder, [rows[case] for case in ours])
    return {
        case: Seen(folder / str(number) / "out", ours[case], rows[case], found)
        for number, (case, found) in enumerate(zip(ours, theirs, strict=True))
    }


def compress(folder: Path, case: Case, data: dict[str, Any]) -> tuple[float, list[list[int]]]:
    """The perplexity that is to be found, and on which rows."""
    body = jobs.manifest(trained_model(case.kind).as_uri(), (folder / "out").as_uri(), case.passes)
    job = jobs.write(folder / "job.json", body | {"spec": {**body["spec"], **(data if case.measures else {})}})
    assert run_cli(["run", str(job)]) == 0
    if case.measures:
        said = json.loads((folder / "out" / "kompressor.json").read_text())["evaluation"]["perplexityAfter"]
        return said, evaluation_rows(job).tolist()
    from transformers import CompressedTensorsConfig

    tokens = held_out_tokens("llama", rows=32)
    # With asymmetric packed weights this version of transformers only loads when told to dequantise.
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if case.passes == rtn("W4A16_ASYM") else {}
    return perplexity(AutoModelForCausalLM.from_pretrained(folder / "out", **how), tokens), tokens.tolist()


def measure(folder: Path, rows: list[list[list[int]]]) -> list[dict[str, Any] | str]:
    """What vLLM sees of folder/0/out, folder/1/out ..."""
    models = [str(folder / str(number) / "out") for number in range(len(rows))]
    said = seen_by_vllm(folder, dict(zip(models, rows, strict=True)))
    return [said[model] for model in models]


def seen_by_vllm(folder: Path, rows: dict[str, list[list[int]]], *how: str) -> dict[str, dict[str, Any] | str]:
    """What vllm_perplexity.py says of checkpoints and rows. `how`: what else it is told."""
    wanted, found = folder / "rows.json", folder / "found.json"
    wanted.write_text(json.dumps(rows))
    command = [str(other_python("vllm")), str(Path(__file__).with_name("vllm_perplexity.py")), str(wanted), str(found), *how]
    done = subprocess.run(command, env={**os.environ, "TMPDIR": str(folder)}, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    said: dict[str, dict[str, Any] | str] = json.loads(found.read_text())
    return said


@pytest.mark.parametrize("case", CASES)
def test_vllm_sees_the_model_that_the_job_reports(case: str, seen: dict[str, Seen]) -> None:
    if not CASES[case].runs():
        pytest.skip(f"vLLM has no kernel for {case} on this CPU")
    ours, found = seen[case].ours, seen[case].theirs
    assert not isinstance(found, str), found
    theirs = found["perplexity"]
    print(f"{case}: {'reported' if CASES[case].measures else 'transformers'} {ours:.4f}, vLLM {theirs:.4f}")
    assert theirs == pytest.approx(ours, rel=CASES[case].tolerance)


@pytest.mark.parametrize(
    "case", [name for name, case in CASES.items() if any("prune" in str(one) or "merge" in str(one) for one in case.passes)]
)
def test_vllm_generates_what_transformers_would(case: str, seen: dict[str, Seen]) -> None:
    """Token by token from its cache, each the likeliest by transformers too, or as good as that: vLLM computes in bf16."""
    if not CASES[case].runs():
        pytest.skip(f"vLLM has no kernel for {case} on this CPU")
    found = seen[case].theirs
    assert not isinstance(found, str), found
    model = AutoModelForCausalLM.from_pretrained(seen[case].folder, dtype=torch.float32)
    for row, generated in zip(seen[case].rows, found["generated"], strict=False):
        assert len(generated) == TOKENS
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([row[:PROMPT] + generated]), use_cache=False).logits[0, PROMPT - 1 : -1]
        missed = logits.amax(-1) - logits.gather(-1, torch.tensor(generated)[:, None])[:, 0]
        assert float(missed.max()) < 0.25, missed
