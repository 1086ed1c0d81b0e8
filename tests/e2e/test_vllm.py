"""vLLM, which we did not write, loads our files as they are and sees the model that transformers sees. `make test-vllm`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

import jobs
from kompressor_worker.cli import run_cli
from setup import other_python

pytestmark = pytest.mark.vllm
RUNS_ON = {
    "W8A8": lambda: True,
    "FP8_DYNAMIC": lambda: True,
    "W4A16": torch.cpu._is_avx512_supported,
    "W4A16_ASYM": torch.cpu._is_avx512_supported,
    "FP8_BLOCK": torch.cpu._is_amx_tile_supported,
}
"""What vLLM's CPU build has kernels for; W8A16, MXFP4 and NVFP4A16 need a GPU there."""
ROWS, LENGTH = 32, 128


@pytest.mark.parametrize("scheme", RUNS_ON)
def test_vllm_agrees_with_transformers(scheme: str, trained_llama: Path, tmp_path: Path) -> None:
    if not RUNS_ON[scheme]():
        pytest.skip(f"vLLM has no {scheme} kernel for this CPU")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    from models import held_out_tokens, perplexity

    out = tmp_path / "out"
    job = jobs.write(tmp_path / "j.json", jobs.manifest(trained_llama.as_uri(), out.as_uri(), [{"rtn": {"scheme": scheme}}]))
    assert run_cli(["run", str(job)]) == 0
    tokens = held_out_tokens("llama", ROWS, LENGTH)
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if scheme == "W4A16_ASYM" else {}
    ours = perplexity(AutoModelForCausalLM.from_pretrained(out, **how), tokens)
    (tmp_path / "tokens.json").write_text(json.dumps(tokens.tolist()))
    command = [str(other_python("vllm")), str(Path(__file__).with_name("vllm_perplexity.py")), str(out), str(tmp_path / "tokens.json")]
    done = subprocess.run(command, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    theirs = json.loads(done.stdout.strip().splitlines()[-1])["perplexity"]
    print(f"{scheme}: transformers {ours:.4f}, vLLM {theirs:.4f}")
    assert theirs == pytest.approx(ours, rel=0.01)
