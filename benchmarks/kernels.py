"""Speed of the kernels beside a plain copy, in one run: `python benchmarks/kernels.py [--eager]`.

Prints a Markdown table: source GB/s (bytes as read) and how long a copy of the same bytes takes in proportion, a ratio
above 1 being faster than the copy. The copy (`Tensor.clone`) is of the larger of what a kernel reads and writes, into
fresh memory, as a kernel's results are. A second table is of the kernels that are matrix products at heart: GFLOP/s (of
what has to be computed), beside one product of as many operations in torch. Best of a few rounds, kernel and yardstick by turns: a shared
machine is noisy.
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


def products(name: str, operations: float, work: Callable[[], object], product: Callable[[], object], product_operations: float) -> None:
    pairs = [(seconds(work), seconds(product)) for _ in range(ROUNDS)]
    rate, reached = operations / min(p[0] for p in pairs) / 1e9, product_operations / min(p[1] for p in pairs) / 1e9
    print(f"| {name} | {rate:.0f} | {rate / reached:.2f} |", flush=True)


def calibrated(wide: int) -> None:
    """GPTQ's column loop (out * in^2 operations), sums of x^T x (one triangle: rows * n^2), the factor of an inverse (n^3)."""
    print("\n| | GFLOP/s | kernel / one product in fp32 |\n|---|---|---|")
    for rows, columns in ((4096, 4096), (4096, wide)):
        weight = torch.randn(rows, columns) * 0.02
        factor = torch.randn(columns, columns).triu_() / columns
        factor.diagonal().abs_().add_(1)
        half = columns // 2

        def product(weight: torch.Tensor = weight, factor: torch.Tensor = factor, half: int = half) -> None:
            torch.mm(weight[:, :half], factor[:half])

        for name in ("W4A16", "FP8_DYNAMIC"):
            scheme = SCHEMES[name]
            found = grid.grid_of(weight, scheme)
            operations = 1.0 * rows * columns**2
            label = f"GPTQ {name} {rows}x{columns}"
            products(label, operations, lambda s=scheme, g=found, w=weight, u=factor: kernels.gptq(w, u, g, s), product, operations)
        scheme = SCHEMES["W4A16"]
        label = f"GPTQ W4A16, groups on the way, {rows}x{columns}"
        products(label, operations, lambda s=scheme, w=weight, u=factor: kernels.gptq_groups(w, u, s, torch.bfloat16), product, operations)
    x, sums = torch.randn(2048, 4096), torch.zeros(4096, 4096)
    for dtype in (torch.bfloat16, torch.float32):
        narrow = x.to(dtype)
        products(
            f"x^T x {dtype}", 2048 * 4096.0**2, lambda n=narrow: kernels.add_gram(sums, n), lambda: torch.mm(x, sums), 2 * 2048 * 4096.0**2
        )
    hessian = x.T @ x + 100 * torch.eye(4096)
    products("inverse factor 4096", 4096.0**3, lambda: kernels.inverse_factor(hessian.clone()), lambda: torch.mm(hessian, hessian), 2 * 4096.0**3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--eager", action="store_true", help="the eager reference instead of the compiled kernels")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--wide", type=int, default=11008, help="columns of the wider weight for GPTQ")
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
    for kind in ("int8_token", "fp8_token", "fp8_group", "fp8_tensor", "fp4_local"):
        constants = {"scale": torch.tensor([0.01])} if kind == "fp8_tensor" else {"global_scale": largest} if kind == "fp4_local" else {}
        report(f"inputs {kind}", weight, lambda kind=kind, constants=constants: kernels.fake_quantize_input(weight, kind, **constants))
    rotated = torch.randn(1024, 4096, dtype=torch.float64)
    report("Hadamard 4096, fp64", rotated, lambda: kernels.hadamard(rotated))
    twelve = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    rotated12 = torch.randn(1024, 12 * 256, dtype=torch.float64)
    report("Hadamard 12 x 256, fp64", rotated12, lambda: kernels.hadamard(rotated12, twelve))
    calibrated(options.wide)


if __name__ == "__main__":
    main()
