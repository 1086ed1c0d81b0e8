"""The Triton kernels compiled for GPUs that need not be there: `python triton_compiled.py`. Says what an interpreter cannot: that they
compile, and that divisions are rounded as IEEE 754 says."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kompressor_worker.kernels import triton_activations, triton_column_loop

LOOP = {"weight": "*fp32", "factor": "*fp32", "steps": "*fp32", "zero_points": "*i8", "group_of": "*i32", "codes": "*i8", "errors": "*fp32"}
LOOP |= dict.fromkeys(("rows", "columns", "groups", "start", "count"), "i32")


def compiles(kernel: Any, types: dict[str, str], capability: int, **constants: Any) -> str:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs={(names.index(name),): value for name, value in constants.items()})
    assembly: str = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    return assembly


def main() -> None:
    made = {"x": "*bf16", "made": "*bf16", "rows": "i32", "columns": "i32"}
    for floating, bits, symmetric in ((False, 4, False), (True, 8, True), (True, 4, True)):
        kind = {"floating": floating, "bits": bits, "symmetric": symmetric}
        loop = compiles(triton_column_loop.round_block, LOOP, 90, **kind, height=triton_column_loop.ROWS, width=triton_column_loop.BLOCK)
        assert loop.count("div.rn.f32") >= 2
    rows = made | {"scale": "*fp32", "zero_points": "*i8", "scales": "i32"}
    dynamic = compiles(triton_activations.quantize_rows, rows, 80, given=False, asymmetric=False, floating=True, bits=8, chunk=2048)
    compiles(triton_activations.quantize_rows, rows, 90, given=True, asymmetric=True, floating=False, bits=8, chunk=2048)
    groups = made | {"shared": "*fp32", "width": "i32"}
    compiles(triton_activations.quantize_groups, groups, 90, floating=True, bits=4, tile=16, height=128, has_shared=True)
    assert "div.rn.f32" in dynamic and "div.full" not in dynamic
    compiles(triton_activations.transform, {"x": "*fp64", "made": "*fp64"}, 80, size=4096, levels=12, root=64.0)


if __name__ == "__main__":
    main()
