"""Rows on their way through a decoder's blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass
class Batch:
    """Rows of tokens on their way through the blocks, padded on the right to the same length."""

    lengths: tuple[int, ...]
    state: State = field(default_factory=dict)
    excluded: tuple[bool, ...] = ()
    """Rows whose activations became NaN or Inf: they count in no statistic."""

    def valid(self, length: int, device: torch.device) -> Tensor | None:
        """bool [rows, length]: positions that count; None: all of them."""
        if all(n == length for n in self.lengths) and not any(self.excluded):
            return None
        lengths = torch.tensor(
            [0 if out else n for n, out in zip(self.lengths, self.excluded or (False,) * len(self.lengths), strict=True)]
        )
        return (torch.arange(length)[None, :] < lengths[:, None]).to(device)
