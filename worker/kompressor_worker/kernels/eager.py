"""The kernels in plain torch: what the compiled ones must equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kompressor_worker import grid
from kompressor_worker.formats import packing
from kompressor_worker.schemes import Scheme


@dataclass(frozen=True)
class Quantized:
    """A weight [out, in] on its grid, as the file holds it."""

    codes: Tensor
    """int8 [out, in], float8_e4m3fn [out, in], int32 words [out, ceil(in * bits / 32)] or FP4 pairs uint8 [out, in /
    2]."""
    scale: Tensor
    """[out tiles, in tiles]: in the weight's dtype; MXFP4 uint8 exponents; NVFP4 float8_e4m3fn."""
    zero_point: Tensor | None
    """int32 words [ceil(out * bits / 32), groups]; asymmetric integers only."""
    squared_error: float
    """Sum of (dequantised - original)^2; the difference in fp32, squares and sums in fp64."""
    squared_norm: float
    nonfinite: int
    """NaN and Inf in the weight. Unless it is 0, nothing else here means anything."""


def quantize(weight: Tensor, scheme: Scheme, global_scale: Tensor | None = None) -> Quantized:
    """Round to nearest: the grid of each tile's own range, codes packed as `scheme.format` stores them.

    NVFP4 needs the fp32 [1] `global_scale` of all tensors that share it (`grid.global_scale`).
    """
    bad = nonfinite(weight)
    source = weight.float()
    if bad:
        source, weight = torch.zeros_like(source), torch.zeros_like(weight)
    found = grid.grid_of(weight, scheme, global_scale)
    codes = grid.quantize(weight, found, scheme)
    error = (grid.dequantize(codes, found, scheme) - source).double().square().sum()
    packed, scale, zero_point = stored(codes, found, scheme, weight.dtype)
    return Quantized(packed, scale, zero_point, float(error), float(source.double().square().sum()), bad)


def stored(codes: Tensor, found: grid.Grid, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points of `grid.quantize` as the file holds them: `Quantized`'s first three, for a weight
    of `dtype`."""
    if scheme.format == "mxfp4-pack-quantized":
        exponent = torch.where(found.scale.isinf(), 255, found.scale.contiguous().view(torch.int32) >> 23)
        return packing.pack_fp4(codes), exponent.to(torch.uint8), None
    if scheme.format == "nvfp4-pack-quantized":
        return packing.pack_fp4(codes), found.scale.to(torch.float8_e4m3fn), None
    if scheme.format == "pack-quantized":
        codes = packing.pack_int32(codes, scheme.bits)
    zero_point = None if found.zero_point is None else packing.pack_int32(found.zero_point, scheme.bits, dim=0)
    return codes, found.scale.to(dtype), zero_point


def amax(weight: Tensor) -> tuple[float, int]:
    finite = weight.isfinite()
    magnitudes = torch.where(finite, weight.float().abs(), 0.0)
    return float(magnitudes.max()) if weight.numel() else 0.0, weight.numel() - int(finite.sum())


def nonfinite(tensor: Tensor) -> int:
    return tensor.numel() - int(tensor.isfinite().sum())


def decode_fp8_block(weight: Tensor, scale_inv: Tensor, block: Sequence[int], dtype: torch.dtype) -> Tensor:
    rows, columns = block
    expanded = scale_inv.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return (weight.float() * expanded[: weight.shape[0], : weight.shape[1]]).to(dtype)


def decode_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    values = packing.unpack_fp4(blocks) * grid.mx_scale(scales)[..., None]
    return values.flatten(-2).transpose(1, 2).to(dtype).contiguous()
