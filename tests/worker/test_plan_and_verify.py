"""`kompressor plan` says what `run` will do; `kompressor verify` finds what is wrong with a result."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file, save_file

import jobs
from kompressor_worker.cli import run_cli


@pytest.fixture
def result(tmp_path: Path) -> Path:
    source = shutil.copytree(families.tiny_model("llama"), tmp_path / "source")
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    job = jobs.write(tmp_path / "job.json", jobs.manifest(source.as_uri(), (tmp_path / "out").as_uri(), [{"rtn": {"scheme": "NVFP4A16"}}]))
    assert run_cli(["run", str(job)]) == 0
    return tmp_path / "out"


def test_plan_is_what_comes_and_needs_no_torch(tmp_path: Path) -> None:
    source = families.tiny_model("qwen3_moe")
    job = jobs.write(tmp_path / "job.json", jobs.manifest(source.as_uri(), (tmp_path / "out").as_uri(), [{"rtn": {"scheme": "W4A16"}}]))
    code = (
        "import sys; from kompressor_worker.cli import run_cli\n"
        f"code = run_cli(['plan', {str(job)!r}, '--json'])\n"
        "assert 'torch' not in sys.modules, 'plan imported torch'\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert run_cli(["run", str(job)]) == 0
    report = json.loads((tmp_path / "out" / "kompressor.json").read_text())
    assert plan["outputBytes"] == report["result"]["tensorBytes"]
    assert plan["sourceBytes"] == report["source"]["tensorBytes"]
    assert sum(plan["schemes"].values()) == report["result"]["quantizedLinears"]
    assert not plan["alreadyCompressed"]
    made = sum(t.nbytes for f in (tmp_path / "out").glob("*.safetensors") for t in load_file(f).values())
    assert made == plan["outputBytes"]


def test_a_good_result_is_whole(result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["verify", str(result), "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert checked["digests"] == checked["tensors"] > 0
    assert checked["quantizedLinears"] == 14


def flip_in(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


SCALE = "model.layers.1.self_attn.q_proj.weight_scale"
Q = "model.layers.1.self_attn.q_proj"
DAMAGE: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "a flipped bit": (lambda f: flip_in(f / "model.safetensors"), 65, "is not what was written"),
    "a truncated file": (cut_short, 65, "truncated"),
    "a missing tensor": (lambda f: rewrite(f, lambda t: t.__delitem__(f"{Q}.weight_scale")), 65, f"{Q}.weight_scale"),
    "a strange tensor": (lambda f: rewrite(f, lambda t: t.update(strange=torch.zeros(1))), 65, "strange"),
    "another shape": (lambda f: rewrite(f, lambda t: t.update({SCALE: t[SCALE].T.contiguous()})), 65, "weight_scale"),
    "a scale of Inf": (lambda f: rewrite(f, lambda t: t.update({f"{Q}.weight_global_scale": torch.tensor([torch.inf])})), 66, "NaN or Inf"),
    "a flipped bit in the tokenizer": (lambda f: flip_in(f / "tokenizer.json"), 65, "tokenizer.json is not what was written"),
    "another config": (lambda f: edit(f / "config.json", hidden_act="gelu"), 65, "config.json is not what was written"),
    "no quantization_config": (lambda f: edit(f / "config.json", quantization_config=None), 65, "config.json is not what was written"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), 65, "tokenizer.json is missing"),
    "no report inside": (lambda f: (f / "kompressor.json").write_text("{}{"), 65, "kompressor.json"),
    "a report of nothing": (lambda f: edit(f / "kompressor.json", tensors=None), 65, "kompressor.json lacks"),
    "no config": (lambda f: (f / "config.json").unlink(), 64, "config.json"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found(damage: str, result: Path, capfd: pytest.CaptureFixture[str]) -> None:
    do, code, word = DAMAGE[damage]
    do(result)
    assert run_cli(["verify", str(result)]) == code
    assert word in capfd.readouterr().err


def test_verify_of_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["verify", str(tmp_path / "nowhere")]) == 64
    assert "nowhere" in capfd.readouterr().err


def test_people_read_what_changes_in_shape() -> None:
    from kompressor_worker.terminal import shape_rows

    plan: dict[str, Any] = {"sizes": {"num_experts": [8, 6]}, "parameters": [4205056, 3416576]}
    plan["kvCache"] = {"context": 4096, "bytes": [8388608, 1], "bytesPerToken": [2048, 560], "fullLayers": [4, 2]}
    plan["autoScheme"] = {"budgetBytes": 2_507_808, "mostBytes": 2_400_000, "smallestBytes": 2_165_152, "largestBytes": 3_719_584}
    assert shape_rows(plan) == {
        "shape": "num_experts 8 -> 6; 4,205,056 -> 3,416,576 parameters",
        "KV cache": "2,048 -> 560 bytes a token at a context of 4,096; 2 layers with full attention",
        "budget": "at most 2.4 MB of 2.5 MB; candidates allow 2.2 MB to 3.7 MB",
    }
    assert shape_rows({}) == {}


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    source, out = families.tiny_model("llama").as_uri(), (tmp_path / "out").as_uri()
    job = jobs.write(tmp_path / "job.json", jobs.manifest(source, out, [{"rtn": {"scheme": "W8A8"}}]))
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "kompressor_worker", "plan", str(job), "--json"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, "Traceback" in done.stderr) == (141, False), done.stderr
