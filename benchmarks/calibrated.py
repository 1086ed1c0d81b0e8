"""Calibrated quantisation beside llm-compressor: time, peak memory and quality, on the same rows, machine and scheme, in turn.

    python benchmarks/calibrated.py                        # both models, all recipes; about half an hour on 2 cores
    python benchmarks/calibrated.py --models small --recipes gptq

small: a trained Llama (6 layers, hidden 384), 128 rows of 512 tokens, judged by its mean KL divergence from the original on held-out rows.
wide: random weights (hidden 2048, FFN 5632), 32 rows of 512 tokens, at 4 and, ours alone, at 12 layers: cost and memory.

Both are timed as `peer.py` says. The peer computes in the dtype whose products are faster on this machine; AWQ, which it cannot run on a
CPU, stands beside its GPTQ. The floor is arithmetic at the fp32 GEMM rate measured in the same run: one forward, Gram matrices as SYRK and
factorisations once for all linears that share an input, the column loop. Where the CPU multiplies bf16 faster, ours does so in the forward
and the Gram matrices, and can fall below it. Only ratios of one run mean anything.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import checkpoint  # noqa: E402
from peer import Bench, divergence, floor_seconds, gemm_rate, ratio, small_bench, write_rows  # noqa: E402
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
PARTS = ("linears", "attention", "gram", "factors", "loops")
"""Of `limits.operations`."""


def peers(bench: Bench, python: Path, dtype: str) -> Callable[[str], dict[str, Any]]:
    """Its figures by our recipe's name, with its "files"; each recipe of its own is run once."""

    @cache
    def run(recipe: str, name: str) -> dict[str, Any]:
        return bench.peer(python, recipe, dtype, name) | {"files": bench.work / name}

    theirs = sorted({recipe for _, recipe in RECIPES.values()})
    return lambda name: run(RECIPES[name][1], f"peer-{theirs.index(RECIPES[name][1])}")


def run_small(work: Path, python: Path | None, recipes: list[str], dtype: str, rate: float) -> list[dict[str, Any]]:
    bench, held = small_bench(work)
    peer, found, floor = peers(bench, python, dtype) if python else None, [], floor_seconds(bench, dict.fromkeys(PARTS, rate))
    for recipe in recipes:
        ours = bench.ours(RECIPES[recipe][0])
        line = {"model": "small", "recipe": recipe, "ours": ours["seconds"], "ours peak": ours["peak"], "floor": floor}
        folders = {"ours": work / "ours"}
        if peer:
            theirs = peer(recipe)
            folders["peer"] = theirs["files"]
            line |= {"peer": theirs["seconds"], "peer peak": theirs["peak"]}
        kl = divergence(bench.source, folders, held)
        line |= {f"{name} KL": float(rows.mean()) for name, rows in kl.items()}
        if peer:
            line["KL ratio"] = ratio(kl, "ours", "peer")
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
        peer = peers(bench, python, dtype) if python and layers == 4 else None
        floor = floor_seconds(bench, dict.fromkeys(PARTS, rate))
        for recipe in recipes if layers == 4 else ["gptq"]:
            ours = bench.ours(RECIPES[recipe][0])
            line = {"model": f"wide {layers}", "recipe": recipe, "ours": ours["seconds"], "ours peak": ours["peak"], "floor": floor}
            if peer:
                theirs = peer(recipe)
                line |= {"peer": theirs["seconds"], "peer peak": theirs["peak"]}
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
    parser.add_argument("--models", default="small,wide", help="some of %(default)s")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="some of %(default)s")
    parser.add_argument("--no-peer", action="store_true", help="without llm-compressor")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
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
