"""What GPTQ needs of a Hessian: the triangular factor of its inverse, for about the price of one matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

LEAF = 128
"""Columns below which LAPACK's substitution is faster than products."""


def inverse_factor(hessian: Tensor) -> Tensor | None:
    """U fp32 [n, n], upper triangular, row-major, with H^-1 = U^T U, for H fp32 [n, n]; None if H is not positive definite.

    From H read backwards, L L^T, comes H = V V^T with V upper triangular, and U = V^-1: the inverse of H is never formed. n^3 / 3 for the
    factorisation and 2 n^3 / 3 for the inversion, by products, where substitution against the identity takes n^3 at a lower rate.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if int(failed):
        return None
    upper = lower.flip(0, 1).contiguous()
    del lower  # as large as H
    _invert(upper)
    return upper if bool(torch.isfinite(upper.sum())) else None


def _invert(upper: Tensor) -> None:
    """In place: of [[A, B], [0, C]] the inverse is [[A^-1, -A^-1 B C^-1], [0, C^-1]]."""
    n = len(upper)
    if n <= LEAF:
        eye = torch.eye(n, dtype=upper.dtype, device=upper.device)
        upper.copy_(torch.linalg.solve_triangular(upper, eye, upper=True))
        return
    half = max(1, n // 2 // LEAF) * LEAF
    first, second, corner = upper[:half, :half], upper[half:, half:], upper[:half, half:]
    _invert(first)
    _invert(second)
    corner.copy_(torch.mm(torch.mm(first, corner), second)).neg_()
