"""Throughput of the kernels beside that of a plain copy of the same bytes, in one run: `python benchmarks/kernels.py [--eager]`.

Prints a Markdown table: source GB/s (bytes of the weight as read), the copy's, and their ratio. The copy reads the
same weight and writes as many fresh bytes as it has: what no kernel that reads and writes memory goes much below.
Best of a few rounds, kernels and copy by turns, since a shared machine is noisy.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch

from kompressor_worker import grid, kernels
from kompressor_worker.kernels import build, eager
from kompressor_worker.schemes import SCHEMES

ROWS, COLUMNS = 4096, 8192
ROUNDS = 5


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def report(name: str, nbytes: int, work: Callable[[], object], source: torch.Tensor) -> None:
    work()
    pairs = [(seconds(work), seconds(source.clone)) for _ in range(ROUNDS)]
    took, copied = min(p[0] for p in pairs), min(p[1] for p in pairs)
    speed, floor = nbytes / took / 1e9, source.nbytes / copied / 1e9
    print(f"| {name} | {speed:.2f} | {floor:.2f} | {speed / floor:.2f} |", flush=True)


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
    print("| | source GB/s | copy GB/s | ratio |\n|---|---|---|---|")
    for scheme in [*SCHEMES.values(), SCHEMES["W4A16"].with_group_size(-1)]:
        name = scheme.name + (" channel" if scheme.choosable_groups and scheme.strategy == "channel" else "")
        report(name, weight.nbytes, lambda scheme=scheme: kernels.quantize(weight, scheme, largest), weight)
    report("amax / nonfinite", weight.nbytes, lambda: kernels.amax(weight), weight)
    codes, inverse = weight.float().to(torch.float8_e4m3fn), torch.rand(ROWS // 128, COLUMNS // 128)
    decode = eager.decode_fp8_block if options.eager else kernels.decode_fp8_block
    report("FP8 blocks to bf16", codes.nbytes, lambda: decode(codes, inverse, (128, 128), torch.bfloat16), codes)
    blocks = torch.randint(0, 256, (4, 2880, 90, 16), dtype=torch.uint8)
    exponents = torch.randint(110, 130, (4, 2880, 90), dtype=torch.uint8)
    mxfp4 = eager.decode_mxfp4 if options.eager else kernels.decode_mxfp4
    report("MXFP4 experts to bf16", blocks.nbytes, lambda: mxfp4(blocks, exponents, torch.bfloat16), blocks)


if __name__ == "__main__":
    main()
