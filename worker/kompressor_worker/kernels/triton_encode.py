"""Codes in Triton: weights to what the file holds and what that costs, chosen codes packed and priced, and the file back to a weight.

A program has a few whole pieces of rows; the grid's tiles are looked up element by element, so that packed words begin where programs do,
whatever the groups. Each kernel reads and writes once: `encode` 2 bytes of a weight in bf16 and bits / 8 of codes, `pack` 1 + bits / 8,
`code_errors` 3, `dequantize` bits / 8 + 2. Some 30 operations an element, an exact division among them, for `encode`, 5 to 15 for the
others: at 3 TB/s a GPU has time for about ten an element, so `encode` is bound by arithmetic there and the others by memory.
"""
# mypy: disable-error-code="import-untyped,import-not-found,untyped-decorator,no-untyped-def,no-untyped-call,misc"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kompressor_worker.kernels import eager
from kompressor_worker.kernels.triton_rounding import nibble_of, round_to, value_of_byte, value_of_nibble

LINES, CHUNK = 4, 512
"""Rows and columns of a program. Columns: a multiple of 32, so whole words of any width."""
WHOLE, WORDS, PAIRS = (tl.constexpr(form) for form in (0, 1, 2))
"""How codes are held: a byte each; int32 words without gaps; E2M1 by pairs."""


@triton.jit
def place(lines: tl.constexpr, chunk: tl.constexpr):
    """Rows [lines, 1] and columns [1, chunk] of this program."""
    row = (tl.program_id(0) * lines + tl.arange(0, lines)).to(tl.int64)
    return row[:, None], (tl.program_id(1) * chunk + tl.arange(0, chunk))[None, :]


@triton.jit
def put(codes, code, row, column, held, rows, stride, form: tl.constexpr, bits: tl.constexpr, lines: tl.constexpr, chunk: tl.constexpr):
    """Stores code (int32 [lines, chunk]; without an offset, of FP4 the E4M3 byte) in rows of `stride` elements of `codes`."""
    if form == WHOLE:
        tl.store(codes + row * stride + column, code.to(codes.dtype.element_ty), mask=held)
    elif form == PAIRS or 32 % bits == 0:
        each: tl.constexpr = 2 if form == PAIRS else 32 // bits
        code = nibble_of(code) if form == PAIRS else code + (1 << (bits - 1))
        parts = tl.reshape(tl.where(held, code, 0), (lines, chunk // each, each)) << (tl.arange(0, each) * bits)[None, None, :]
        at = (tl.program_id(1) * (chunk // each) + tl.arange(0, chunk // each))[None, :]
        tl.store(codes + row * stride + at, tl.sum(parts, axis=2).to(codes.dtype.element_ty), mask=(row < rows) & (at < stride))
    else:
        parts = tl.reshape(tl.where(held, code + (1 << (bits - 1)), 0), (lines, chunk // 32, 32))
        for word in tl.static_range(bits):  # 32 codes fill `bits` words; one may lie in two of them
            shift = (tl.arange(0, 32) * bits - 32 * word)[None, None, :]
            left = tl.where((shift >= 0) & (shift < 32), parts << tl.minimum(tl.maximum(shift, 0), 31), 0)
            right = tl.where((shift < 0) & (shift > -bits), parts >> tl.minimum(tl.maximum(-shift, 0), 31), 0)
            at = (tl.program_id(1) * (chunk // 32) + tl.arange(0, chunk // 32))[None, :] * bits + word
            tl.store(codes + row * stride + at, tl.sum(left + right, axis=2), mask=(row < rows) & (at < stride))


@triton.jit
def get(codes, row, column, held, stride, form: tl.constexpr, floating: tl.constexpr, bits: tl.constexpr):
    """fp32 values of the codes there, before zero point and step."""
    if form == PAIRS:
        byte = tl.load(codes + row * stride + column // 2, mask=held, other=0).to(tl.int32)
        value = value_of_nibble((byte >> (column % 2 * 4)) & 15)
    elif form == WORDS:
        first = column * bits
        at, shift = first // 32, first % 32
        word = tl.load(codes + row * stride + at, mask=held, other=0).to(tl.int64) & 0xFFFFFFFF
        if 32 % bits != 0:
            word |= tl.load(codes + row * stride + at + 1, mask=held & (shift + bits > 32), other=0).to(tl.int64) << 32
        value = (((word >> shift) & ((1 << bits) - 1)) - (1 << (bits - 1))).to(tl.float32)
    elif floating:
        value = value_of_byte(tl.load(codes + row * stride + column, mask=held, other=0).to(tl.int32) & 0xFF)
    else:
        value = tl.load(codes + row * stride + column, mask=held, other=0).to(tl.float32)
    return value


@triton.jit
def add_up(errors, error, x):
    """This program's sums of squares, fp64; both are 0 beyond the edges, where weight, code and zero point are read as 0."""
    at = errors + 2 * (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1))
    error, x = error.to(tl.float64), x.to(tl.float64)
    tl.store(at, tl.sum(tl.sum(error * error, axis=1), axis=0))
    tl.store(at + 1, tl.sum(tl.sum(x * x, axis=1), axis=0))


@triton.jit
def encode_some(
    weight, steps, zero_points, codes, errors, rows, columns, stride, height, width, tiles,
    asymmetric: tl.constexpr, form: tl.constexpr, floating: tl.constexpr, bits: tl.constexpr, lines: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """Each element of a weight on its tile's grid: steps and zero_points [row tiles, tiles], tiles of `height` rows and `width` columns."""
    row, column = place(lines, chunk)
    held = (row < rows) & (column < columns)
    x = tl.load(weight + row * columns + column, mask=held, other=0.0).to(tl.float32)
    step = tl.load(steps + row // height * tiles + column // width, mask=held, other=1.0)
    y = tl.math.div_rn(x, step)
    zero_point = 0.0
    if asymmetric:
        zero_point = tl.load(zero_points + row // height * tiles + column // width, mask=held, other=0).to(tl.float32)
        y += zero_point
    value, code = round_to(y, floating, bits)
    put(codes, code, row, column, held, rows, stride, form, bits, lines, chunk)
    add_up(errors, (value - zero_point) * step - x, x)


@triton.jit
def pack_some(
    codes, packed, rows, columns, stride, form: tl.constexpr, bits: tl.constexpr, lines: tl.constexpr, chunk: tl.constexpr
):  # fmt: skip
    row, column = place(lines, chunk)
    held = (row < rows) & (column < columns)
    code = tl.load(codes + row * columns + column, mask=held, other=0).to(tl.int32)
    put(packed, code, row, column, held, rows, stride, form, bits, lines, chunk)


@triton.jit
def price_some(
    weight, codes, steps, zero_points, errors, rows, columns, height, width, tiles,
    asymmetric: tl.constexpr, floating: tl.constexpr, lines: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    row, column = place(lines, chunk)
    held = (row < rows) & (column < columns)
    x = tl.load(weight + row * columns + column, mask=held, other=0.0).to(tl.float32)
    value = get(codes, row, column, held, columns, WHOLE, floating, 8)
    at = row // height * tiles + column // width
    if asymmetric:
        value -= tl.load(zero_points + at, mask=held, other=0).to(tl.float32)
    add_up(errors, value * tl.load(steps + at, mask=held, other=1.0) - x, x)


@triton.jit
def decode_some(
    codes, steps, zero_points, made, rows, columns, stride, height, width, tiles,
    asymmetric: tl.constexpr, form: tl.constexpr, floating: tl.constexpr, bits: tl.constexpr, lines: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    row, column = place(lines, chunk)
    held = (row < rows) & (column < columns)
    value = get(codes, row, column, held, stride, form, floating, bits)
    at = row // height * tiles + column // width
    if asymmetric:
        value -= tl.load(zero_points + at, mask=held, other=0).to(tl.float32)
    value *= tl.load(steps + at, mask=held, other=1.0)
    tl.store(made + row * columns + column, value.to(made.dtype.element_ty), mask=held)


def programs(rows: int, columns: int) -> tuple[int, int]:
    return triton.cdiv(rows, LINES), triton.cdiv(columns, CHUNK)


def bytes_of(codes: Tensor) -> Tensor:
    """FP8 as the bytes that it is: GPUs before sm_89 have no such type."""
    return codes.view(torch.uint8) if codes.dtype is torch.float8_e4m3fn else codes


def pack(codes: Tensor, bits: int) -> Tensor:
    """As `eager.pack`."""
    if codes.dtype is torch.float32 or not codes.numel():
        return eager.pack(codes, bits)
    rows, columns = codes.shape
    pairs = codes.dtype is not torch.int8
    shape, dtype = ((rows, columns // 2), torch.uint8) if pairs else ((rows, triton.cdiv(columns * bits, 32)), torch.int32)
    packed = torch.empty(shape, dtype=dtype, device=codes.device)
    form = PAIRS if pairs else WORDS
    pack_some[programs(rows, columns)](bytes_of(codes), packed, rows, columns, shape[1], form, bits, LINES, CHUNK)
    return packed


def code_errors(weight: Tensor, codes: Tensor, step: Tensor, zero_point: Tensor | None, tile: Sequence[int]) -> Tensor:
    """As `eager.code_errors`."""
    if codes.dtype is torch.float32 or not codes.numel():
        return eager.code_errors(weight, codes, step, zero_point, tile)
    (rows, columns), step = weight.shape, step.contiguous()
    errors = torch.empty((*programs(rows, columns), 2), dtype=torch.float64, device=weight.device)
    price_some[programs(rows, columns)](
        weight, bytes_of(codes), step, step if zero_point is None else zero_point.contiguous(), errors, rows, columns, tile[0], tile[1],
        step.shape[1], zero_point is not None, codes.dtype is not torch.int8, LINES, CHUNK,
    )  # fmt: skip
    return errors.sum(dim=(0, 1)).cpu()


def dequantize(
    codes: Tensor, bits: int, columns: int, step: Tensor, zero_point: Tensor | None, tile: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """As `eager.dequantize`."""
    rows, step = len(codes), step.contiguous()
    made = torch.empty((rows, columns), dtype=dtype, device=codes.device)
    if not made.numel():
        return made
    form = {torch.int32: WORDS, torch.uint8: PAIRS}.get(codes.dtype, WHOLE)
    decode_some[programs(rows, columns)](
        bytes_of(codes), step, step if zero_point is None else zero_point.contiguous(), made, rows, columns, codes.shape[1], tile[0],
        tile[1], step.shape[1], zero_point is not None, form, codes.dtype is torch.float8_e4m3fn, bits, LINES, CHUNK,
    )  # fmt: skip
    return made
