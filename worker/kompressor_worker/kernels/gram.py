"""Sums of x^T x: half of a matrix product, since the result is symmetric (BLAS: SYRK)."""

from __future__ import annotations

from torch import Tensor

TILE = 512
"""Columns of a tile: small enough that little of the diagonal tiles is wasted, large enough for the GEMM to run at its full rate."""


def add_gram(sums: Tensor, x: Tensor) -> None:
    """sums [n, n] fp32 += x^T x for x [rows, n] fp32; both triangles."""
    n = x.shape[1]
    for start in range(0, n, TILE):
        stop = min(start + TILE, n)
        sums[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])
        if start:
            sums[:start, start:stop] = sums[start:stop, :start].T
