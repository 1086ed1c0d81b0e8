"""Calibrated quantisation beside llm-compressor: time, peak memory and quality, on the same rows, machine and scheme, in turn.

    python benchmarks/calibrated.py                        # both models, all recipes; about half an hour on 2 cores
    python benchmarks/calibrated.py --models small --recipes gptq

small: a trained Llama (6 layers, hidden 384), 128 rows of 512 tokens, judged by its mean KL divergence from the original on held-out rows.
wide: random weights (hidden 2048, FFN 5632), 32 rows of 512 tokens, at 4 and, ours alone, at 12 layers: cost and memory.

Both are timed from an imported library to files on the disk: loading, calibrating, compressing, saving. The peer computes in the dtype that
is faster for it on this machine; AWQ, which it cannot run on a CPU, stands beside its GPTQ. The floor is arithmetic at the fp32 GEMM rate
measured in the same run: one forward, Gram matrices as SYRK and factorisations once for all linears that share an input, the column loop.
Where the CPU multiplies bf16 faster, ours does so in the forward and the Gram matrices, and can fall below it. Only ratios of one run mean
anything.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import checkpoint  # noqa: E402
from data_free import measure, memory  # noqa: E402
from jobs import manifest  # noqa: E402
from setup import cache_directory, other_python  # noqa: E402

GROUP = {"scheme": "W4A16", "groupSize": 128}
GPTQ = "GPTQModifier(targets='Linear', scheme='W4A16', ignore=['lm_head'])"
RECIPES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "rtn": ([{"rtn": GROUP}], "RTN"),
    "gptq": ([{"gptq": GROUP}], GPTQ),
    "awq": ([{"awq": GROUP}], GPTQ),  # the peer's own does not run on a CPU: its GPTQ stands beside ours
    "smoothQuant+gptq": (
        [{"smoothQuant": {"alpha": 0.5}}, {"gptq": {"scheme": "W8A8"}}],
        "[SmoothQuantModifier(smoothing_strength=0.5), GPTQModifier(targets='Linear', scheme='W8A8', ignore=['lm_head'])]",
    ),
}
"""Ours, and the peer's in Python."""
PEER = """
import json, sys, time
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
try:
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
except ImportError:
    from llmcompressor.modifiers.smoothquant import SmoothQuantModifier
from transformers import AutoModelForCausalLM
import transformers.models.llama.modeling_llama
source, out, rows, recipe, dtype = sys.argv[1:]
RTN = QuantizationModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
ids = [json.loads(line)["ids"] for line in open(rows)]
def status(field):
    return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(field))
idle = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
began = time.monotonic()
model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype), device_map="cpu")
data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
oneshot(model=model, dataset=data, recipe=eval(recipe), num_calibration_samples=len(ids), max_seq_length=len(ids[0]))
model.save_pretrained(out, save_compressed=True)
seconds = time.monotonic() - began
print(json.dumps({"seconds": seconds, "peak": status("VmHWM") - idle}))
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
    import transformers.models.llama.modeling_llama

    assert transformers.models.llama.modeling_llama
    build.library()
    job = load_job(Path(job_file), os.environ)
    idle = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    summary = run(job, os.environ, Progress(), threading.Event())
    print(json.dumps({"seconds": summary.seconds, "peak": memory("VmHWM") - idle}))


def gemm_rate(dtype: str) -> float:
    """FLOP/s of a square matrix product, fp32 or bf16, on this machine now."""
    code = (
        f"import torch, time; a = torch.randn(2048, 2048).to(torch.{dtype}); a @ a; b = time.monotonic(); "
        "n = 6; [a @ a for _ in range(n)]; print(n * 2 * 2048**3 / (time.monotonic() - b))"
    )
    return max(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(2))


def floor_flops(config: dict[str, Any], tokens: int, length: int) -> float:
    """One forward, SYRK, factorisations (Cholesky and triangular inverse, n^3 in all) and column loops of a dense Llama."""
    hidden, ffn, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    queries = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    sites = [(hidden, queries + 2 * kv), (queries, hidden), (hidden, 2 * ffn), (ffn, hidden)]
    linears = sum(2 * tokens * columns * rows for columns, rows in sites)
    attention = 2 * tokens * length * queries  # two products, causal
    gram = sum(tokens * columns**2 for columns, _ in sites)
    factors = sum(columns**3 for columns, _ in sites)
    loops = sum(rows * columns**2 for columns, rows in sites)
    return float(layers * (linears + attention + gram + factors + loops))


class Bench:
    def __init__(self, work: Path, source: Path, rows: Path, samples: int, length: int) -> None:
        self.work, self.source, self.rows, self.samples, self.length = work, source, rows, samples, length
        self._peers: dict[str, tuple[dict[str, Any], Path]] = {}

    def out(self, name: str) -> Path:
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        os.sync()
        return folder

    def ours(self, recipe: str, name: str = "ours") -> dict[str, Any]:
        job = manifest(self.source.as_uri(), self.out(name).as_uri(), RECIPES[recipe][0])
        dataset = {"uri": self.rows.as_uri(), "tokens": "ids"}
        job["spec"]["calibration"] = {"dataset": dataset, "samples": self.samples, "sequenceLength": self.length}
        file = self.work / "job.json"
        file.write_text(json.dumps(job))
        return measure([sys.executable, __file__, "--child", str(file)])

    def peer(self, python: Path, recipe: str, dtype: str) -> tuple[dict[str, Any], Path]:
        """Its figures and its files; of each of its recipes once."""
        theirs = RECIPES[recipe][1]
        if theirs not in self._peers:
            out = self.out(f"peer-{len(self._peers)}")
            arguments = [str(self.source), str(out), str(self.rows), theirs, dtype]
            figures = measure([str(python), "-c", PEER, *arguments], {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""})
            self._peers[theirs] = figures, out
        return self._peers[theirs]


def small_model() -> tuple[Path, str]:
    """A trained Llama; its folder, and the name of its recipe in models.py."""
    from models import RECIPES as KINDS
    from models import SHAPE, Recipe, trained_model

    shape = {**SHAPE, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64}
    KINDS["bench"] = Recipe("LlamaConfig", {**shape, "intermediate_size": 1024}, steps=200, batch=2, length=512)
    return trained_model("bench"), "bench"


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


def run_small(work: Path, python: Path | None, recipes: list[str], dtype: str, rate: float) -> list[dict[str, Any]]:
    from kompressor_worker.evaluate import bootstrap_ratio
    from models import token_rows

    source, _ = small_model()
    bench = Bench(work, source, write_rows(work / "rows.jsonl", token_rows(source, 0, seed=41, rows=128, length=512)), 128, 512)
    held = token_rows(source, 0, seed=1_000_003, rows=160, length=512)
    floor = floor_flops(json.loads((source / "config.json").read_text()), 128 * 512, 512) / rate
    found = []
    for recipe in recipes:
        ours = bench.ours(recipe)
        line = {"model": "small", "recipe": recipe, "ours": ours["seconds"], "ours peak": ours["peak"], "floor": floor}
        folders = {"ours": work / "ours"}
        if python:
            peer, folders["peer"] = bench.peer(python, recipe, dtype)
            line |= {"peer": peer["seconds"], "peer peak": peer["peak"]}
        kl = divergence(source, folders, held)
        line["ours KL"] = float(kl["ours"].mean())
        if "peer" in kl:
            line["peer KL"] = float(kl["peer"].mean())
            line["KL ratio"] = bootstrap_ratio(kl["ours"], kl["peer"], 2000, 0)
        found.append(line)
        print(line, file=sys.stderr, flush=True)
    return found


def run_wide(work: Path, python: Path | None, recipes: list[str], dtype: str, rate: float) -> list[dict[str, Any]]:
    import torch

    from models import trained_model

    found = []
    rows = write_rows(work / "wide.jsonl", torch.randint(3, 32000, (32, 512), generator=torch.Generator().manual_seed(0)))
    for layers in (4, 12):
        source = checkpoint.make(cache_directory() / "benchmarks" / f"wide-{layers}", layers, 2048, 5632)
        for name in ("tokenizer.json", "tokenizer_config.json"):  # the peer asks for one, whatever the data
            shutil.copy(trained_model("llama") / name, source)
        bench = Bench(work, source, rows, 32, 512)
        floor = floor_flops(json.loads((source / "config.json").read_text()), 32 * 512, 512) / rate
        for recipe in recipes if layers == 4 else ["gptq"]:
            ours = bench.ours(recipe)
            line = {"model": f"wide {layers}", "recipe": recipe, "ours": ours["seconds"], "ours peak": ours["peak"], "floor": floor}
            if python and layers == 4:
                peer, _ = bench.peer(python, recipe, dtype)
                line |= {"peer": peer["seconds"], "peer peak": peer["peak"]}
            found.append(line)
            print(line, file=sys.stderr, flush=True)
    return found


COLUMNS = (
    "model", "recipe", "ours s", "peer s", "of peer", "floor s", "of floor", "ours MB", "peer MB", "ours KL", "peer KL", "KL ratio (95 %)",
)  # fmt: skip


def show(found: list[dict[str, Any]], dtype: str, rates: dict[str, float]) -> None:
    table = Table(
        title=f"{os.cpu_count()} cores; fp32 {rates['float32'] / 1e9:.0f}, bf16 {rates['bfloat16'] / 1e9:.0f} GFLOP/s; peer in {dtype}"
    )
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for f in found:
        gptq = "gptq" in f["recipe"]
        table.add_row(
            f["model"], f["recipe"], f"{f['ours']:.1f}", f"{f['peer']:.1f}" if "peer" in f else "-",
            f"{f['ours'] / f['peer']:.2f}" if "peer" in f else "-", f"{f['floor']:.1f}" if gptq else "-",
            f"{f['ours'] / f['floor']:.2f}" if gptq else "-", f"{f['ours peak'] / 1e6:.0f}",
            f"{f['peer peak'] / 1e6:.0f}" if "peer" in f else "-",
            f"{f['ours KL']:.5f}" if "ours KL" in f else "-", f"{f['peer KL']:.5f}" if "peer KL" in f else "-",
            "{:.2f} ({:.2f}-{:.2f})".format(*f["KL ratio"]) if "KL ratio" in f else "-",
        )  # fmt: skip
    Console(width=170).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--models", default="small,wide", help="some of %(default)s")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="some of %(default)s")
    parser.add_argument("--no-peer", action="store_true", help="without llm-compressor")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    python = None if options.no_peer else other_python("peer")
    rates = {dtype: gemm_rate(dtype) for dtype in ("float32", "bfloat16")}
    dtype = max(rates, key=lambda name: rates[name])
    base = cache_directory() / "benchmarks"
    base.mkdir(parents=True, exist_ok=True)
    began, found = time.monotonic(), []
    with tempfile.TemporaryDirectory(dir=base) as folder:
        for name, function in (("small", run_small), ("wide", run_wide)):
            if name in options.models.split(","):
                found += function(Path(folder), python, options.recipes.split(","), dtype, rates["float32"])
    show(found, dtype, rates)
    print(f"{time.monotonic() - began:.0f} s in all")
    if options.json:
        options.json.write_text(json.dumps({"rates": rates, "peerDtype": dtype, "figures": found}, indent=2))


if __name__ == "__main__":
    main()
