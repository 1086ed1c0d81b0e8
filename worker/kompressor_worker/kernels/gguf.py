"""GGUF's tensor types: a weight to the bytes of its rows, and back; and grids for a pass that chooses codes itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kompressor_worker.formats.gguf_packing import read_scales, write_scales
from kompressor_worker.formats.gguf_types import TYPES
from kompressor_worker.kernels.gguf_search import LARGEST
from kompressor_worker.kernels.pieces import Heard, row_pieces, unheard

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
WORK = 4000
"""Of an element, in the multiply-adds that pieces are measured in."""
LEAST = 2.0**-20
"""A column's importance is no less than about this share of the mean: what no activation reached is still rounded to nearest."""


@dataclass(frozen=True)
class GgufGrid:
    """What maps codes of a weight [out, in] to values: scale * code + centre, codes as `grid.integer_range` has them."""

    scale: Tensor
    """fp32 [out, groups]; below zero where the largest magnitude of a group is, zero where all its values are the centre."""
    centre: Tensor
    """fp32 [out, groups]."""
    data: Tensor
    """uint8 [out, row bytes]: the scales as the file holds them, and the nearest codes."""


def gguf_quantize(
    weight: Tensor, kind: str, importance: Tensor | None = None, heard: Heard = unheard, unbiased: bool = True
) -> tuple[Tensor, float, float, int]:
    """Weight [out, in] (bf16, fp16 or fp32) as rows of the tensor type `kind`: data uint8 [out, row bytes], the sums of (value - weight)^2
    and of weight^2, and how many elements are NaN or Inf: unless none, nothing else means anything.

    The scales are searched for so that the squared error is least, weighted with `importance`, fp32 [in], such as the second moments of
    the layer's input. What is beyond fp16's scales is cut off there. `unbiased`: each block's scale is then made larger until the block is
    as long along itself as it was, which no least squares leave it (`gguf_search`). `heard` is called between pieces, and may raise.
    """
    assert weight.dtype in FLOATS and weight.shape[1] % TYPES[kind].block == 0, (weight.dtype, weight.shape, kind)
    share = None if importance is None else _shares(importance.to(weight.device), weight.shape[1])
    made, stats = [], []
    for rows in row_pieces(weight, weight.shape[1] * WORK):
        data, sums = torch.ops.kompressor.gguf_quantize(weight[rows].contiguous(), share, kind, unbiased)
        made.append(data)
        stats.append(sums.tolist())
        heard()
    none = weight.new_empty((0, weight.shape[1] // TYPES[kind].block * TYPES[kind].nbytes), dtype=torch.uint8)
    data = _joined(made, none)
    error, norm, bad = (sum(column) for column in zip(*stats, strict=True)) if stats else (0.0, 0.0, 0)
    return data, error, norm, int(bad)


def gguf_dequantize(data: Tensor, kind: str, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight [out, columns] in `dtype` (bf16, fp16 or fp32) that a reader sees; reckoned in fp32 as ggml does."""
    made: Tensor = torch.ops.kompressor.gguf_dequantize(data.contiguous(), columns, kind, dtype)
    return made


def gguf_codes(data: Tensor, kind: str, columns: int) -> tuple[Tensor, GgufGrid]:
    """Codes int8 [out, columns] of rows of `data`, and the grid that they are on. For types whose levels are even (`GgufType.even`)."""
    assert TYPES[kind].even, kind
    codes, scale, centre = torch.ops.kompressor.gguf_codes(data.contiguous(), columns, kind)
    return codes, GgufGrid(scale, centre, data)


def gguf_grid(weight: Tensor, kind: str, importance: Tensor | None = None, heard: Heard = unheard) -> GgufGrid:
    """The grid on which rounding the weight [out, in] to nearest leaves the least error."""
    data = gguf_quantize(weight, kind, importance, heard, unbiased=False)[0]
    return gguf_codes(data, kind, weight.shape[1])[1]


def gguf_keep_mean(weight: Tensor, data: Tensor, kind: str, squares: Tensor, mean: Tensor, heard: Heard = unheard) -> Tensor:
    """A copy of `data`, rows of the weight [out, in], with some codes a level further where that brings the mean of the layer's output
    nearer to what it is (`gguf_mean`). `squares` and `mean`, fp32 [in]: of the input, per token. Zeros keep their codes. For types whose
    levels are even (`GgufType.even`)."""
    assert TYPES[kind].even and squares.shape == mean.shape == weight.shape[1:], (kind, squares.shape, mean.shape, weight.shape)
    whole = math.fsum(squares.tolist()) / len(squares)
    if not math.isfinite(whole) or whole <= 0:
        return data
    center = (mean.double() * whole**-0.5).to(weight.device)
    variance = (squares.to(weight.device).double() / whole - center.square()).float().clamp(min=LEAST).contiguous()
    made = []
    for rows in row_pieces(weight, weight.shape[1] * WORK):
        part = torch.ops.kompressor.gguf_keep_mean(
            weight[rows].contiguous(), data[rows].contiguous(), variance, center.float().contiguous(), kind
        )
        made.append(part)
        heard()
    return _joined(made, data)


def gguf_pack(codes: Tensor, grid: GgufGrid, kind: str) -> Tensor:
    """data uint8 [out, row bytes] for codes int8 [out, in] on the grid."""
    assert codes.dtype is torch.int8 and len(codes) == len(grid.data), (codes.dtype, codes.shape, grid.data.shape)
    made: Tensor = torch.ops.kompressor.gguf_pack(grid.data.contiguous(), codes.contiguous(), kind)
    return made


def gguf_scaled(data: Tensor, factor: float, kind: str) -> Tensor:
    """A copy of `data` whose values are `factor` times as large, as near as fp16 scales come; of MXFP4, whose are powers of two, there is
    none."""
    blocks, found = data.reshape(-1, TYPES[kind].nbytes).clone(), TYPES[kind]
    scales = read_scales(blocks, found)
    halves = (None if x is None else (x.float() * factor).clamp(-LARGEST, LARGEST).half() for x in (scales.scale, scales.minimum))
    scale, minimum = halves
    assert scale is not None and kind != "MXFP4", kind
    write_scales(blocks, replace(scales, scale=scale, minimum=minimum), found)
    return blocks.view(data.shape)


def gguf_errors(weight: Tensor, data: Tensor, kind: str) -> tuple[float, float]:
    """Sums of (value - weight)^2 and of weight^2."""
    error, norm = torch.ops.kompressor.gguf_errors(weight.contiguous(), data.contiguous(), kind).tolist()
    return error, norm


def _joined(pieces: list[Tensor], none: Tensor) -> Tensor:
    """One is not copied: fresh memory costs as much as the search of a simple type."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else none


def _shares(importance: Tensor, columns: int) -> Tensor | None:
    """fp32 [columns], about 1 on average and above zero. Divided by a power of two, which changes no bit of what comes out; None: there is
    nothing to go by."""
    assert importance.shape == (columns,), (importance.shape, columns)
    mean = math.fsum(importance.tolist()) / columns
    if not math.isfinite(mean) or mean <= 0:
        return None
    return (importance.double() * 2.0 ** -math.frexp(mean)[1]).float().clamp(min=LEAST).contiguous()
