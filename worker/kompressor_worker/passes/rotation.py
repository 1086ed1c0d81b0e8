"""Orthogonal matrices that spread outliers: randomised Hadamard matrices of any size that has one here, else in blocks.

R = diag(s) (B x H), with s random signs, H the Hadamard matrix of the largest power of two that divides the size (Sylvester), and B one of
order 12, 20 or 28 where that fits (Paley), else a random orthogonal matrix of what is left. All arithmetic is fp64.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from kompressor_worker import kernels

BASES = (1, 12, 20, 28)
"""Orders of Hadamard matrices that are no power of two times a smaller one, for B."""
CHUNK = 1 << 22
"""Elements worked on at once, in fp64."""


class Rotation:
    """R [size, size], orthogonal; the same for the same size and seed."""

    def __init__(self, size: int, seed: int) -> None:
        numbers = random.Random(f"{size}/{seed}")
        self.size = size
        self.signs = torch.tensor(numbers.choices((-1.0, 1.0), k=size), dtype=torch.float64)
        base = next((b for b in BASES if size % b == 0 and _is_power_of_two(size // b)), None)
        if base is None:
            left = size // (size & -size)
            gaussian = [[numbers.gauss(0.0, 1.0) for _ in range(left)] for _ in range(left)]
            q, r = torch.linalg.qr(torch.tensor(gaussian, dtype=torch.float64))
            self.base = q * r.diagonal().sign()
        else:
            self.base = hadamard(base) / base**0.5

    def rows(self, x: Tensor, scale: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """x diag(scale) R for x [..., size] and scale [size], on x's device, rounded once: to `dtype`, or to x's."""
        flat = x.reshape(-1, self.size)
        made = torch.empty(flat.shape, dtype=dtype or x.dtype, device=x.device)
        signs = self.signs.to(x.device)
        base = None if len(self.base) == 1 else self.base.to(x.device)
        step = max(1, CHUNK // self.size)
        for start in range(0, len(flat), step):
            part = flat[start : start + step].double()
            made[start : start + step] = kernels.hadamard((part if scale is None else part * scale) * signs, base)
        return made.view(x.shape)

    def columns(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """R^T x for x [size, n]."""
        return self.rows(x.T, dtype=dtype).T.contiguous()


def hadamard(order: int) -> Tensor:
    """fp64 [order, order] of 1 and -1 with H H^T = order * 1, for the orders in BASES."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order in (12, 20):
        return _paley_of_residues(order - 1)
    assert order == 28, f"no Hadamard matrix of order {order} here"
    return _paley_doubled(order // 2 - 1)


def _paley_of_residues(q: int) -> Tensor:
    """Paley's first construction, for a prime q = 3 mod 4: order q + 1."""
    skew = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = _jacobsthal(q)
    return skew + torch.eye(q + 1, dtype=torch.float64)


def _paley_doubled(q: int) -> Tensor:
    """Paley's second construction, for a prime q = 1 mod 4: order 2 (q + 1)."""
    conference = torch.ones(q + 1, q + 1, dtype=torch.float64)
    conference[0, 0] = 0
    conference[1:, 1:] = _jacobsthal(q)
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)


def _jacobsthal(q: int) -> Tensor:
    """[q, q]: 1 where the difference of row and column is a square modulo q, -1 where it is none, 0 on the diagonal."""
    squares = {x * x % q for x in range(1, q)}
    character = [0, *(1 if a in squares else -1 for a in range(1, q))]
    return torch.tensor([[character[(i - j) % q] for j in range(q)] for i in range(q)], dtype=torch.float64)


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0
