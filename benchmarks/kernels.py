"""Every kernel beside its eager reference and what the machine can do at most, in one run: `python benchmarks/kernels.py`.

    python benchmarks/kernels.py --device cuda     # the same on a GPU, and GPTQ on blocks of Llama 3 8B's shape (gptq_blocks.py)
    python benchmarks/kernels.py --only gram,GPTQ

Prints Markdown: bytes read and written, operations, time, and what was reached of the two limits: bytes a second beside a copy between
two places that are in use already, operations a second beside a matrix product in the dtype that is multiplied (else fp32), where a
multiply-add counts as two. A kernel is bound by that of which it reaches more. All three are measured by turns, best of some rounds each,
since a shared machine is noisy. Operations are what has to be computed; of kernels that are no products about so many an element, a
division or a conversion counting as one. The reference runs once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tools"), str(ROOT / "tests")]

import torch  # noqa: E402

from kernel_cases import Case, Shapes, cases  # noqa: E402
from kompressor_worker import grid, memory  # noqa: E402
from kompressor_worker.kernels import build  # noqa: E402
from limits import Machine  # noqa: E402

SECONDS = 1.0
"""Rounds of kernel and yardsticks go on for so long, or as many as are asked for."""
PRODUCT = 2 * 1024**3
"""Operations of a product beside a kernel that has fewer itself."""


def tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    parts = result if isinstance(result, tuple) else vars(result).values() if hasattr(result, "__dict__") else ()
    return [tensor for part in parts if isinstance(part, torch.Tensor | grid.Grid) for tensor in tensors(part)]


def measure(case: Case, machine: Machine, rounds: int) -> dict[str, Any]:
    result = case.work()  # compiled, and its memory known
    moved = case.read + (sum(t.nbytes for t in tensors(result)) if case.written is None else case.written)
    del result
    copy, copied = machine.yardstick("copy", moved // 2)
    product, computed = machine.yardstick(case.dtype, max(PRODUCT, int(case.operations)))
    copy(), product()
    taken: list[tuple[float, ...]] = []
    began = time.monotonic()
    while len(taken) < rounds or time.monotonic() - began < SECONDS:
        taken.append(tuple(machine.seconds(work) for work in (case.work, copy, product)))
    seconds, copying, multiplying = map(min, zip(*taken, strict=True))
    return {
        "kernel": case.name, "bytes": moved, "operations": case.operations, "seconds": seconds, "copy": copied / copying,
        "product": computed / multiplying, "ofCopy": moved / seconds / (copied / copying),
        "ofProduct": case.operations / seconds / (computed / multiplying),
        "eagerSeconds": machine.seconds(case.reference) if case.reference else None,
    }  # fmt: skip


def show(f: dict[str, Any]) -> str:
    moved, computed, seconds = f["bytes"] / 1e9, f["operations"] / 1e9, f["seconds"]
    copied, multiplied = f"{moved / seconds:.1f} | {f['ofCopy']:.2f}", f"{computed / seconds:.0f} | {f['ofProduct']:.2f}"
    slower = f"{f['eagerSeconds'] / seconds:.1f}" if f["eagerSeconds"] else "-"
    return f"| {f['kernel']} | {moved * 1e3:.0f} | {computed:.2f} | {seconds * 1e3:.1f} | {copied} | {multiplied} | {slower} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="kernels whose names contain one of these")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    memory.keep_freed_memory()  # as the worker does
    machine = Machine(torch.device(options.device))
    chosen, found = [part for part in options.only.split(",") if part], []
    which = "eager" if os.environ.get("KOMPRESSOR_KERNELS") == "eager" or build.library() is None else "compiled"
    print(f"{machine.name}; kernels {which}, torch {torch.__version__}\n")
    print("| | MB | Gop | ms | GB/s | of a copy | Gop/s | of a product | eager / kernel |\n" + "|---" * 9 + "|")
    for case in cases(Shapes(), getattr(torch, options.dtype), machine.device):
        if not chosen or any(part in case.name for part in chosen):
            found.append(measure(case, machine, options.rounds))
            print(show(found[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine.name, "figures": found}, indent=2))
    if options.device == "cuda" and not chosen:
        import gptq_blocks

        gptq_blocks.report(gptq_blocks.Shape(), machine)


if __name__ == "__main__":
    main()
