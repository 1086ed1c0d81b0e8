"""One calibrated job of ours and one of llm-compressor's, on the same rows: time, peak memory, what is left of the model.

Both are timed from an imported library to files on the disk: loading, calibrating, compressing, saving; each in a process of its own, the
peer's from an environment of its own. Beside the clock's seconds stand those of the CPU, over all threads, which say more where other work
takes turns on the cores. `python benchmarks/peer.py JOB` is ours.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from data_free import measure, memory  # noqa: E402
from jobs import manifest  # noqa: E402
from limits import operations  # noqa: E402

PEER = """
import json, sys, time
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
try:
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
except ImportError:
    from llmcompressor.modifiers.smoothquant import SmoothQuantModifier
from importlib import import_module
from transformers import AutoConfig, AutoModelForCausalLM
source, out, rows, recipe, dtype, all_experts = sys.argv[1:]
kind = AutoConfig.from_pretrained(source).model_type
import_module(f"transformers.models.{kind}.modeling_{kind}")
RTN = QuantizationModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
ids = [json.loads(line)["ids"] for line in open(rows)]
def status(field):
    return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(field))
idle = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
began, cpu = time.monotonic(), time.process_time()
model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype), device_map="cpu")
data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
oneshot(model=model, dataset=data, recipe=eval(recipe), num_calibration_samples=len(ids), max_seq_length=len(ids[0]),
        moe_calibrate_all_experts=bool(all_experts))
model.save_pretrained(out, save_compressed=True)
seconds, cpu = time.monotonic() - began, time.process_time() - cpu
print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": status("VmHWM") - idle}))
"""


def child(job_file: str) -> None:
    """One job of ours in this process, as the peer is measured."""
    import threading

    import kompressor_worker.flow
    from kompressor_worker.job import load_job
    from kompressor_worker.kernels import build
    from kompressor_worker.progress import Progress
    from kompressor_worker.run import run

    assert kompressor_worker.flow
    job = load_job(Path(job_file), os.environ)
    config = json.loads((Path(job.spec.model.source.uri.removeprefix("file://")) / "config.json").read_text())
    import_module("transformers.models.{0}.modeling_{0}".format(config["model_type"]))
    build.library()
    idle = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    cpu = time.process_time()
    summary = run(job, os.environ, Progress(), threading.Event())
    cpu = time.process_time() - cpu
    print(json.dumps({"seconds": summary.seconds, "cpu": cpu, "peak": memory("VmHWM") - idle}))


def gemm_rate(dtype: str) -> float:
    """FLOP/s of a square matrix product, fp32 or bf16, on this machine's cores if no other work took turns on them."""
    code = (
        f"import torch, time; a = torch.randn(2048, 2048).to(torch.{dtype}); a @ a; b = time.process_time(); "
        "n = 6; [a @ a for _ in range(n)]; print(n * 2 * 2048**3 * torch.get_num_threads() / (time.process_time() - b))"
    )
    return max(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(2))


def floor_seconds(bench: Bench, rates: Mapping[str, float]) -> float:
    """Arithmetic alone: the parts of `limits.operations` that are in `rates`, in all blocks, at so many FLOP/s."""
    config = json.loads((bench.source / "config.json").read_text())
    block = operations(config, bench.samples * bench.length, bench.length)
    return float(config["num_hidden_layers"] * sum(block[part] / rate for part, rate in rates.items()))


def beside_others(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of processes started by `work`; and as "others" how many cores were busy with something else meanwhile."""

    def seconds() -> tuple[float, float]:
        ticks = [int(number) for number in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
        own = resource.getrusage(resource.RUSAGE_CHILDREN)
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle, and idle for want of a disk
        return time.monotonic(), busy - own.ru_utime - own.ru_stime

    began, before = seconds()
    figures = work()
    ended, after = seconds()
    return figures | {"others": max(0.0, after - before) / (ended - began)}


class Bench:
    """Jobs over one model and one set of rows; results lie in `work`, by name."""

    def __init__(self, work: Path, source: Path, rows: Path, samples: int, length: int) -> None:
        self.work, self.source, self.rows, self.samples, self.length = work, source, rows, samples, length

    def ours(
        self, passes: list[dict[str, Any]], name: str = "ours", calibrated: bool = True, output: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        job = manifest(self.source.as_uri(), self._out(name).as_uri(), passes)
        job["spec"]["output"].update(output or {})
        if calibrated:
            dataset = {"uri": self.rows.as_uri(), "tokens": "ids"}
            job["spec"]["calibration"] = {"dataset": dataset, "samples": self.samples, "sequenceLength": self.length}
        file = self.work / "job.json"
        file.write_text(json.dumps(job))
        return self._measured([sys.executable, __file__, str(file)])

    def peer(self, python: Path, recipe: str, dtype: str, name: str = "peer", all_experts: bool = True) -> dict[str, Any]:
        """`recipe` in Python, in the names of PEER. `all_experts`: of a mixture, each measured on all tokens."""
        arguments = [str(self.source), str(self._out(name)), str(self.rows), recipe, dtype, "yes" if all_experts else ""]
        return self._measured([str(python), "-c", PEER, *arguments], {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""})

    def _out(self, name: str) -> Path:
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        os.sync()
        return folder

    def _measured(self, command: list[str], environ: dict[str, str] | None = None) -> dict[str, Any]:
        return beside_others(lambda: measure(command, environ))


def small_model(experts: int = 0) -> Path:
    """The folder of a trained Llama of 6 layers, hidden 384; or of a Qwen3-MoE of 4, with so many experts of which two are chosen."""
    from models import RECIPES as KINDS
    from models import SHAPE, Recipe, trained_model

    shape = {**SHAPE, "hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64}
    if not experts:
        KINDS["bench"] = Recipe("LlamaConfig", {**shape, "num_hidden_layers": 6, "intermediate_size": 1024}, steps=200, batch=2, length=512)
        return trained_model("bench")
    mixture = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 512, "norm_topk_prob": True}
    balanced = {"output_router_logits": True, "router_aux_loss_coef": 0.01}
    KINDS["bench_moe"] = Recipe("Qwen3MoeConfig", {**shape, **mixture, **balanced, "num_hidden_layers": 4}, steps=200, batch=2, length=512)
    return trained_model("bench_moe")


def small_bench(work: Path, experts: int = 0) -> tuple[Bench, Any]:
    """Over `small_model` and 128 rows of 512 tokens; and 160 other rows to judge by."""
    from models import token_rows

    source = small_model(experts)
    rows = write_rows(work / "rows.jsonl", token_rows(source, 0, seed=41, rows=128, length=512))
    return Bench(work, source, rows, 128, 512), token_rows(source, 0, seed=1_000_003, rows=160, length=512)


def write_rows(path: Path, ids: Any) -> Path:
    path.write_text("".join(json.dumps({"ids": row}) + "\n" for row in ids.tolist()))
    return path


def divergence(original: Path, results: dict[str, Path], tokens: Any) -> dict[str, Any]:
    """Mean KL of the logits from the original's, a number a row, by transformers in fp32."""
    import torch
    import transformers

    def logits(folder: Path) -> list[torch.Tensor]:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            return [model(input_ids=rows, use_cache=False).logits[:, :-1].log_softmax(-1) for rows in tokens.split(8)]

    base = logits(original)
    return {
        name: torch.cat([(p.exp() * (p - q)).sum(-1).mean(-1) for p, q in zip(base, logits(folder), strict=True)]).double()
        for name, folder in results.items()
    }


def ratio(kl: Mapping[str, Any], ours: str, peer: str) -> tuple[float, float, float]:
    """Of two results in `divergence`'s answer: of their means, and its 95 % interval by paired bootstrap over rows."""
    from kompressor_worker.evaluate import bootstrap_ratio

    return bootstrap_ratio(kl[ours], kl[peer], 2000, 0)


if __name__ == "__main__":
    child(sys.argv[1])
