"""Pruning beside llm-compressor: time and quality, on the same rows, machine and pattern, in turn and in rounds.

    python benchmarks/pruning.py                           # a quarter of an hour on 2 cores
    python benchmarks/pruning.py --recipes wanda50 --rounds 1

A trained Llama (6 layers, hidden 384), 128 rows of 512 tokens, timed as `peer.py` says. Times are medians of the rounds; beside them stands
how many cores were busy with something else. The peer computes in the dtype in which it was faster in a run of Wanda beforehand. What both
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

from peer import Bench, compared, floor_seconds, gemm_rate, small_bench  # noqa: E402
from setup import cache_directory, other_python  # noqa: E402

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
    "sparseGPT2:4": Recipe([{"sparseGPT": {"pattern": "2:4"}}], f"SparseGPTModifier({TWO_OF_FOUR}, {ALL_LINEARS})", FORWARD + SOLVE),
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
    seconds = {dtype: bench.peer(python, RECIPES["wanda50"].peer, dtype)["seconds"] for dtype in ("float32", "bfloat16")}
    print(f"llm-compressor, {seconds} s", file=sys.stderr, flush=True)
    return min(seconds, key=lambda dtype: seconds[dtype])


def run(bench: Bench, held: Any, python: Path | None, names: list[str], dtype: str, rounds: int) -> list[dict[str, Any]]:
    """A line for each recipe: all figures of all rounds by side, and what is left of the model after the last one."""
    found: dict[str, dict[str, Any]] = {name: {"recipe": name, "ours": [], "peer": []} for name in names}
    for number in range(rounds):
        for name, line in found.items():
            line["ours"].append(bench.ours(RECIPES[name].passes))
            if python:
                line["peer"].append(bench.peer(python, RECIPES[name].peer, dtype))
            print(f"{name}, round {number + 1}: {line['ours'][-1]} {line['peer'][-1:]}", file=sys.stderr, flush=True)
            if number + 1 < rounds:
                continue
            folders = {side: bench.work / side for side in ("ours", "peer") if line[side]}
            for side, folder in folders.items():
                line[f"{side} zeros"] = zeros(folder)
                if line[f"{side} zeros"] < 0.5:
                    sys.exit(f"{name}: {side} has set {line[f'{side} zeros']:.1%} of the weights to zero, not half: nothing to compare")
            compared(line, bench.source, folders, held)
    return list(found.values())


def floors(bench: Bench, name: str, rates: dict[str, float]) -> tuple[float, float]:
    """Seconds: all in fp32; and at the best rate for what may be multiplied in bf16."""
    parts = RECIPES[name].parts
    best = {part: max(rates.values()) if part in IN_BF16 else rates["float32"] for part in parts}
    return floor_seconds(bench, dict.fromkeys(parts, rates["float32"])), floor_seconds(bench, best)


COLUMNS = (
    "recipe", "ours s", "peer s", "of peer", "floor s", "of floor", "floor s, bf16", "ours MB", "peer MB", "others", "zeros",
    "KL", "peer's KL", "ratio (95 %)",
)  # fmt: skip


def cells(line: dict[str, Any]) -> list[str]:
    ours, peer = line["ours"], line["peer"]
    seconds = median(one["seconds"] for one in ours)
    theirs = median(one["seconds"] for one in peer) if peer else None
    return [
        line["recipe"], f"{seconds:.1f}", f"{theirs:.1f}" if theirs else "-", f"{seconds / theirs:.2f}" if theirs else "-",
        f"{line['floor']:.1f}", f"{seconds / line['floor']:.2f}", f"{line['floor bf16']:.1f}",
        f"{max(one['peak'] for one in ours) / 1e6:.0f}", f"{max(one['peak'] for one in peer) / 1e6:.0f}" if peer else "-",
        " / ".join(f"{median(one['others'] for one in side):.1f}" for side in (ours, peer) if side),
        " / ".join(f"{line[f'{side} zeros']:.4f}" for side in ("ours", "peer") if line[side]),
        f"{line['ours KL']:.5f}", f"{line['peer KL']:.5f}" if peer else "-",
        "{:.2f} ({:.2f}-{:.2f})".format(*line["KL ratio"]) if peer else "-",
    ]  # fmt: skip


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


def missed(found: list[dict[str, Any]]) -> list[str]:
    """What asks more than TIME or KL of its peer's, by name."""
    names = []
    for line in found:
        ours, peer = (median(one["seconds"] for one in line[side] or [{"seconds": math.inf}]) for side in ("ours", "peer"))
        names += [f"{line['recipe']} (time)"] if ours > TIME * peer else []
        names += [f"{line['recipe']} (KL)"] if line["peer"] and line["KL ratio"][0] > KL else []
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default=",".join(RECIPES), help="some of %(default)s")
    parser.add_argument("--rounds", type=int, default=3)
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
        dtype = faster_dtype(bench, python) if python else "-"
        found = run(bench, held, python, options.recipes.split(","), dtype, options.rounds)
        for line in found:
            line["floor"], line["floor bf16"] = floors(bench, line["recipe"], rates)
    show(found, dtype, rates, options.rounds)
    print(f"{time.monotonic() - began:.0f} s in all")
    if options.json:
        options.json.write_text(json.dumps({"rates": rates, "peerDtype": dtype, "figures": found}, indent=2))


if __name__ == "__main__":
    main()
