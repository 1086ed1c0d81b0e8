"""Activations as the runtime that reads a checkpoint rounds them, in plain torch: the specification of the compiled kernel.

All arithmetic is fp32, as compressed-tensors does it for fp32 input, bit for bit; only the result is in the input's dtype. (vLLM's own
INT8 kernel divides a token's largest magnitude by 127, not 127.5.)

Reads and writes an input once: 2 bytes moved a byte of input, about 10 operations an element for INT8 and 20 for FP8 and FP4, a division
among them. The limit is a copy. `benchmarks/kernels.py` on two EPYC cores: the compiled one moves 5 to 8 GB/s, 0.15 to 0.25 of a copy
between places in use and 0.1 to 0.2 of the arithmetic, since the division, the rounding and fresh memory for the result cost most; 21 to
54 times as fast as this.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kompressor_worker import grid
from kompressor_worker.grid import Grid
from kompressor_worker.schemes import Scheme

KINDS: dict[str, Scheme] = {
    "int8_token": Scheme("int8_token", "", 8, "int", "channel"),
    "fp8_token": Scheme("fp8_token", "", 8, "float", "channel"),
    "fp8_group": Scheme("fp8_group", "", 8, "float", "group", group_size=128),
    "int8_tensor": Scheme("int8_tensor", "", 8, "int", "channel"),
    "int8_tensor_asym": Scheme("int8_tensor_asym", "", 8, "int", "channel", symmetric=False),
    "fp8_tensor": Scheme("fp8_tensor", "", 8, "float", "channel"),
    "fp4_local": Scheme("fp4_local", "nvfp4-pack-quantized", 4, "float", "tensor_group", group_size=16),
}
"""`schemes.Inputs` but for "none": how an input [rows, columns] is quantised, each row a channel."""


def fake_quantize(x: Tensor, kind: str, scale: Tensor | None, zero_point: Tensor | None, global_scale: Tensor | None) -> Tensor:
    """x [rows, columns] quantised and back; scale fp32 [n], of which row r has number r % n, or None: each tile's own range."""
    scheme, source = KINDS[kind], x.float()
    if scale is None:
        found = grid.grid_of(source, scheme, global_scale)
    else:
        rows = scale.repeat(len(x) // len(scale))[:, None]
        found = Grid(rows, None if zero_point is None else zero_point.to(torch.int8).expand(len(x))[:, None])
    made = grid.dequantize(grid.quantize(source, found, scheme), found, scheme)
    return made.masked_fill_(source.isnan(), torch.nan).to(x.dtype)  # an integer cannot hold it
