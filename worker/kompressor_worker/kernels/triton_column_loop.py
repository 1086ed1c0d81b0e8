"""GPTQ's column loop in Triton: one block of columns of some rows in registers; what is right of it, by cuBLAS.

Of out * in^2 operations all but a share of 128 / in are in the products, fp32 (no TF32 unless torch is told so). These read and write what
is left of the weight once a block, 8 bytes for 256 operations: bound by arithmetic where a GPU has fewer than 32 operations for a byte
(H100: 20). A block costs 128 dependent steps, whatever its number of rows.
"""
# mypy: disable-error-code="import-untyped,import-not-found,untyped-decorator,no-untyped-def,no-untyped-call,misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kompressor_worker import grid
from kompressor_worker.kernels.triton_rounding import round_to
from kompressor_worker.schemes import Scheme

BLOCK = 128
ROWS = 16
"""Rows of a program: their block is 8 KB of registers, and as much for the errors."""


@triton.jit
def round_block(
    weight, factor, steps, zero_points, group_of, mask, codes, errors, rows, columns, groups, start, count,
    floating: tl.constexpr, bits: tl.constexpr, symmetric: tl.constexpr, masked: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Columns [start, start + count) of `height` rows: their codes, and their errors [rows, width]."""
    row = tl.program_id(0) * height + tl.arange(0, height)
    column = tl.arange(0, width)
    inside = row < rows
    at = row.to(tl.int64)[:, None] * columns + start + column[None, :]
    held = inside[:, None] & (column < count)[None, :]
    w = tl.load(weight + at, mask=held, other=0.0)
    made_errors = tl.zeros((height, width), dtype=tl.float32)
    made_codes = tl.zeros((height, width), dtype=tl.int32)
    for j in range(count):
        x = tl.sum(tl.where((column == j)[None, :], w, 0.0), axis=1)
        group = tl.load(group_of + start + j)
        step = tl.load(steps + row.to(tl.int64) * groups + group, mask=inside, other=1.0)
        y = tl.math.div_rn(x, step)
        if masked:
            y = tl.where(tl.load(mask + row.to(tl.int64) * columns + start + j, mask=inside, other=0) != 0, 0.0, y)
        if symmetric:
            value, code = round_to(y, floating, bits)
        else:
            zero_point = tl.load(zero_points + row.to(tl.int64) * groups + group, mask=inside, other=0).to(tl.float32)
            value, code = round_to(y + zero_point, floating, bits)
            value = value - zero_point
        u = factor + (start + j).to(tl.int64) * columns + start
        error = tl.math.div_rn(x - value * step, tl.load(u + j))
        w -= error[:, None] * tl.load(u + column, mask=(column > j) & (column < count), other=0.0)[None, :]
        here = (column == j)[None, :]
        made_errors = tl.where(here, error[:, None], made_errors)
        made_codes = tl.where(here, code[:, None], made_codes)
    tl.store(codes + at, made_codes.to(tl.int8), mask=held)
    tl.store(errors + row.to(tl.int64)[:, None] * width + column[None, :], made_errors, mask=inside[:, None])


class _Work:
    """A weight on its way: what is left of the columns not yet rounded, their codes, the loss so far."""

    def __init__(self, weight: Tensor, factor: Tensor, floating: bool, bits: int, mask: Tensor | None) -> None:
        self.mask = mask
        self.left, self.factor, self.floating, self.bits = weight.clone(), factor, floating, bits
        self.errors = torch.empty((len(weight), BLOCK), device=weight.device)
        self.codes = torch.empty_like(weight, dtype=torch.int8)
        self.loss = torch.zeros((), dtype=torch.float64, device=weight.device)

    def round(self, start: int, stop: int, steps: Tensor, zero_points: Tensor | None, group_of: Tensor) -> None:
        """Columns [start, stop), at most BLOCK. group_of int32 [columns]: the column of `steps` and `zero_points` for each."""
        rows, columns = self.left.shape
        round_block[(triton.cdiv(rows, ROWS),)](
            self.left, self.factor, steps, steps if zero_points is None else zero_points, group_of,
            self.codes if self.mask is None else self.mask, self.codes, self.errors, rows, columns, steps.shape[1], start, stop - start,
            self.floating, self.bits, zero_points is None, self.mask is not None, ROWS, BLOCK,
        )  # fmt: skip
        errors = self.errors[:, : stop - start]
        self.left[:, stop:].addmm_(errors, self.factor[start:stop, stop:], alpha=-1)
        self.loss += errors.double().square().sum()

    def result(self) -> tuple[Tensor, Tensor]:
        return self.codes.view(torch.float8_e4m3fn) if self.floating else self.codes, self.loss


def gptq(
    weight: Tensor,
    factor: Tensor,
    step: Tensor,
    zero_point: Tensor | None,
    group_of: Tensor,
    floating: bool,
    bits: int,
    block: int,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `column_loop.gptq`; `block` is the kernel's own."""
    work = _Work(weight, factor, floating, bits, mask)
    step, zero_point = step.contiguous(), None if zero_point is None else zero_point.contiguous()
    for start in range(0, weight.shape[1], BLOCK):
        work.round(start, min(start + BLOCK, weight.shape[1]), step, zero_point, group_of)
    return work.result()


def gptq_groups(
    weight: Tensor, factor: Tensor, group_size: int, bits: int, symmetric: bool, dtype: torch.dtype, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `column_loop.gptq_groups`."""
    work, columns, made = _Work(weight, factor, False, bits, mask), weight.shape[1], []
    only = torch.zeros(columns, dtype=torch.int32, device=weight.device)
    for left in range(0, columns, group_size):
        right = min(left + group_size, columns)
        part = work.left[:, left:right]
        found = grid.grid_of_range(
            part.amin(1, keepdim=True), part.amax(1, keepdim=True), Scheme("", "", bits, "int", "channel", symmetric), dtype
        )
        made.append(found)
        for start in range(left, right, BLOCK):
            work.round(start, min(start + BLOCK, right), found.scale, found.zero_point, only)
    zero_points = [g.zero_point for g in made if g.zero_point is not None]
    scale, (codes, loss) = torch.cat([g.scale for g in made], dim=1), work.result()
    return codes, scale, torch.cat(zero_points, dim=1) if zero_points else scale.new_empty(0, dtype=torch.int8), loss
