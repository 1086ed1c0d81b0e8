"""Every family, from every source encoding: what comes out is loaded by transformers and is nearly the model that went in."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import families
import pytest
import smaller
import torch

import jobs
from independent import tensors_of
from kompressor_worker.cli import run_cli
from kompressor_worker.errors import UserError
from kompressor_worker.job import load_job
from kompressor_worker.plan import make_plan

LOADABLE = [
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3", "gemma3_vision", "olmo3", "phi3", "mixtral", "qwen2_moe",
    "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "olmo2", "gpt_neox",
]  # fmt: skip


TOKENS = torch.arange(3, 99).remainder(100).add(3).view(2, 48)


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    vision = hasattr(AutoConfig.from_pretrained(folder), "vision_config")
    model = (AutoModelForImageTextToText if vision else AutoModelForCausalLM).from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits.float()


def compress(source: Path, out: Path, scheme: str) -> None:
    job = jobs.write(out.with_suffix(".json"), jobs.manifest(source.as_uri(), out.as_uri(), [{"rtn": {"scheme": scheme}}]))
    assert run_cli(["run", str(job)]) == 0


@pytest.mark.parametrize("family", LOADABLE)
def test_loads_in_transformers(family: str, tmp_path: Path) -> None:
    source = families.tiny_model(family)
    compress(source, tmp_path / "out", "W8A16")
    before, after = logits(source), logits(tmp_path / "out")
    assert torch.isfinite(after).all()
    error = (after - before).norm() / before.norm()
    assert 0 < error < 0.03, f"{family}: relative error of the logits {error:.4f}"


MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"]
SCHEMES = [
    [{"gptq": {"scheme": "W4A16", "groupSize": 32}}],
    [{"smoothQuant": {}}, {"rtn": {"scheme": "W8A16"}}],
    [{"awq": {"scheme": "W4A16", "groupSize": 32, "grid": 3}}],
]


LATENT = ("deepseek_v2", "deepseek_v3")
WITH_CACHE = [{"gptq": {"scheme": "W4A16", "groupSize": 32}}, {"kvCache": {"strategy": "head"}}]
JOBS = [(family, passes) for family in MIXTURES for passes in (*SCHEMES, WITH_CACHE) if passes is not WITH_CACHE or family not in LATENT]


@pytest.mark.parametrize(("family", "passes"), JOBS, ids=lambda x: x if isinstance(x, str) else "-".join(next(iter(p)) for p in x))
def test_a_calibrated_mixture_is_what_the_job_reports(family: str, passes: list[dict[str, Any]], tmp_path: Path) -> None:
    """Measured by transformers on the published files: perplexity and KL of the same rows. Weights alone are rounded: transformers expands
    experts when it loads them, and has no inputs of theirs to round."""
    source = smaller.lively(families.tiny_model(family, dtype="float32", initializer_range=0.1), tmp_path / "source")
    chance = random.Random(3)
    rows = {section: [[chance.randrange(3, 128) for _ in range(24)] for _ in range(32)] for section in ("calibration", "evaluation")}
    body = jobs.manifest(source.as_uri(), (tmp_path / "out").as_uri(), passes)
    for section, ids in rows.items():
        data = tmp_path / f"{section}.jsonl"
        data.write_text("".join(json.dumps({"ids": row}) + "\n" for row in ids))
        body["spec"][section] = {"dataset": {"uri": data.as_uri(), "tokens": "ids"}, "samples": 32, "sequenceLength": 24}
    assert run_cli(["run", str(jobs.write(tmp_path / "job.json", body))]) == 0
    said = json.loads((tmp_path / "out" / "kompressor.json").read_text())["evaluation"]
    seen = smaller.measure(source, tmp_path / "out", torch.tensor(rows["evaluation"]))
    assert said["kl"] > 1e-4
    assert seen["perplexityAfter"] == pytest.approx(said["perplexityAfter"], rel=1e-3)
    assert seen["kl"] == pytest.approx(said["kl"], rel=0.01)


def warnings_of(folder: Path) -> str:
    return "\n".join(json.loads((folder / "kompressor.json").read_text())["warnings"])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("scheme", ["MXFP4", "NVFP4A16"])
def test_floats_of_four_bits_are_read_as_the_warning_says(scheme: str, dtype: str, tmp_path: Path) -> None:
    """They are expanded to bfloat16: beside other weights in another type the model must be loaded in it too, and we say so."""
    from transformers import AutoModelForCausalLM

    compress(families.tiny_model("llama", dtype=dtype), tmp_path / "out", scheme)
    assert ("dtype=torch.bfloat16" in warnings_of(tmp_path / "out")) == (dtype != "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.isfinite(model(input_ids=torch.arange(3, 99).view(2, 48)).logits).all()


def test_a_module_that_multiplies_by_itself_is_read_as_the_warning_says(tmp_path: Path) -> None:
    """Falcon's linears take `weight`, which a packed one lacks until it is expanded."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source = families.tiny_model("falcon")
    compress(source, tmp_path / "out", "W8A16")
    assert "dequantize=True" in warnings_of(tmp_path / "out")
    expanding = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, quantization_config=expanding)
    with torch.inference_mode():
        after = model(input_ids=torch.arange(3, 99).remainder(100).add(3).view(2, 48)).logits.float()
    before = logits(source)
    assert 0 < (after - before).norm() / before.norm() < 0.03
    compress(source, tmp_path / "fp8", "FP8_DYNAMIC")
    assert "dequantize" not in warnings_of(tmp_path / "fp8"), "there is a weight in that"
    assert torch.isfinite(logits(tmp_path / "fp8")).all()


def test_packed_zero_points_are_read_as_the_warning_says(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source = families.tiny_model("llama")
    compress(source, tmp_path / "out", "W4A16_ASYM")
    assert "dequantize=True" in warnings_of(tmp_path / "out")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # once this loads, the warning has had its day
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expanding = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, quantization_config=expanding)
    with torch.inference_mode():
        assert torch.isfinite(model(input_ids=torch.arange(3, 99).view(2, 48)).logits).all()
    compress(source, tmp_path / "symmetric", "W4A16")
    assert "dequantize" not in warnings_of(tmp_path / "symmetric")


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_from_fp8_blocks(family: str, tmp_path: Path) -> None:
    original = families.tiny_model(family)
    compress(families.fp8_block_model(original), tmp_path / "out", "W8A16")
    before, after = logits(original), logits(tmp_path / "out")
    error = (after - before).norm() / before.norm()
    assert 0 < error < 0.1, f"FP8 and INT8 together: relative error of the logits {error:.4f}"


def test_from_mxfp4(tmp_path: Path) -> None:
    """gpt-oss keeps its own layout: experts stacked, gate and up interleaved, with biases, decoded as transformers decodes them."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source = families.mxfp4_model()
    compress(source, tmp_path / "out", "W8A16")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    stacks = [name.removesuffix("_blocks") for name in before if name.endswith("_blocks")]
    assert len(stacks) == 4
    for name in stacks:
        assert torch.equal(after[name], convert_moe_packed_tensors(before[f"{name}_blocks"], before[f"{name}_scales"]))
        assert torch.equal(after[f"{name}_bias"], before[f"{name}_bias"])
    model = AutoModelForCausalLM.from_pretrained(families.tiny_model("gpt_oss"), dtype=torch.float32)
    model.load_state_dict({name: after[name].float() for name in stacks}, strict=False)
    with torch.inference_mode():
        decoded, made = model(input_ids=TOKENS).logits, logits(tmp_path / "out")
    assert 0 < (made - decoded).norm() / decoded.norm() < 0.03, "what INT8 took of the attention"


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        ([{"rtn": {"scheme": "W4A16", "targets": [r"re:.*\.experts$"]}}], "a stack of all experts .*target attention, such as"),
        ([{"rtn": {"scheme": "MXFP4", "targets": ["model.layers.1.mlp.experts.down_proj"]}}], "means model.layers.1.*stays exact"),
        ([{"gptq": {"scheme": "W4A16"}}], "model_type 'gpt_oss' cannot be run for calibration .*use passes without calibration"),
        ([{"kvCache": {}}], "model_type 'gpt_oss' cannot be run for calibration"),
    ],
    ids=str,
)
def test_what_gpt_oss_cannot_have_is_said(passes: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    body = jobs.manifest(families.mxfp4_model().as_uri(), (tmp_path / "out").as_uri(), passes)
    if "rtn" not in passes[0]:
        rows = tmp_path / "rows.jsonl"
        rows.write_text(json.dumps({"ids": [3, 4, 5]}) + "\n")
        body["spec"]["calibration"] = {"dataset": {"uri": rows.as_uri(), "tokens": "ids"}, "samples": 1, "sequenceLength": 3}
    with pytest.raises(UserError, match=said):
        make_plan(load_job(jobs.write(tmp_path / "job.json", body), {}), {})
