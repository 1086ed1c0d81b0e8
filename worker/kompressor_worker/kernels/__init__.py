"""Fused kernels: one read of a weight gives codes, scales and errors.

Each operation stands twice: in `eager`, plain torch and its specification, and in `kernels.cpp`, compiled for this CPU
at first use. The one dispatch rule: the compiled one where it could be built and the tensor is on the CPU, else the
eager one; `KOMPRESSOR_KERNELS=eager` forces that. Both give the same tensors bit for bit, whatever the number of
threads; the fp64 sums agree to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kompressor_worker.kernels import eager
from kompressor_worker.schemes import Scheme

__all__ = ["Quantized", "amax", "decode_fp8_block", "decode_mxfp4", "nonfinite", "quantize"]

Quantized = eager.Quantized


def quantize(weight: Tensor, scheme: Scheme, global_scale: Tensor | None = None) -> Quantized:
    """Weight [out, in] (bf16, fp16 or fp32, contiguous, CPU), rounded to nearest on its own grid; see
    `eager.quantize`."""
    return eager.quantize(weight, scheme, global_scale)


def amax(weight: Tensor) -> tuple[float, int]:
    """Largest finite magnitude of a bf16, fp16 or fp32 tensor, and how many of its elements are NaN or Inf."""
    return eager.amax(weight)


def nonfinite(tensor: Tensor) -> int:
    """How many elements of a bf16, fp16 or fp32 tensor are NaN or Inf."""
    return eager.nonfinite(tensor)


def decode_fp8_block(weight: Tensor, scale_inv: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """FP8 checkpoint to `dtype`: weight e4m3 [out, in] times fp32 scale_inv [ceil(out/r), ceil(in/c)], as DeepSeek-V3
    and transformers."""
    return eager.decode_fp8_block(weight, scale_inv, block, dtype)


def decode_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """gpt-oss experts to `dtype`: blocks uint8 [E, rows, groups, 16], scales uint8 [E, rows, groups] -> [E, groups *
    32, rows]."""
    return eager.decode_mxfp4(blocks, scales, dtype)
