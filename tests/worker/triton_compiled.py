"""The Triton kernels compiled for GPUs that need not be there, by the calls that would launch them: `python triton_compiled.py`.

Says what an interpreter cannot: that every operation reaches its kernels by the dispatcher, that they compile as they are called and fit a
processor's shared memory, that divisions are rounded as IEEE 754 says, and that sums of bf16 go through tensor cores."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kompressor_worker import grid
from kompressor_worker.kernels import ops
from kompressor_worker.schemes import SCHEMES

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
SHARED = 99 << 10
"""Bytes that a program may have on sm_86 and sm_89, which have the least."""


class Absent:
    """A GPU that is only compiled for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # one cache of kernels each

    def get_current_stream(self, device: int) -> int:
        return 0


def launches(capability: int) -> dict[str, list[Any]]:
    """What is compiled from now on, by name; nothing runs, so that results are whatever the memory held."""
    compiled: dict[str, list[Any]] = {}
    launch = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert all(0 < size < 1 << 16 for size in grid[1:]) and grid[0] > 0, (self, grid)
        compiled.setdefault(self.fn.__name__, []).append(original(self, *args, grid=grid, warmup=True, **kwargs))

    original = getattr(launch, "original", launch)
    compile_only.original = original  # type: ignore[attr-defined]
    JITFunction.run = compile_only  # type: ignore[method-assign]
    driver.set_active(Absent(capability))
    return compiled


def on_cuda(operation: str, *arguments: Any) -> Any:
    """As the dispatcher calls it for tensors on a GPU."""
    return getattr(torch.ops.kompressor, operation).default.redispatch(CUDA, *arguments)


def call(rows: int = 300, columns: int = 384) -> None:
    """Every operation, every kernel."""
    weight, factor = torch.randn(rows, columns), torch.eye(columns)
    tiles = torch.zeros(columns, dtype=torch.int32)
    for floating, bits, symmetric in ((False, 4, False), (True, 8, True), (True, 4, True)):
        zero_point = None if symmetric else torch.zeros(rows, 1, dtype=torch.int8)
        on_cuda("gptq", weight, factor, torch.ones(rows, 1), zero_point, tiles, floating, bits, 128)
    goes = torch.zeros(rows, columns, dtype=torch.uint8)
    on_cuda("gptq", weight, factor, torch.ones(rows, 1), None, tiles, False, 4, 128, goes)
    on_cuda("prune_columns", weight[:, :128].contiguous(), factor[:128, :128].contiguous(), goes[:, :128].contiguous(), 0, 0)
    on_cuda("prune_columns", weight[:, :128].contiguous(), factor[:128, :128].contiguous(), None, 2, 4)
    on_cuda("gptq_groups", weight, factor, 128, 4, True, torch.bfloat16)
    half, one = weight.bfloat16(), torch.ones(1)
    for kind in ("int8_token", "fp8_token", "fp8_group"):
        on_cuda("fake_quantize", half, kind, None, None, None)
    on_cuda("fake_quantize", half, "fp4_local", None, None, one)
    on_cuda("fake_quantize", half, "int8_tensor_asym", one, torch.zeros(1, dtype=torch.int8), None)
    for dtype in (torch.float64, torch.float32):
        on_cuda("hadamard", torch.randn(3, 4096, dtype=dtype), None)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        on_cuda("add_gram", torch.zeros(2048, 2048), torch.zeros(64, 2048, dtype=dtype))
    on_cuda("add_gram", torch.zeros(384, 384), half)
    on_cuda("amax", half)
    targets, logits = torch.zeros(rows, dtype=torch.int64), half.clone()
    for kind, labels, cap, gradient in (("forward", 0.0, None, True), ("reverse", 0.5, None, False), ("jensenShannon", 0.5, 30.0, True)):
        on_cuda("divergence", logits, half, targets, kind, 2.0, labels, cap, cap, gradient)
    on_cuda("divergence", weight.clone(), None, targets, "forward", 1.0, 1.0, 30.0, None, True)
    indices, logs = torch.zeros(rows, 9, dtype=torch.int32), torch.zeros(rows, 9)
    on_cuda("top_k_divergence", logits, indices, logs, torch.zeros(rows), targets, "forward", 1.0, 0.5, 30.0, True)
    for name in ("W8A8", "W4A16_ASYM", "W3A16", "FP8", "FP8_BLOCK", "MXFP4", "NVFP4"):
        scheme = SCHEMES[name]
        codes, *_ = on_cuda("quantize", half, name, scheme.group_size or -1, one)
        found, tile = grid.grid_of(half, scheme, one), scheme.tile((rows, columns))
        on_cuda("dequantize", codes, scheme.bits, columns, found.step, found.zero_point, tile, torch.bfloat16)
        chosen = torch.zeros(rows, columns, dtype=torch.int8 if scheme.type == "int" else torch.float8_e4m3fn)
        on_cuda("code_errors", half, chosen, found.step, found.zero_point, tile)
        on_cuda("pack", chosen, scheme.bits)


KERNELS = {
    "round_block", "prune_block", "quantize_rows", "quantize_groups", "transform", "add_triangle", "find_ranges", "encode_some",
    "pack_some", "price_some", "decode_some", "judge_rows", "sum_rest", "write_rest",
}  # fmt: skip


DIVIDING = {
    "round_block",
    "prune_block",
    "quantize_rows",
    "quantize_groups",
    "encode_some",
    "transform",
    "judge_rows",
    "sum_rest",
    "write_rest",
}


def main() -> None:
    assert ops.LIBRARY.ns == "kompressor"
    for capability in (80, 90):
        compiled = launches(capability)
        call()
        assert compiled.keys() == KERNELS, compiled.keys() ^ KERNELS
        for name, kernels in compiled.items():
            for kernel in kernels:
                assembly = kernel.asm["ptx"]
                assert f".target sm_{capability}" in assembly
                assert kernel.metadata.shared <= SHARED, (name, kernel.metadata.shared)
                assert "div.full" not in assembly and "div.approx" not in assembly and "tf32" not in assembly, name
                assert ("div.rn" in assembly) == (name in DIVIDING), name
        tensor_cores = ["mma" in kernel.asm["ptx"] for kernel in compiled["add_triangle"]]
        assert tensor_cores == [True, True, False, True], "bf16, fp16, fp32, bf16"


if __name__ == "__main__":
    main()
