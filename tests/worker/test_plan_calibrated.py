"""What `kompressor plan` says of a job with calibration, beside what it takes; and what it warns of."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import jobs
from kompressor_worker.cli import run_cli
from kompressor_worker.commands import show_result
from kompressor_worker.job import load_job
from kompressor_worker.pipeline import Limits
from kompressor_worker.plan import make_plan
from kompressor_worker.sample_warnings import size_warnings
from kompressor_worker.samples import find_samples
from kompressor_worker.storage.locations import open_source
from kompressor_worker.tokenizer import ModelTokenizer

HIDDEN, FFN, KV, VOCABULARY = 256, 1024, 128, 512
GPTQ: list[dict[str, Any]] = [{"gptq": {"scheme": "W4A16", "groupSize": 64}}]


def job(folder: Path, passes: list[dict[str, Any]], rows: int = 16, length: int = 64, layers: int = 2, **sections: int) -> Path:
    """`sections`: rows of each, where they are others than `rows`; 0: none."""
    model = folder / f"model-{layers}"
    if not model.exists():
        torch.manual_seed(0)
        sizes = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    body = jobs.manifest(model.as_uri(), (folder / "out").as_uri(), passes)
    chance = random.Random(1)
    for section, count in ({"calibration": rows, "evaluation": rows} | sections).items():
        if count:
            path = folder / f"{section}.jsonl"
            path.write_text("\n".join(json.dumps({"ids": [chance.randrange(3, VOCABULARY) for _ in range(length)]}) for _ in range(count)))
            dataset = {"uri": path.as_uri(), "tokens": "ids"}
            body["spec"][section] = {"dataset": dataset, "samples": count, "sequenceLength": length}
    return jobs.write(folder / "job.json", body)


def plan(path: Path, limits: Limits | None = None) -> dict[str, Any]:
    return make_plan(load_job(path, {}), {}, limits).as_json()


def test_it_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from kompressor_worker.cli import run_cli\n"
        f"code = run_cli(['plan', {str(job(tmp_path, GPTQ))!r}])\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for part in ("activations", "one block", "statistics", "evaluation", "multiply-adds"):
        assert part in done.stdout


def test_multiply_adds_are_those_that_torch_counts(tmp_path: Path) -> None:
    rows, length, layers = 4, 64, 2
    path = job(tmp_path, [{"rtn": {"scheme": "W4A16", "groupSize": 64}}], rows, length, calibration=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model-2", dtype=torch.float32, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(rows, length, dtype=torch.int64))
    counted = counter.get_total_flops() / 2
    unseen = layers * rows * length * length * HIDDEN  # half of the scores, and of the sums of values, which eager attention computes too
    said = plan(path)["multiplyAdds"]
    rotary = rows * length * length  # transformers computes its angles by a product
    assert said["forward"] + said["head"] == pytest.approx(2 * (counted - unseen), abs=2 * rotary)
    assert (said["statistics"], said["passes"]) == (0, 0)
    gptq = plan(job(tmp_path, GPTQ, rows, length))["multiplyAdds"]
    assert gptq["forward"] == 1.5 * said["forward"]  # the calibration rows' one
    assert gptq["statistics"] == layers * rows * length * (3 * HIDDEN**2 + FFN**2) // 2
    columns = 0.5 * HIDDEN**2 * (2 * HIDDEN + 2 * KV + 2 * FFN) + 0.5 * HIDDEN * FFN**2
    assert gptq["passes"] == layers * (columns + 3 * HIDDEN**3 + FFN**3)


def test_memory_grows_with_rows_and_width_alone(tmp_path: Path) -> None:
    few = plan(job(tmp_path, GPTQ, rows=16))
    many = plan(job(tmp_path, GPTQ, rows=32))
    assert many["activationBytes"] == 2 * few["activationBytes"] and many["blockBytes"] == few["blockBytes"]
    tokens = 16 * 64
    assert few["activationBytes"] == 2 * (2 * 3 * tokens * HIDDEN + tokens * FFN)  # three streams, as they are and in a snapshot
    assert few["statisticsBytes"] == 4 * (FFN**2 + 2 * FFN**2)
    scaled = plan(job(tmp_path, [{"awq": {"scheme": "W4A16", "groupSize": 64}}]))
    assert scaled["statisticsBytes"] == few["statisticsBytes"] + 4 * 3 * HIDDEN**2  # of all steps at once
    assert scaled["blockBytes"] > few["blockBytes"]
    deep = plan(job(tmp_path, GPTQ, layers=6))
    assert {k: deep[k] for k in deep if k in ("activationBytes", "blockBytes", "stepBytes", "statisticsBytes", "headBytes")} == {
        k: few[k] for k in few if k in ("activationBytes", "blockBytes", "stepBytes", "statisticsBytes", "headBytes")
    }
    tight = plan(job(tmp_path, GPTQ), replace(Limits(), activations=1000))
    assert (tight["activationBytes"], tight["spilledBytes"]) == (1000, few["activationBytes"] - 1000)
    assert tight["peakMemoryBytes"] < few["peakMemoryBytes"] - tight["spilledBytes"]
    assert "activationBytes" not in plan(job(tmp_path, [{"rtn": {"scheme": "W4A16", "groupSize": 64}}], calibration=0, evaluation=0))


def test_the_peak_is_what_a_worker_takes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And what plan warns of, run warns of too."""
    path = job(tmp_path, GPTQ, rows=32, length=512, layers=1, evaluation=8)
    assert run_cli(["plan", str(path), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    (warning,) = said["warnings"][:1]
    assert "calibration.sequenceLength 512 is above the model's max_position_embeddings 256" in warning
    process = jobs.worker(path)
    peak = 0
    while process.poll() is None:  # not ru_maxrss: that begins with what the parent held when it forked
        peak = max(peak, high_water(process.pid))
        time.sleep(0.02)
    words = process.communicate()[1]
    assert process.returncode == 0, words
    assert warning in words
    assert peak == pytest.approx(said["peakMemoryBytes"], rel=0.3)


def high_water(pid: int) -> int:
    """Bytes; 0 once the process has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


def test_few_tokens_for_a_hessian_and_huge_files_are_warned_of(tmp_path: Path) -> None:
    (warning,) = plan(job(tmp_path, GPTQ, rows=15))["warnings"]
    assert "calibration has at most 960 tokens" in warning and "mlp.down_proj has 1,024 columns" in warning
    assert "set calibration.samples to 16 or more" in warning
    assert plan(job(tmp_path, GPTQ, rows=16))["warnings"] == []
    spec = load_job(job(tmp_path, GPTQ, evaluation=0), {}).spec
    assert spec.calibration is not None
    found = find_samples([spec.calibration], ModelTokenizer(open_source(spec.model.source, {})), {}, threading.Event())
    assert size_warnings(found) == ()
    files = found["calibration"].files
    huge = replace(files, files=(replace(files.files[0], size=12 << 30),))
    (said,) = size_warnings({"calibration": replace(found["calibration"], files=huge)})
    assert "12.9 GB" in said and "16 rows" in said


def test_what_a_result_looks_like(capfd: pytest.CaptureFixture[str]) -> None:
    gates = [{"metric": "perplexity", "value": "1.2%", "limit": "3%", "met": True}]
    drift = {"distance": "0.2", "layer": "model.layers.1.mlp.down", "outside": "0.1%", "layersAbove": 2}
    result = {
        "uri": "s3://models/out", "sourceBytes": 100, "outputBytes": 30, "ratio": "3.33x", "quantizedTensors": 7, "relativeError": "0.09",
        "seconds": 3, "perplexityBefore": "8", "perplexityAfter": "8.1", "kl": "0.01", "topOneAgreement": "97%", "evaluatedTokens": 8128,
        "gates": gates, "drift": drift,
    }  # fmt: skip
    show_result(result, already=False, as_json=False)
    said = " ".join(capfd.readouterr().out.replace("│", " ").split())
    for part in (
        "8 -> 8.1, on 8,128 held-out tokens", "KL divergence 0.01 nats", "97%", "met: perplexity rises by 1.2%, allowed 3%",
        "2 inputs above the threshold", "model.layers.1.mlp.down", "s3://models/out/report.html",
    ):  # fmt: skip
        assert part in said
    show_result(result, already=False, as_json=True)
    assert json.loads(capfd.readouterr().out) == result
