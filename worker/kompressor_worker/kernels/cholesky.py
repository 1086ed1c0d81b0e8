"""What GPTQ needs of a Hessian: the triangular factor of its inverse, for about the price of one matrix product and no second matrix.

n^3 operations on 4 n^2 bytes, read and written a few times: bound by arithmetic. It reaches 0.6 to 0.7 of a product in fp32 (n = 4096,
`benchmarks/kernels.py`, two EPYC cores), 1.7 times the rate of factorising, inverting and factorising again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kompressor_worker.kernels.pieces import Heard, row_pieces, unheard

LEAF = 128
"""Columns below which LAPACK's substitution is faster than products."""
TILE = 512
"""Rows that are moved at a time."""
PANEL = 6144
"""Rows that a CPU factorises at once."""


def inverse_factor(hessian: Tensor, heard: Heard = unheard) -> Tensor | None:
    """U fp32 [n, n], upper triangular, row-major, with H^-1 = U^T U, for H fp32 [n, n], contiguous, which is overwritten: U lies in its
    place. None if H is not positive definite.

    From H read backwards, L L^T, comes H = V V^T with V upper triangular, and U = V^-1: the inverse of H is never formed. n^3 / 3 for the
    factorisation and 2 n^3 / 3 for the inversion, by products, where substitution against the identity takes n^3 at a lower rate. Plain
    torch on every device: LAPACK and BLAS on the CPU, cuSOLVER and cuBLAS on CUDA run such products near their peak already.
    """
    assert hessian.is_contiguous()
    _reverse(hessian)
    if not _factorise(hessian, heard):
        return None
    _reverse(hessian)  # V^T
    _invert(hessian, heard)
    _transpose(hessian)
    return hessian if bool(torch.isfinite(hessian.sum())) else None


def _factorise(symmetric: Tensor, heard: Heard) -> bool:
    """L^T in place of L L^T, in panels of rows; False where there is no L."""
    n = len(symmetric)
    size = PANEL if symmetric.is_cpu else n
    for top in range(0, n, size):
        stop = min(top + size, n)
        corner, right = symmetric[top:stop, top:stop], symmetric[top:stop, stop:]
        failed = torch.empty((), dtype=torch.int32, device=symmetric.device)
        torch.linalg.cholesky_ex(corner.mT, out=(corner.mT, failed))  # LAPACK counts by columns: the corner itself is L^T
        if int(failed):
            return False
        heard()
        right.copy_(torch.linalg.solve_triangular(corner.mT, right, upper=False))
        symmetric[stop:, top:stop] = 0
        for left in range(0, n - stop, size):
            heard()
            symmetric[stop + left : stop + left + size, stop + left :].addmm_(right[:, left : left + size].mT, right[:, left:], alpha=-1)
    return True


def _invert(lower: Tensor, heard: Heard) -> None:
    """In place: of [[A, 0], [C, D]] the inverse is [[A^-1, 0], [-D^-1 C A^-1, D^-1]]."""
    n = len(lower)
    if n <= LEAF:
        eye = torch.eye(n, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    half = max(1, n // 2 // LEAF) * LEAF
    first, second, corner = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert(first, heard)
    _invert(second, heard)
    corner.copy_(_product(second, _product(corner, first, heard), heard)).neg_()


def _product(a: Tensor, b: Tensor, heard: Heard) -> Tensor:
    made = a.new_empty(len(a), b.shape[1])
    for rows in row_pieces(a, b.numel()):
        torch.mm(a[rows], b, out=made[rows])
        heard()
    return made


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
