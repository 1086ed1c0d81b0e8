"""SparseGPT's part of a block of columns in Triton: as `triton_column_loop`, with weights that go or stay in place of codes."""
# mypy: disable-error-code="import-untyped,import-not-found,untyped-decorator,no-untyped-def,no-untyped-call,misc"
# ruff: noqa: SIM102, SIM108 - what is known when a kernel is compiled stands in branches of its own

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16


@triton.jit
def prune_block(
    weight, factor, mask, kept, errors, rows, count, keep,
    of: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """`count` columns of `height` rows: what is left of them, and their errors; all [rows, count]."""
    row = tl.program_id(0) * height + tl.arange(0, height)
    column = tl.arange(0, width)
    held = (row < rows)[:, None] & (column < count)[None, :]
    at = row.to(tl.int64)[:, None] * count + column[None, :]
    w = tl.load(weight + at, mask=held, other=0.0)
    diagonal = tl.load(factor + column * (count + 1), mask=column < count, other=1.0)
    if of == 0:
        goes = tl.load(mask + at, mask=held, other=0).to(tl.int32)
    else:
        goes = tl.zeros((height, width), dtype=tl.int32)
    made_errors = tl.zeros((height, width), dtype=tl.float32)
    for j in range(count):
        if of > 0:
            if j % of == 0:
                scores = tl.math.div_rn(w, diagonal[None, :] + tl.zeros((height, width), dtype=tl.float32))
                scores = scores * scores
                before = tl.zeros((height, width), dtype=tl.int32)
                for t in range(of):
                    other = tl.sum(tl.where((column == j + t)[None, :], scores, 0.0), axis=1)[:, None]
                    first = (column > j + t)[None, :]
                    before += ((other < scores) | ((other == scores) & first)).to(tl.int32)
                here = ((column >= j) & (column < j + of))[None, :]
                goes = tl.where(here, (before < of - keep).to(tl.int32), goes)
        this = (column == j)[None, :]
        x = tl.sum(tl.where(this, w, 0.0), axis=1)
        gone = tl.sum(tl.where(this, goes, 0), axis=1) != 0
        error = tl.where(gone, tl.math.div_rn(x, tl.load(factor + j * (count + 1))), 0.0)
        later = tl.load(factor + j * count + column, mask=(column > j) & (column < count), other=0.0)
        w -= error[:, None] * later[None, :]
        made_errors = tl.where(this, error[:, None], made_errors)
    tl.store(kept + at, tl.where(goes != 0, 0.0, w), mask=held)
    tl.store(errors + at, made_errors, mask=held)


def prune_columns(weight: Tensor, factor: Tensor, mask: Tensor | None, keep: int, of: int) -> tuple[Tensor, Tensor]:
    """As `pruning.prune_columns`."""
    rows, width = weight.shape
    kept, errors = torch.empty_like(weight), torch.empty_like(weight)
    prune_block[(triton.cdiv(rows, ROWS),)](
        weight, factor, weight if mask is None else mask, kept, errors, rows, width, keep, of, ROWS, triton.next_power_of_2(width)
    )
    return kept, errors
