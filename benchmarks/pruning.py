"""Pruning beside llm-compressor: time and quality, on the same rows, machine and pattern, in turn and in rounds.

    python benchmarks/pruning.py                           # a quarter of an hour on 2 cores
    python benchmarks/pruning.py --recipes wanda50 --rounds 1

A trained Llama (6 layers, hidden 384), 128 rows of 512 tokens, timed as `peer.py` says. Times are medians of the rounds; beside them stand
those of the CPU, and how many cores were busy with something else. The peer computes in the dtype in which it took less of the CPU in a run
of Wanda beforehand. What both
have published is loaded by transformers: the share of zeros in the decoder's matrices, and the mean KL divergence from the original on
held-out rows.

The floor is arithmetic at the GEMM rates of the same run: one forward; for SparseGPT also Gram matrices as SYRK and factorisations once
for all linears that share an input, and the column loop. Once all in fp32; once with the forward and the Gram matrices, which ours
multiplies in bf16 where the CPU does that faster, at the rate of bf16. Only ratios of one run mean anything.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from peer import Bench, divergence, floor_seconds, gemm_rate, ratio, small_bench  # noqa: E402
from setup import cache_directory, other_python  # noqa: E402

SIDES = ("ours", "peer")
HALF, TWO_OF_FOUR = "sparsity=0.5", "sparsity=0.5, mask_structure='2:4'"
ALL_LINEARS = "targets=['Linear'], ignore=['re:.*lm_head']"
FORWARD, SOLVE = ("linears", "attention"), ("gram", "factors", "loops")
IN_BF16 = (*FORWARD, "gram")
"""What ours multiplies in the model's dtype where that is faster; the rest is fp32."""


@dataclass(frozen=True)
class Recipe:
    passes: list[dict[str, Any]]
    peer: str
    """In Python."""
    parts: tuple[str, ...]
    """Of `limits.operations`: what has to be computed."""


RECIPES = {
    "wanda50": Recipe([{"wanda": {"sparsity": 0.5}}], f"WandaPruningModifier({HALF}, {ALL_LINEARS})", FORWARD),
    "sparseGPT50": Recipe([{"sparseGPT": {"sparsity": 0.5}}], f"SparseGPTModifier({HALF}, {ALL_LINEARS})", FORWARD + SOLVE),
    "sparseGPT2of4": Recipe([{"sparseGPT": {"pattern": "2:4"}}], f"SparseGPTModifier({TWO_OF_FOUR}, {ALL_LINEARS})", FORWARD + SOLVE),
}
"""Ours, and the peer's. All ask for half of the weights."""
TIME, KL = 0.6, 1.05
"""Of the peer's: what is asked of ours at most."""


def zeros(folder: Path) -> float:
    """The share of zeros in the decoder's matrices."""
    from safetensors.torch import load_file

    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    matrices = [tensor for name, tensor in tensors.items() if name.endswith("_proj.weight")]
    return sum(int((tensor == 0).sum()) for tensor in matrices) / max(1, sum(tensor.numel() for tensor in matrices))


def faster_dtype(bench: Bench, python: Path) -> str:
    cpu = {dtype: bench.peer(python, RECIPES["wanda50"].peer, dtype)["cpu"] for dtype in ("float32", "bfloat16")}
    print(f"llm-compressor, seconds of CPU: {cpu}", file=sys.stderr, flush=True)
    return min(cpu, key=lambda dtype: cpu[dtype])


def run(bench: Bench, python: Path | None, names: list[str], dtype: str, rounds: int) -> list[dict[str, Any]]:
    """A line for each recipe: all figures of all rounds by side. Results lie in `bench.work`, as "<recipe>-ours" and "<recipe>-peer"."""
    found: list[dict[str, Any]] = [{"recipe": name, "ours": [], "peer": []} for name in names]
    for number in range(rounds):
        for line in found:
            recipe = RECIPES[name := line["recipe"]]
            line["ours"].append(bench.ours(recipe.passes, f"{name}-ours"))
            if python:
                line["peer"].append(bench.peer(python, recipe.peer, dtype, f"{name}-peer"))
            print(f"{name}, round {number + 1}: {line['ours'][-1]} {line['peer'][-1:]}", file=sys.stderr, flush=True)
    return found


def judge(found: list[dict[str, Any]], bench: Bench, held: Any) -> None:
    """Adds what is left of the model, by side."""
    folders = {f"{line['recipe']}-{side}": bench.work / f"{line['recipe']}-{side}" for line in found for side in SIDES if line[side]}
    for name, folder in folders.items():
        if (share := zeros(folder)) < 0.5:
            sys.exit(f"{name}: {share:.1%} of the weights are zero, not half: nothing to compare")
    kl = divergence(bench.source, folders, held)
    for line in found:
        for side in SIDES:
            if line[side]:
                name = f"{line['recipe']}-{side}"
                line |= {f"{side} zeros": zeros(folders[name]), f"{side} KL": float(kl[name].mean())}
        if line["peer"]:
            line["KL ratio"] = ratio(kl, *(f"{line['recipe']}-{side}" for side in SIDES))


def floors(bench: Bench, name: str, rates: dict[str, float]) -> tuple[float, float]:
    """Seconds: all in fp32; and at the best rate for what may be multiplied in bf16."""
    parts = RECIPES[name].parts
    best = {part: max(rates.values()) if part in IN_BF16 else rates["float32"] for part in parts}
    return floor_seconds(bench, dict.fromkeys(parts, rates["float32"])), floor_seconds(bench, best)


COLUMNS = (
    "recipe", "ours s", "peer s", "of peer", "CPU s", "of peer's", "floor s", "of floor", "by CPU", "floor s, bf16", "MB", "others",
    "zeros", "KL", "peer's KL", "ratio (95 %)",
)  # fmt: skip


def middle(line: dict[str, Any], side: str, figure: str) -> float:
    """NaN where there is no peer."""
    return median(one[figure] for one in line[side]) if line[side] else math.nan


def cells(line: dict[str, Any]) -> list[str]:
    sides = [side for side in SIDES if line[side]]
    (seconds, theirs), (cpu, their_cpu) = ((middle(line, side, figure) for side in SIDES) for figure in ("seconds", "cpu"))
    return [
        line["recipe"], f"{seconds:.1f}", f"{theirs:.1f}", f"{seconds / theirs:.2f}",
        f"{cpu:.1f} / {their_cpu:.1f}", f"{cpu / their_cpu:.2f}",
        f"{line['floor']:.1f}", f"{seconds / line['floor']:.2f}", f"{cpu / (os.cpu_count() or 1) / line['floor']:.2f}",
        f"{line['floor bf16']:.1f}",
        " / ".join(f"{max(one['peak'] for one in line[side]) / 1e6:.0f}" for side in sides),
        " / ".join(f"{middle(line, side, 'others'):.1f}" for side in sides),
        " / ".join(f"{line[f'{side} zeros']:.4f}" for side in sides),
        *(f"{line[f'{side} KL']:.5f}" if side in sides else "-" for side in SIDES),
        "{:.2f} ({:.2f}-{:.2f})".format(*line["KL ratio"]) if line["peer"] else "-",
    ]  # fmt: skip


def missed(found: list[dict[str, Any]]) -> list[str]:
    """What asks more than TIME or KL of its peer's, by name."""
    late = [f"{line['recipe']} (time)" for line in found if middle(line, "ours", "seconds") > TIME * middle(line, "peer", "seconds")]
    return late + [f"{line['recipe']} (KL)" for line in found if line["peer"] and line["KL ratio"][0] > KL]


def show(found: list[dict[str, Any]], dtype: str, rates: dict[str, float], rounds: int) -> None:
    table = Table(
        title=f"{os.cpu_count()} cores; fp32 {rates['float32'] / 1e9:.0f}, bf16 {rates['bfloat16'] / 1e9:.0f} GFLOP/s; peer in {dtype}; "
        f"medians of {rounds} rounds; others: cores busy with something else beside ours / beside the peer"
    )
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for line in found:
        table.add_row(*cells(line))
    Console(width=190).print(table)
    print(f"asked: at most {TIME} of the peer's time and {KL} of its KL; missed by: {', '.join(missed(found)) or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default=",".join(RECIPES), help="some of %(default)s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="the peer's (default: the faster one)")
    parser.add_argument("--no-peer", action="store_true", help="without llm-compressor (its environment takes 5 GB)")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    python = None if options.no_peer else other_python("peer")
    base = cache_directory() / "benchmarks"
    base.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=base) as folder:
        bench, held = small_bench(Path(folder))
        rates = {dtype: gemm_rate(dtype) for dtype in ("float32", "bfloat16")}
        dtype = options.dtype or (faster_dtype(bench, python) if python else "-")
        found = run(bench, python, options.recipes.split(","), dtype, options.rounds)
        judge(found, bench, held)
        for line in found:
            line["floor"], line["floor bf16"] = floors(bench, line["recipe"], rates)
    show(found, dtype, rates, options.rounds)
    print(f"{time.monotonic() - began:.0f} s in all")
    if options.json:
        options.json.write_text(json.dumps({"rates": rates, "peerDtype": dtype, "figures": found}, indent=2))


if __name__ == "__main__":
    main()
