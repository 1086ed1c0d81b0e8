"""Sums of x^T x in Triton: the tiles of one triangle, each a program that reads its two strips of x and writes itself and its mirror.

rows * n^2 operations where a matrix product takes twice that. bf16 and fp16 go through tensor cores, whose products are exact and whose
sums are fp32; fp32 is multiplied as fp32, never as TF32. Bound by arithmetic: a tile of 128 x 128 has 64 operations for each byte that it
reads, from the L2 cache for the most part, since the programs of a row of tiles run side by side. Every tile sums its rows in order, so the
same GPU gives the same bits.
"""
# mypy: disable-error-code="import-untyped,import-not-found,untyped-decorator,no-untyped-def,no-untyped-call,misc"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

STRIP_BYTES = 128
"""Of a column of x at a time: with 128 columns each, two strips in three stages take 96 KB of shared memory."""


@triton.jit
def add_triangle(x, sums, rows, n, tile: tl.constexpr, depth: tl.constexpr):
    """sums [n, n] += x^T x: program p has tile p of the lower triangle, counted row by row."""
    p = tl.program_id(0)
    i = ((tl.sqrt(8.0 * p + 1.0) - 1.0) * 0.5).to(tl.int32)  # i (i + 1) / 2 <= p; the root may be off by one either way
    i = tl.where(i * (i + 1) // 2 > p, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= p, i + 1, i)
    top, left, at, line = i * tile, (p - i * (i + 1) // 2) * tile, tl.arange(0, tile), tl.arange(0, depth)
    down, across = top + at, left + at
    first, second = line[:, None] * n + down[None, :], line[:, None] * n + across[None, :]
    products = tl.zeros((tile, tile), dtype=tl.float32)
    for row in range(0, rows, depth):
        held = (row + line < rows)[:, None]
        a = tl.load(x + first, mask=held & (down < n)[None, :], other=0.0)
        b = tl.load(x + second, mask=held & (across < n)[None, :], other=0.0)
        products = tl.dot(tl.trans(a), b, products, input_precision="ieee")
        x += depth * n
    below = (down[:, None] >= across[None, :]) & (down < n)[:, None]
    here = sums + top.to(tl.int64) * n + left + at[:, None] * n + at[None, :]
    total = tl.load(here, mask=below, other=0.0) + products
    tl.store(here, total, mask=below)
    mirror = sums + left.to(tl.int64) * n + top + at[:, None] * n + at[None, :]
    tl.store(mirror, tl.trans(total), mask=tl.trans(below))


def add_gram(sums: Tensor, x: Tensor) -> None:
    """As `gram.add_gram`."""
    rows, n = x.shape
    if not x.numel():
        return
    tile = 128 if n >= 2048 else 64  # smaller ones where there would be fewer than processors
    tiles = triton.cdiv(n, tile)
    depth = STRIP_BYTES // x.element_size()
    add_triangle[(tiles * (tiles + 1) // 2,)](x, sums, rows, n, tile, depth, num_warps=8 if tile == 128 else 4)
