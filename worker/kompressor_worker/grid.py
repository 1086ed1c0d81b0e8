"""Quantisation grids: scales and zero points from ranges, rounding to the grid and back. Plain torch, the specification
of the kernels.

All arithmetic is fp32. A scale is rounded to the dtype it is stored in before anything is quantised with it, so what is
reported is what a reader gets. Bit for bit what compressed-tensors computes from fp32 input (`calculate_qparams`,
`quantize`, `generate_mx_scales`, `generate_gparam`), with one rule beyond it: a scale that becomes zero only when it is
stored (fp16 underflow) is replaced just as one that is zero from the start.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kompressor_worker.schemes import Scheme

FP8_MAX = 448.0
FP4_MAX = 6.0
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""E2M1 magnitudes by their three low bits; bit 3 is the sign."""
ZERO_SCALE = torch.finfo(torch.float32).eps
"""What stands for a scale of zero, so that nothing is divided by zero: compressed-tensors' choice for INT and FP8
scales."""
ZERO_SCALE_NVFP4 = 0.125
"""The same for NVFP4's group scales, which are E4M3."""


@dataclass(frozen=True)
class Grid:
    """What maps one weight [out, in] to codes and back; tiles as `Scheme.tile` says."""

    scale: Tensor
    """fp32, the value of the stored scale; [out tiles, in tiles]. NVFP4: relative to `global_scale`."""
    zero_point: Tensor | None = None
    """int8 codes in [-8, 7], shaped as `scale`; asymmetric integers only."""
    global_scale: Tensor | None = None
    """fp32 [1], a divisor of `scale`; NVFP4 only."""

    @property
    def step(self) -> Tensor:
        """fp32, shaped as `scale`: the real width that a code of one stands for."""
        return self.scale if self.global_scale is None else self.scale / self.global_scale


def integer_range(scheme: Scheme) -> tuple[int, int]:
    return -(1 << (scheme.bits - 1)), (1 << (scheme.bits - 1)) - 1


def limit(scheme: Scheme) -> float:
    """The code that a symmetric tile's largest magnitude is mapped to: 127.5, 7.5, 448 or 6."""
    if scheme.type == "float":
        return FP8_MAX if scheme.bits == 8 else FP4_MAX
    return ((1 << scheme.bits) - 1) / 2


def global_scale(amax: Tensor) -> Tensor:
    """NVFP4's fp32 [1] global scale for a largest magnitude (fp32, any shape with one element): 448 * 6 / amax, or 1
    where that overflows."""
    amax = amax.float().reshape(1).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.nan_to_num(FP8_MAX * FP4_MAX / amax, nan=1.0, posinf=1.0, neginf=1.0)


def grid_of_range(low: Tensor, high: Tensor, scheme: Scheme, dtype: torch.dtype, global_scale: Tensor | None = None) -> Grid:
    """The grid for tiles that span [low, high] (fp32, equal shapes); scales as rounded to `dtype`, or to the scheme's
    own scale dtype."""
    low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
    amax = torch.maximum(low.abs(), high.abs())
    if scheme.format == "mxfp4-pack-quantized":
        return Grid(mx_scale(mx_exponent(amax)))
    if scheme.format == "nvfp4-pack-quantized":
        assert global_scale is not None, "NVFP4 needs the global scale of the tensors that share it"
        scale = (global_scale * (amax / FP4_MAX)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()
        return Grid(torch.where(scale == 0, ZERO_SCALE_NVFP4, scale), global_scale=global_scale)
    if scheme.symmetric:
        return Grid(_stored(amax / limit(scheme), dtype))
    bottom, top = integer_range(scheme)
    scale = (high - low) / float(top - bottom)
    # 0/0 for a tile of zeros: any code will do, and 0 is what the conversion of NaN gives on x86
    zero_point = torch.nan_to_num(bottom - low / scale, nan=0.0).clamp(bottom, top).round().to(torch.int8)
    return Grid(_stored(scale, dtype), zero_point)


def grid_of(weight: Tensor, scheme: Scheme, shared: Tensor | None = None) -> Grid:
    """Round-to-nearest's grid for weight [out, in] (bf16, fp16 or fp32): each tile's own range, scales as stored in the
    weight's dtype. `shared`: NVFP4's global scale; where a tensor has one scale, the largest magnitude of all that share it."""
    if scheme.strategy == "tensor" and shared is not None:
        most = shared.reshape(1, 1)
        return grid_of_range(-most, most, scheme, weight.dtype)
    tiles = _tiled(weight.float(), scheme)
    return grid_of_range(tiles.amin(dim=(1, 3)), tiles.amax(dim=(1, 3)), scheme, weight.dtype, shared)


def quantize(weight: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """Codes [out, in] of weight [out, in]: int8 for integers, float8_e4m3fn for FP8, fp32 values of E2M1 for FP4 (-0
    kept apart from 0)."""
    codes = _tiled(weight.float(), scheme) / grid.step[:, None, :, None]
    if grid.zero_point is not None:
        codes = codes + grid.zero_point.float()[:, None, :, None]
    if scheme.type == "int":
        bottom, top = integer_range(scheme)
        return _untiled(codes.clamp(bottom, top).round().to(torch.int8), weight)
    if scheme.bits == 8:
        return _untiled(codes.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), weight)
    return _untiled(round_to_fp4(codes), weight)


def dequantize(codes: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """fp32 [out, in] of codes [out, in]."""
    values = _tiled(codes.float(), scheme)
    if grid.zero_point is not None:
        values = values - grid.zero_point.float()[:, None, :, None]
    return _untiled(values * grid.step[:, None, :, None], codes)


def round_to_fp4(values: Tensor) -> Tensor:
    """fp32 to the nearest E2M1 value, ties to the even code, clamped to 6. A negative value that rounds to zero becomes
    -0."""
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=values.device)
    magnitude = values.abs()
    # ties: down at 0.25, 1.25, 2.5 and 5, up at 0.75, 1.75 and 3.5
    index = torch.bucketize(magnitude, bounds) + (magnitude == 0.75).long() + (magnitude == 1.75).long() + (magnitude == 3.5).long()
    return torch.tensor(FP4_VALUES, device=values.device)[index] * torch.sign(values)


def mx_exponent(amax: Tensor) -> Tensor:
    """E8M0 exponents (uint8, bias 127) of MXFP4 groups with these largest magnitudes (fp32).

    The exponent of amax less 2, after rounding amax to E2M1's one mantissa bit, so 7/4 and more carries into the next
    power of two (compressed-tensors' `generate_mx_scales`; OCP's own rule has no carry). 0 for a group of zeros; 255
    means that no scale fits.
    """
    exponent = ((amax.float().contiguous().view(torch.int32) + (1 << 21)) >> 23) - 2
    carried_to_infinity = exponent == 253
    return torch.where(carried_to_infinity, 255, exponent.clamp(min=0)).to(torch.uint8)


def mx_scale(exponent: Tensor) -> Tensor:
    """fp32 2^(exponent - 127) of E8M0 exponents (uint8); infinity for 255."""
    bits = exponent.to(torch.int32) << 23
    return torch.where(exponent == 0, 1 << 22, bits).view(torch.float32)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    scale = scale.to(dtype).float()
    return torch.where(scale == 0, ZERO_SCALE, scale)


def _tiled(matrix: Tensor, scheme: Scheme) -> Tensor:
    """[out, in] as [out tiles, rows, in tiles, columns]; partial tiles filled with zeros, which are inside every
    range."""
    out, columns = matrix.shape
    height, width = scheme.tile((out, columns))
    matrix = torch.nn.functional.pad(matrix, (0, -columns % width, 0, -out % height))
    return matrix.reshape(matrix.shape[0] // height, height, matrix.shape[1] // width, width)


def _untiled(tiles: Tensor, like: Tensor) -> Tensor:
    matrix = tiles.reshape(tiles.shape[0] * tiles.shape[1], tiles.shape[2] * tiles.shape[3])
    return matrix[: like.shape[0], : like.shape[1]].contiguous()
