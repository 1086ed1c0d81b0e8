"""The kernels in plain torch that work on weights: what the compiled ones must equal.

Those read a weight once and write its codes once: 2 bytes in bf16 and bits / 8 an element to quantise, the other way round to decode.
About 13 operations an element for integers, 25 for FP8 and FP4: range, division, rounding, and the error with its square in fp64.
`benchmarks/kernels.py` on two EPYC cores, of a copy between places in use and of arithmetic: quantising 0.1 to 0.3 and 0.1 to 0.25,
decoding 0.07 to 0.2 and 0.03 to 0.1, the largest magnitude 0.8 of a copy; most of the rest is spent on divisions, conversions and fresh
memory. 13 to 170 times as fast as this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kompressor_worker import grid
from kompressor_worker.formats import packing
from kompressor_worker.schemes import SCHEMES, Scheme


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


GridOf = Callable[[Tensor, Scheme, Tensor | None], grid.Grid]
"""As `grid.grid_of`, tile by tile."""
CHUNK = 1 << 20
"""Elements worked on at once: fp32 and fp64 copies of them stay in the cache, and memory does not grow with the weight."""


def quantize(weight: Tensor, scheme: Scheme, shared: Tensor | None = None, grid_of: GridOf = grid.grid_of) -> Quantized:
    """Round to nearest: the grid of each tile's own range (or of `grid_of`), codes packed as `scheme.format` stores them.

    shared, fp32 [1], of all tensors that are one to a loader: NVFP4's global scale (`grid.global_scale`); their largest magnitude where a
    tensor has one scale.
    """
    assert shared is not None or scheme.strategy not in ("tensor", "tensor_group"), f"{scheme.name} needs what is shared"
    shared = None if shared is None else shared.to(weight.device)
    rows, columns = weight.shape
    whole = max(1, CHUNK // max(1, columns * 128)) * 128  # 128: whole blocks, and whole words of zero points
    parts = [_quantize_rows(weight[start : start + whole], scheme, shared, grid_of) for start in range(0, rows, whole)]
    zero_points = [part.zero_point for part in parts if part.zero_point is not None]
    return Quantized(
        torch.cat([part.codes for part in parts]),
        parts[0].scale if scheme.strategy == "tensor" else torch.cat([part.scale for part in parts]),
        torch.cat(zero_points) if zero_points else None,
        sum(part.squared_error for part in parts),
        sum(part.squared_norm for part in parts),
        sum(part.nonfinite for part in parts),
    )


def scheme_of(name: str, group_size: int) -> Scheme:
    """In groups of so many columns, where they can be chosen; -1: one scale a channel."""
    scheme = SCHEMES[name]
    return scheme.with_group_size(group_size) if scheme.choosable_groups else scheme


def tensors(result: Quantized) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What an operation may return: tensors, an empty one where there is no zero point; fp64 [3], errors, squares, what is not finite."""
    zero_point = torch.empty(0, dtype=torch.int32) if result.zero_point is None else result.zero_point
    stats = torch.tensor([result.squared_error, result.squared_norm, result.nonfinite], dtype=torch.float64)
    return result.codes, result.scale, zero_point, stats


def _quantize_rows(weight: Tensor, scheme: Scheme, shared: Tensor | None, grid_of: GridOf) -> Quantized:
    bad = nonfinite(weight)
    if bad:
        weight = torch.zeros_like(weight)
    found = grid_of(weight, scheme, shared)
    codes = grid.quantize(weight, found, scheme)
    source = weight.float()
    error = (grid.dequantize(codes, found, scheme) - source).double().square().sum()
    packed, scale, zero_point = stored(codes, found, scheme, weight.dtype)
    return Quantized(packed, scale, zero_point, float(error), float(source.double().square().sum()), bad)


def stored(codes: Tensor, found: grid.Grid, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points of `grid.quantize` as the file holds them: `Quantized`'s first three, for a weight
    of `dtype`."""
    if scheme.format in PACKED:
        codes = pack(codes, scheme.bits)
    return codes, *stored_grid(found, scheme, dtype)


PACKED = ("pack-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized")
"""Formats that hold codes of less than a byte, or integers with an offset."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integer codes as int32 words [out, ceil(in * bits / 32)]; FP4 values (fp32 or float8_e4m3fn) as pairs, uint8 [out, in / 2]."""
    return packing.pack_int32(codes, bits) if codes.dtype is torch.int8 else packing.pack_fp4(codes.float())


def stored_grid(found: grid.Grid, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points as the file holds them, for a weight of `dtype`."""
    if scheme.format == "mxfp4-pack-quantized":
        exponent = torch.where(found.scale.isinf(), 255, found.scale.contiguous().view(torch.int32) >> 23)
        return exponent.to(torch.uint8), None
    if scheme.format == "nvfp4-pack-quantized":
        return found.scale.to(torch.float8_e4m3fn), None
    zero_point = None if found.zero_point is None else packing.pack_int32(found.zero_point, scheme.bits, dim=0)
    return found.scale.to(dtype), zero_point


def dequantize(
    codes: Tensor, bits: int, columns: int, step: Tensor, zero_point: Tensor | None, tile: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The weight [out, columns] in `dtype`: codes as the file holds them (int8, float8_e4m3fn, int32 words, FP4 pairs in uint8), step fp32
    and zero_point int8 [out tiles, in tiles], of tiles of `tile` rows and columns."""
    if codes.dtype is torch.int32:
        codes = packing.unpack_int32(codes, bits, columns)
    elif codes.dtype is torch.uint8:
        codes = packing.unpack_fp4(codes)
    return grid.dequantize(codes, grid.Grid(step, zero_point), _scheme_of_tiles(tile)).to(dtype)


def _scheme_of_tiles(tile: Sequence[int]) -> Scheme:
    return Scheme("", "", 8, "float", "block", block=(tile[0], tile[1]))


def code_errors(weight: Tensor, codes: Tensor, step: Tensor, zero_point: Tensor | None, tile: Sequence[int]) -> Tensor:
    """fp64 [2] on the CPU: sums of (dequantised - weight)^2 and of weight^2, differences in fp32, squares and sums in fp64.

    step fp32 and zero_point int8 [out tiles, in tiles], of tiles of `tile` rows and columns.
    """
    source = weight.float()
    error = (grid.dequantize(codes, grid.Grid(step, zero_point), _scheme_of_tiles(tile)) - source).double().square().sum()
    return torch.stack([error, source.double().square().sum()]).cpu()


def amax(weight: Tensor) -> tuple[float, int]:
    """Largest finite magnitude, and the number of NaN and Inf."""
    most, bad = 0.0, 0
    for part in torch.split(weight.reshape(-1), CHUNK):
        if part.numel():
            magnitudes = torch.where(part.isfinite(), part.float().abs(), 0.0)
            most, bad = max(most, float(magnitudes.max())), bad + nonfinite(part)
    return most, bad


def nonfinite(tensor: Tensor) -> int:
    return tensor.numel() - int(tensor.isfinite().sum())


def decode_fp8_block(weight: Tensor, scale_inv: Tensor, block: Sequence[int], dtype: torch.dtype) -> Tensor:
    rows, columns = block
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for i in range(scale_inv.shape[0]):
        part = slice(i * rows, (i + 1) * rows)
        scale = scale_inv[i].float().repeat_interleave(columns)[: weight.shape[1]]
        out[part] = (weight[part].float() * scale).to(dtype)
    return out


def decode_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    experts, rows, groups, _ = blocks.shape
    out = torch.empty((experts, groups * 32, rows), dtype=dtype, device=blocks.device)
    for expert in range(experts):
        values = packing.unpack_fp4(blocks[expert]) * grid.mx_scale(scales[expert])[..., None]
        out[expert] = values.flatten(-2).t().to(dtype)
    return out
