"""Round to nearest in Triton: ranges of tiles, a grid from them by `grid.grid_of_range` itself, then the codes (`triton_encode`).

A weight is read twice, the second time from the L2 cache where it fits (50 MB on an H100), and its codes are written once: 4 bytes and
bits / 8 an element in bf16, where one read would do with 2 and bits / 8. Finding ranges takes about 6 operations an element and is bound by
memory.
"""
# mypy: disable-error-code="import-untyped,import-not-found,untyped-decorator,no-untyped-def,no-untyped-call,misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kompressor_worker import grid
from kompressor_worker.kernels import eager
from kompressor_worker.kernels.triton_encode import CHUNK, LINES, PAIRS, WHOLE, WORDS, bytes_of, encode_some, programs
from kompressor_worker.schemes import Scheme

ELEMENTS = 2048
"""That a program looks at together."""
STRETCH = 1 << 14
"""Elements of a tensor of any shape whose range one row of a program finds."""


@triton.jit
def find_ranges(
    weight, low, high, bad, rows, columns, height, width, tiles, segments,
    block: tl.constexpr, lines: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """Smallest and largest finite value, with 0 among them, and what is not finite: of `lines` tiles of one row, or of a block of rows."""
    line = tl.arange(0, lines)
    if block:  # a program, a tile
        tile = tl.program_id(0)
        row, left = tile // tiles * height + line, tile % tiles * width + line * 0
        inside = (line < height) & (row < rows)
    else:  # tiles one after the other, row by row
        tile = tl.program_id(0) * lines + line
        row, left = tile // tiles, tile % tiles * width
        inside = tile < segments
    start = row.to(tl.int64) * columns
    least = tl.zeros((lines, chunk), dtype=tl.float32)
    most = tl.zeros((lines, chunk), dtype=tl.float32)
    count = tl.zeros((lines, chunk), dtype=tl.int32)
    for first in range(0, width, chunk):
        within = first + tl.arange(0, chunk)[None, :]
        column = left[:, None] + within
        held = inside[:, None] & (within < width) & (column < columns)
        x = tl.load(weight + start[:, None] + column, mask=held, other=0.0).to(tl.float32)
        finite = tl.abs(x) < float("inf")  # false for NaN
        count += tl.where(finite, 0, 1)
        x = tl.where(finite, x, 0.0)
        least, most = tl.minimum(least, x), tl.maximum(most, x)
    least, most, count = tl.min(least, axis=1), tl.max(most, axis=1), tl.sum(count, axis=1)
    if block:
        least, most, count = tl.min(least, axis=0), tl.max(most, axis=0), tl.sum(count, axis=0)
        tl.store(low + tile, least)
        tl.store(high + tile, most)
        tl.store(bad + tile, count)
    else:
        tl.store(low + tile, least, mask=inside)
        tl.store(high + tile, most, mask=inside)
        tl.store(bad + tile, count, mask=inside)


def ranges(weight: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """low, high fp32 and counts int32 [row tiles, tiles] of weight [rows, columns] in tiles of `height` rows and `width` columns."""
    rows, columns = weight.shape
    shape = triton.cdiv(rows, height), triton.cdiv(columns, width)
    low, high = (torch.empty(shape, device=weight.device) for _ in range(2))
    bad = torch.empty(shape, dtype=torch.int32, device=weight.device)
    if height == 1:
        chunk = min(1024, triton.next_power_of_2(width))
        lines, count = ELEMENTS // chunk, triton.cdiv(low.numel(), ELEMENTS // chunk)
    else:
        lines, count = triton.next_power_of_2(height), low.numel()
        chunk = min(triton.next_power_of_2(width), max(16, ELEMENTS // lines))
    find_ranges[(count,)](
        weight, low, high, bad, rows, columns, height, width, shape[1], low.numel(), height != 1, lines, chunk,
    )  # fmt: skip
    return low, high, bad


def amax(weight: Tensor) -> Tensor:
    """As `eager.amax`, fp64 [2] on the device."""
    if not weight.numel():
        return torch.zeros(2, dtype=torch.float64)
    low, high, bad = ranges(weight.view(1, -1), 1, STRETCH)
    return torch.stack([torch.maximum(-low.min(), high.max()).double(), bad.sum().double()])


def quantize(weight: Tensor, scheme: str, group_size: int, shared: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `eager.quantize`: codes, scale, zero point (empty where there is none) and, fp64 [3], errors, squares and what is not finite."""
    chosen, (rows, columns) = eager.scheme_of(scheme, group_size), weight.shape
    if not weight.numel():
        return eager.tensors(eager.quantize(weight, chosen, shared))
    shared = None if shared is None else shared.to(weight.device)
    if chosen.strategy == "tensor":
        found, bad = grid.grid_of(weight, chosen, shared), amax(weight)[1]
    else:
        low, high, counts = ranges(weight, *chosen.tile((rows, columns)))
        found, bad = grid.grid_of_range(low, high, chosen, weight.dtype, shared), counts.sum().double()
    codes, sums = _encode(weight, found, chosen)
    scale, zero_point = eager.stored_grid(found, chosen, weight.dtype)
    empty = torch.empty(0, dtype=torch.int32, device=weight.device)
    return codes, scale, empty if zero_point is None else zero_point, torch.cat([sums, bad[None]])


def _encode(weight: Tensor, found: grid.Grid, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes as the file holds them, and fp64 [2]: squared error and squared norm."""
    (rows, columns), (height, width), step = weight.shape, scheme.tile((weight.shape[0], weight.shape[1])), found.step.contiguous()
    if scheme.format == "pack-quantized":
        form, stride, dtype = WORDS, triton.cdiv(columns * scheme.bits, 32), torch.int32
    elif scheme.format in eager.PACKED:
        form, stride, dtype = PAIRS, columns // 2, torch.uint8
    else:
        form, stride, dtype = WHOLE, columns, torch.int8 if scheme.type == "int" else torch.float8_e4m3fn
    codes = torch.empty((rows, stride), dtype=dtype, device=weight.device)
    errors = torch.empty((*programs(rows, columns), 2), dtype=torch.float64, device=weight.device)
    encode_some[programs(rows, columns)](
        weight, step, step if found.zero_point is None else found.zero_point.contiguous(), bytes_of(codes), errors, rows, columns, stride,
        height, width, step.shape[1], found.zero_point is not None, form, scheme.type == "float", scheme.bits, LINES, CHUNK,
    )  # fmt: skip
    return codes, errors.sum(dim=(0, 1))
