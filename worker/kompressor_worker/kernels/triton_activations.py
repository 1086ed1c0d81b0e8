"""Fake quantisation of activations and the Hadamard transform in Triton: each reads its input once or twice, the second time from the
cache, and writes it once.

4 bytes moved an element of bf16 and 10 to 20 operations, an exact division of some ten instructions among them; a transform moves 8 or 16
bytes for log2(n) additions. At 3 TB/s a GPU has time for about twenty operations an element, so both are bound by memory or nearly so.
"""
# mypy: disable-error-code="import-untyped,import-not-found,untyped-decorator,no-untyped-def,no-untyped-call,misc"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kompressor_worker.kernels import activations, butterflies
from kompressor_worker.kernels.triton_rounding import clamp, round_to, round_to_float

ZERO_SCALE = tl.constexpr(torch.finfo(torch.float32).eps)
CHUNK = 2048
TRANSFORM = 1 << 14
"""Numbers that a program transforms in registers; a longer row is left to torch."""


@triton.jit
def step_of(amax, shared, floating: tl.constexpr, bits: tl.constexpr):
    """grid.grid_of_range for a symmetric tile, scales in fp32; NVFP4 below the global scale `shared`."""
    if bits == 4:
        scale, _ = round_to_float(clamp(shared * tl.math.div_rn(amax, tl.full(amax.shape, 6.0, tl.float32)), 0.0, 448.0), 3, -6)
        step = tl.math.div_rn(tl.where(scale == 0, 0.125, scale), shared + tl.zeros_like(amax))
    else:
        limit: tl.constexpr = 448.0 if floating else 127.5
        step = tl.math.div_rn(amax, tl.full(amax.shape, limit, tl.float32))
        step = tl.where(step == 0, ZERO_SCALE, step)
    return step


@triton.jit
def round_some(x, step, zero_point, floating: tl.constexpr, bits: tl.constexpr):
    value, _ = round_to(tl.math.div_rn(x, step) + zero_point, floating, bits)
    return tl.where(x == x, (value - zero_point) * step, x)


@triton.jit
def quantize_rows(
    x, made, scale, zero_points, scales, columns,
    given: tl.constexpr, asymmetric: tl.constexpr, floating: tl.constexpr, bits: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """A row a program, with one scale: its own, or number row % scales of those given."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * columns
    offset = tl.arange(0, chunk)
    if given:
        step = tl.load(scale + row % scales + offset * 0)
    else:
        most = tl.zeros((chunk,), dtype=tl.float32)
        for left in range(0, columns, chunk):
            some = tl.load(x + start + left + offset, mask=left + offset < columns, other=0.0).to(tl.float32)
            most = tl.where((tl.abs(some) > most) | (some != some), tl.abs(some), most)
        bad = tl.max((most != most).to(tl.int32), axis=0)
        amax = tl.where(bad != 0, float("nan"), tl.max(most, axis=0))
        step = step_of(amax + tl.zeros((chunk,), dtype=tl.float32), 1.0, floating, bits)
    zero_point = 0.0
    if asymmetric:
        zero_point = tl.load(zero_points).to(tl.float32)
    for left in range(0, columns, chunk):
        held = left + offset < columns
        some = tl.load(x + start + left + offset, mask=held, other=0.0).to(tl.float32)
        tl.store(made + start + left + offset, round_some(some, step, zero_point, floating, bits).to(made.dtype.element_ty), mask=held)


@triton.jit
def quantize_groups(
    x, made, shared, rows, columns, width,
    floating: tl.constexpr, bits: tl.constexpr, tile: tl.constexpr, height: tl.constexpr, has_shared: tl.constexpr,
):  # fmt: skip
    """Groups of `tile` columns, `height` of them a program; width: groups of a row, the last one perhaps partial."""
    group = tl.program_id(0).to(tl.int64) * height + tl.arange(0, height)
    row, column = group // width, (group % width)[:, None] * tile + tl.arange(0, tile)[None, :]
    held = (row < rows)[:, None] & (column < columns)
    at = row[:, None] * columns + column
    some = tl.load(x + at, mask=held, other=0.0).to(tl.float32)
    bad = tl.max((some != some).to(tl.int32), axis=1)
    amax = tl.where(bad != 0, float("nan"), tl.max(tl.abs(some), axis=1))
    factor = 1.0
    if has_shared:
        factor = tl.load(shared)
    step = step_of(amax, factor, floating, bits)[:, None] + tl.zeros_like(some)
    tl.store(made + at, round_some(some, step, 0.0, floating, bits).to(made.dtype.element_ty), mask=held)


def fake_quantize(x: Tensor, kind: str, scale: Tensor | None, zero_point: Tensor | None, global_scale: Tensor | None) -> Tensor:
    """As `activations.fake_quantize`."""
    scheme, (rows, columns), made = activations.KINDS[kind], x.shape, torch.empty_like(x)
    floating = scheme.type == "float"
    if not x.numel():
        return made
    if scheme.group_size is None:
        quantize_rows[(rows,)](
            x, made, x if scale is None else scale, x if zero_point is None else zero_point, 1 if scale is None else len(scale), columns,
            scale is not None, zero_point is not None, floating, scheme.bits, min(CHUNK, triton.next_power_of_2(columns)),
        )  # fmt: skip
        return made
    width, height = triton.cdiv(columns, scheme.group_size), CHUNK // scheme.group_size
    quantize_groups[(triton.cdiv(rows * width, height),)](
        x, made, x if global_scale is None else global_scale, rows, columns, width, floating, scheme.bits, scheme.group_size, height,
        global_scale is not None,
    )  # fmt: skip
    return made


@triton.jit
def transform(x, made, size: tl.constexpr, levels: tl.constexpr, root: tl.constexpr):
    """A row a program: x H / root."""
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    v = tl.load(x + at)
    for level in tl.static_range(levels):
        pairs = tl.permute(tl.reshape(v, (size >> (level + 1), 2, 1 << level)), (0, 2, 1))
        first, second = tl.split(pairs)
        v = tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 2, 1)), (size,))
    root = tl.full((size,), root, v.dtype)
    tl.store(made + at, tl.math.div_rn(v, root) if v.dtype == tl.float32 else v / root)


def hadamard(x: Tensor, base: Tensor | None) -> Tensor:
    """As `butterflies.hadamard`; the small factor by torch, whose sums may differ in the last bit."""
    order = 1 if base is None else len(base)
    power = x.shape[1] // order
    if power * x.element_size() > 4 * TRANSFORM or not x.numel():
        return butterflies.hadamard(x, base)
    made = torch.empty_like(x)
    levels = power.bit_length() - 1
    transform[(len(x) * order,)](x, made, power, levels, float(torch.tensor(math.sqrt(power), dtype=torch.float64).to(x.dtype)))
    return made if base is None else (base.T.to(x.dtype) @ made.view(len(x), order, power)).reshape(x.shape)
