"""The Walsh-Hadamard transform of rows, by butterflies, in plain torch: the specification of the compiled kernel.

log2(2^k) additions an element and, for an order above 1, as many multiply-adds as it; rows are read and written once, 2 bytes moved a byte
of x. The limit is a copy, of which the compiled one reaches 0.4 (`benchmarks/kernels.py`, 4096 columns, two EPYC cores), with a factor of
the order 12 0.2; 13 to 23 times as fast as this.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hadamard(x: Tensor, base: Tensor | None) -> Tensor:
    """x (B x H) / sqrt(2^k) for x [rows, order * 2^k], fp32 or fp64: H Sylvester's matrix, B `base`, fp64 [order, order], None: 1."""
    order = 1 if base is None else len(base)
    rows, power = len(x), x.shape[1] // order
    half = 1
    while half < power:
        pairs = x.reshape(rows, -1, 2, half)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        x = torch.stack((first + second, first - second), dim=2)
        half *= 2
    blocks = x.reshape(rows, order, power)
    if base is not None:
        base = base.to(x.dtype)
        made = torch.zeros_like(blocks)
        for i in range(order):
            made += base[i, :, None] * blocks[:, i, None, :]
        blocks = made
    root = torch.tensor(math.sqrt(power), dtype=torch.float64).to(x.dtype)  # torch's own is off by a bit on some processors
    return blocks.reshape(rows, order * power) / root
