"""GPTQ W4A16 on a mixture of experts beside llm-compressor: time, peak memory and quality, on the same rows and machine, in turn.

    python benchmarks/experts.py                           # ten minutes on 2 cores
    python benchmarks/experts.py --rounds 1 --no-peer

A trained Qwen3-MoE (4 layers, hidden 384, 8 experts of 512 neurons, two a token), 128 rows of 512 tokens, timed as `peer.py` says;
medians of the rounds. The router stays exact on both sides. The peer sends every token through every expert to calibrate it, which is
its default; `--routed` has it measure experts on their routed tokens alone, as ours does. It computes in the dtype whose products are
faster here.

The floor is arithmetic at the GEMM rates of the same run, an expert's on the tokens routed to it: one forward, Gram matrices as SYRK and
factorisations once for linears that share an input, the column loop; once all in fp32, once with forward and Gram matrices in the faster
dtype. Only ratios of one run mean anything.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from peer import Bench, divergence, floor_seconds, gemm_rate, ratio, small_bench  # noqa: E402
from setup import cache_directory, other_python  # noqa: E402

EXPERTS = 8
OURS = [{"gptq": {"scheme": "W4A16", "groupSize": 128}}]
PEER = "GPTQModifier(targets='Linear', scheme='W4A16', ignore=['lm_head', 're:.*mlp.gate$'])"
IN_BF16, IN_FP32 = ("linears", "attention", "gram"), ("factors", "loops")
TIME, KL = 0.6, 1.05
"""Of the peer's: what is asked of ours at most."""


def run(bench: Bench, python: Path | None, dtype: str, rounds: int, routed: bool) -> dict[str, list[dict[str, Any]]]:
    """Figures of each round by side; results lie in `bench.work`."""
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for number in range(rounds):
        found["ours"].append(bench.ours(OURS))
        if python:
            found["peer"].append(bench.peer(python, PEER, dtype, all_experts=not routed))
        print(f"round {number + 1}: { ({side: lines[-1:] for side, lines in found.items()}) }", file=sys.stderr, flush=True)
    return {side: lines for side, lines in found.items() if lines}


def show(found: dict[str, list[dict[str, Any]]], kl: dict[str, Any], floors: tuple[float, float], title: str) -> bool:
    """Prints; whether what is asked is met."""
    table = Table(title=title)
    for column in ("", "s", "CPU s", "peak MB", "cores busy with something else", "KL"):
        table.add_column(column, justify="right")
    for side, lines in found.items():
        middle = {figure: median(line[figure] for line in lines) for figure in ("seconds", "cpu", "peak", "others")}
        cells = (f"{middle['seconds']:.1f}", f"{middle['cpu']:.1f}", f"{middle['peak'] / 1e6:.0f}", f"{middle['others']:.1f}")
        table.add_row(side, *cells, f"{float(kl[side].mean()):.5f}")
    Console(width=120).print(table)
    seconds = {side: median(line["seconds"] for line in lines) for side, lines in found.items()}
    print(f"floor: {floors[0]:.1f} s in fp32, {floors[1]:.1f} s in the faster dtype; ours of that: ", end="")
    print(" and ".join(f"{seconds['ours'] / floor:.2f}" for floor in floors))
    if "peer" not in found:
        return True
    share, (mean, low, high) = seconds["ours"] / seconds["peer"], ratio(kl, "ours", "peer")
    print(f"of the peer: {share:.2f} of its time, {mean:.2f} ({low:.2f} to {high:.2f}) of its KL; asked: at most {TIME} and {KL}")
    return share <= TIME and mean <= KL


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--routed", action="store_true", help="the peer calibrates an expert on its routed tokens alone")
    parser.add_argument("--no-peer", action="store_true", help="without llm-compressor (its environment takes 5 GB)")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    python = None if options.no_peer else other_python("peer")
    base = cache_directory() / "benchmarks"
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base) as folder:
        bench, held = small_bench(Path(folder), EXPERTS)
        rates = {dtype: gemm_rate(dtype) for dtype in ("float32", "bfloat16")}
        dtype = max(rates, key=lambda name: rates[name])
        found = run(bench, python, dtype, options.rounds, options.routed)
        kl = divergence(bench.source, {side: bench.work / side for side in found}, held)
        mixed = dict.fromkeys(IN_BF16, rates[dtype]) | dict.fromkeys(IN_FP32, rates["float32"])
        floors = floor_seconds(bench, dict.fromkeys(mixed, rates["float32"])), floor_seconds(bench, mixed)
        speeds = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items())
        met = show(found, kl, floors, f"{os.cpu_count()} cores; {speeds}; peer in {dtype}")
        if options.json:
            rows = {side: value.tolist() for side, value in kl.items()}
            options.json.write_text(json.dumps({"rates": rates, "figures": found, "kl": rows}, indent=2))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
