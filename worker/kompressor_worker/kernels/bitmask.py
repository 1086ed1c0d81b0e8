"""Weights by the values that are left of them, in plain torch: what the compiled kernels must equal.

Both directions read and write each byte once. `benchmarks/kernels.py` says what is reached of a copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORDS = {2: torch.int16, 4: torch.int32}
"""Integers as wide as the values: a zero that may be left out has no bit set, -0.0 has one."""


def pack_bitmask(weight: Tensor, values: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.pack_bitmask`."""
    (rows, columns), leave = weight.shape, weight.numel() - values
    zero = weight.view(WORDS[weight.element_size()]) == 0
    if (there := int(zero.sum())) < leave:
        raise ValueError(f"{there} zeros, {leave} are to be left out")
    kept = ~(zero & (zero.flatten().cumsum(0) <= leave).view(rows, columns))
    bits = torch.nn.functional.pad(kept, (0, -columns % 8)).view(rows, -(-columns // 8), 8).to(torch.uint8)
    packed = (bits << torch.arange(8, dtype=torch.uint8, device=weight.device)).sum(-1, dtype=torch.uint8)
    counts = kept.sum(1)
    return weight[kept], packed, counts.cumsum(0) - counts


def unpack_bitmask(values: Tensor, bitmask: Tensor, columns: int) -> Tensor:
    """As `kernels.unpack_bitmask`."""
    bits = (bitmask[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=bitmask.device)) & 1
    marked = bits.flatten(1).bool()
    if bool(marked[:, columns:].any()) or (there := int(marked.sum())) != len(values):
        there = int(marked[:, :columns].sum())
        raise ValueError(f"the bitmask marks {there} of {len(marked)} x {columns} places, or others beside them, for {len(values)} values")
    weight = values.new_zeros((len(marked), columns))
    weight[marked[:, :columns]] = values
    return weight
