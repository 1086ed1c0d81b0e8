"""Speed of the kernels beside a plain copy, in one run: `python benchmarks/kernels.py [--eager]`.

Prints a Markdown table: source GB/s (bytes as read) and how long a copy of the same bytes takes in proportion, a ratio
above 1 being faster than the copy. The copy (`Tensor.clone`) is of the larger of what a kernel reads and writes, into
fresh memory, as a kernel's results are. Best of a few rounds, kernel and copy by turns: a shared machine is noisy.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch

from kompressor_worker import grid, kernels
from kompressor_worker.kernels import build
from kompressor_worker.schemes import SCHEMES

ROWS, COLUMNS = 4096, 8192
ROUNDS = 5


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def report(name: str, source: torch.Tensor, work: Callable[[], torch.Tensor | kernels.Quantized | tuple[float, int]]) -> None:
    made = work()
    larger = made if isinstance(made, torch.Tensor) and made.nbytes > source.nbytes else source
    pairs = [(seconds(work), seconds(larger.clone)) for _ in range(ROUNDS)]
    took, copied = min(p[0] for p in pairs), min(p[1] for p in pairs)
    print(f"| {name} | {source.nbytes / took / 1e9:.2f} | {copied / took:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--eager", action="store_true", help="the eager reference instead of the compiled kernels")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.eager:
        os.environ["KOMPRESSOR_KERNELS"] = "eager"
    torch.manual_seed(0)
    weight = (torch.randn(ROWS, COLUMNS) * 0.02).to(getattr(torch, options.dtype))
    largest = grid.global_scale(torch.tensor(kernels.amax(weight)[0]))
    which = "eager" if build.library() is None else "compiled"
    print(f"{which}, {options.dtype}, {options.threads} threads, load {os.getloadavg()[0]:.1f}, {weight.nbytes / 1e6:.0f} MB\n")
    print("| | source GB/s | copy / kernel |\n|---|---|---|")
    for scheme in [*SCHEMES.values(), SCHEMES["W4A16"].with_group_size(-1)]:
        name = scheme.name + (" channel" if scheme.choosable_groups and scheme.strategy == "channel" else "")
        report(name, weight, lambda scheme=scheme: kernels.quantize(weight, scheme, largest))
    report("amax, NaN and Inf", weight, lambda: kernels.amax(weight))
    codes, inverse = weight.float().to(torch.float8_e4m3fn), torch.rand(ROWS // 128, COLUMNS // 128)
    report("FP8 blocks to bf16", codes, lambda: kernels.decode_fp8_block(codes, inverse, (128, 128), torch.bfloat16))
    blocks = torch.randint(0, 256, (4, 2880, 90, 16), dtype=torch.uint8)
    exponents = torch.randint(110, 130, (4, 2880, 90), dtype=torch.uint8)
    report("MXFP4 experts to bf16", blocks, lambda: kernels.decode_mxfp4(blocks, exponents, torch.bfloat16))


if __name__ == "__main__":
    main()
