"""Matrix products of bf16 beside those of fp32 on this CPU, by which calibration and training choose: `python benchmarks/products.py`.

At the shapes of a block's linears, activations of 2,048 tokens, by one thread and by all; CPU seconds, so that what else the machine does
counts little. Exit code 1 where `processor.multiplies_bf16` says what is not so.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "worker"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from torch.nn.functional import linear  # noqa: E402

from figures import table  # noqa: E402
from kompressor_worker.processor import features, model_name, multiplies_bf16  # noqa: E402

TOKENS, ROUNDS = 2048, 7
SHAPES = ((256, 256), (512, 256), (1024, 1024), (4096, 1024), (4096, 4096))


def rate(dtype: torch.dtype, rows: int, columns: int) -> float:
    """Operations a second of CPU, median."""
    x, weight = torch.randn(TOKENS, columns).to(dtype), torch.randn(rows, columns).to(dtype)
    linear(x, weight)
    took = []
    for _ in range(ROUNDS):
        began = time.process_time()
        linear(x, weight)
        took.append(time.process_time() - began)
    return 2 * TOKENS * rows * columns / median(took)


def main() -> int:
    lines, ratios = list[list[object]](), list[float]()
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        for rows, columns in SHAPES:
            wide, narrow = (rate(dtype, rows, columns) / 1e9 for dtype in (torch.float32, torch.bfloat16))
            ratios.append(narrow / wide)
            lines.append([threads, f"{rows} x {columns}", f"{wide:.0f}", f"{narrow:.0f}", f"{narrow / wide:.2f}"])
    print(f"{model_name()}; {', '.join(sorted(x for x in features() if 'bf16' in x)) or 'no instructions for bf16'}\n")
    print(table(["threads", "weight", "fp32, G a second of CPU", "bf16", "bf16 / fp32"], lines))
    faster = median(ratios) > 1
    print(f"\nmultiplied in {'bf16' if multiplies_bf16() else 'fp32'}")
    return 0 if faster == multiplies_bf16() else 1


if __name__ == "__main__":
    sys.exit(main())
