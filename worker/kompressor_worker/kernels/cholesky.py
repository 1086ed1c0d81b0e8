"""What GPTQ needs of a Hessian: the triangular factor of its inverse, for about the price of one matrix product and no second matrix."""

from __future__ import annotations

import torch
from torch import Tensor

LEAF = 128
"""Columns below which LAPACK's substitution is faster than products."""
TILE = 512
"""Rows that are moved at a time."""


def inverse_factor(hessian: Tensor) -> Tensor | None:
    """U fp32 [n, n], upper triangular, row-major, with H^-1 = U^T U, for H fp32 [n, n], contiguous, which is overwritten: U lies in its
    place. None if H is not positive definite.

    From H read backwards, L L^T, comes H = V V^T with V upper triangular, and U = V^-1: the inverse of H is never formed. n^3 / 3 for the
    factorisation and 2 n^3 / 3 for the inversion, by products, where substitution against the identity takes n^3 at a lower rate. Plain
    torch on every device: LAPACK and BLAS on the CPU, cuSOLVER and cuBLAS on CUDA run such products near their peak already.
    """
    assert hessian.is_contiguous()
    _reverse(hessian)
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    torch.linalg.cholesky_ex(hessian.mT, out=(hessian.mT, failed))  # LAPACK counts by columns: hessian itself is L^T
    if int(failed):
        return None
    _reverse(hessian)  # V^T
    _invert(hessian)
    _transpose(hessian)
    return hessian if bool(torch.isfinite(hessian.sum())) else None


def _invert(lower: Tensor) -> None:
    """In place: of [[A, 0], [C, D]] the inverse is [[A^-1, 0], [-D^-1 C A^-1, D^-1]]."""
    n = len(lower)
    if n <= LEAF:
        eye = torch.eye(n, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    half = max(1, n // 2 // LEAF) * LEAF
    first, second, corner = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert(first)
    _invert(second)
    corner.copy_(torch.mm(second, torch.mm(corner, first))).neg_()


def _reverse(matrix: Tensor) -> None:
    """Rows and columns back to front, in place."""
    n = len(matrix)
    for top in range(0, n // 2, TILE):
        size = min(TILE, n // 2 - top)
        above, below = matrix[top : top + size], matrix[n - top - size : n - top]
        held = above.flip(0, 1)
        above.copy_(below.flip(0, 1))
        below.copy_(held)
    if n % 2:
        matrix[n // 2].copy_(matrix[n // 2].flip(0))


def _transpose(matrix: Tensor) -> None:
    """In place."""
    n = len(matrix)
    for top in range(0, n, TILE):
        rows = slice(top, min(top + TILE, n))
        matrix[rows, rows] = matrix[rows, rows].T.clone()
        for left in range(0, top, TILE):
            columns = slice(left, left + TILE)
            held = matrix[rows, columns].T.clone()
            matrix[rows, columns] = matrix[columns, rows].T
            matrix[columns, rows] = held
