"""Experts in a scheme of their own, attention in another, the router exact: one job, whose perplexity transformers confirms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import jobs
from calibrated_jobs import evaluation_rows, samples, write_data
from independent import decompressed, expand, tensors_of
from kompressor_worker.cli import run_cli
from kompressor_worker.formats.readers import EXPERTS as UNREAD
from models import perplexity

EXPERTS: dict[str, dict[str, Any]] = {
    "W4A16": {"gptq": {"scheme": "W4A16", "groupSize": 64}},
    "MXFP4": {"rtn": {"scheme": "MXFP4"}},
    "NVFP4A16": {"rtn": {"scheme": "NVFP4A16"}},
}


@pytest.mark.parametrize("attention", ["FP8_DYNAMIC", "FP8"])
@pytest.mark.parametrize("scheme", EXPERTS)
def test_each_has_its_own(scheme: str, attention: str, trained_moe: Path, tmp_path: Path) -> None:
    ((name, params),) = EXPERTS[scheme].items()
    passes = [
        {name: {**params, "targets": [r"re:.*\.experts\..*"]}},
        {"rtn": {"scheme": attention, "targets": [r"re:.*\.self_attn\..*"]}},
    ]
    body = jobs.manifest(trained_moe.as_uri(), (tmp_path / "out").as_uri(), passes)
    body["spec"] |= samples({section: path.as_uri() for section, path in write_data(tmp_path, "qwen3_moe", rows=32).items()}, rows=32)
    job = jobs.write(tmp_path / "job.json", body)
    assert run_cli(["run", str(job)]) == 0
    out = tmp_path / "out"
    report = json.loads((out / "kompressor.json").read_text())
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    formats = [group["format"] for group in config["config_groups"].values()]
    assert (config["format"], formats[1]) == ("mixed-precision", "float-quantized")
    bits = {linear: 8 if ".self_attn." in linear else 4 for linear, _, _ in decompressed(out)}
    assert len(bits) == 4 * 4 + 4 * 8 * 3
    assert {linear: found.weights.num_bits for linear, _, found in decompressed(out)} == bits
    before, after = tensors_of(trained_moe), tensors_of(out)
    routers = [tensor for tensor in before if tensor.endswith("mlp.gate.weight")]
    assert len(routers) == 4 and all(torch.equal(before[router], after[router]) for router in routers)
    unread = scheme in UNREAD
    assert any("experts in" in line for line in report["warnings"]) == unread
    loaded = expand(out, tmp_path / "plain") if unread else out
    seen = perplexity(AutoModelForCausalLM.from_pretrained(loaded), evaluation_rows(job))
    said = report["evaluation"]
    print(scheme, attention, f"{said['perplexityBefore']:.3f} -> {said['perplexityAfter']:.3f}, transformers {seen:.3f}")
    assert seen == pytest.approx(said["perplexityAfter"], rel=0.005)
