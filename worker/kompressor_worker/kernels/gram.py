"""Sums of x^T x in plain torch: half of a matrix product, since the result is symmetric (BLAS: SYRK).

rows * n^2 operations where a product takes twice that; the compiled one multiplies bf16 pairs where the CPU can (AVX512-BF16), exact
products summed in fp32, at twice the rate of fp32. Bound by arithmetic: rows * n^2 operations on 2 or 4 bytes of x and 8 n^2 of sums. The
compiled one reaches 0.81 of a product in bf16 and 0.95 in fp32 (n = 4096, `benchmarks/kernels.py`, two EPYC cores).
"""

from __future__ import annotations

from torch import Tensor

WIDE = 1024


def add_gram(sums: Tensor, x: Tensor) -> None:
    """sums [n, n] fp32 += x^T x for x [rows, n], in fp32; both triangles."""
    n, x = x.shape[1], x.float()
    tile = 256 if n > WIDE else 128  # measured: little of the diagonal tiles wasted, and products at nearly their full rate
    for start in range(0, n, tile):
        stop = min(start + tile, n)
        sums[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])
        if start:
            sums[:start, start:stop] = sums[start:stop, :start].T
