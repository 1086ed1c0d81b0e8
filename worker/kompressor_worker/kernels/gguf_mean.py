"""Codes moved by a level so that what the layer puts out is right on average, in plain torch: what the compiled one must equal bit for bit.

Weighting errors with each column's second moment takes columns for independent. What they have in common is first of all their mean: an
input x = mean + rest makes an output's error sum e x = sum e mean + sum e rest, and rounding each weight for itself leaves the first sum to
chance. Other formats have that put right by a bias (Nagel et al. 2019, arXiv 1906.04721); here each row's codes are gone through, and one
moves to the level at the other side of its weight where that lowers

    sum over columns of variance * e^2 + (sum over columns of mean * e)^2,

which is the expected squared error of the output, but for what the columns' deviations have in common. Columns go one after the other,
rows side by side, so no bit depends on how many lanes there are. About 20 operations an element and round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kompressor_worker.formats import gguf_packing
from kompressor_worker.formats.gguf_types import TYPES
from kompressor_worker.kernels import gguf_eager

ROUNDS = 2
"""A second one finds 1 % more of the divergence, a third nothing."""


def keep_mean(weight: Tensor, data: Tensor, variance: Tensor, mean: Tensor, name: str) -> Tensor:
    """A copy of data uint8 [rows, bytes], of weight [rows, columns], with other codes; variance and mean fp32 [columns]. Zeros keep theirs.
    For types whose levels are even."""
    kind, (rows, columns) = TYPES[name], weight.shape
    blocks = data.reshape(-1, kind.nbytes).clone()
    step, _ = gguf_packing.group_scales(gguf_packing.read_scales(blocks, kind), kind)
    step = step.reshape(rows, -1).T.contiguous()
    source = weight.float().T.contiguous()
    error = gguf_eager.dequantize(data, columns, name, torch.float32).T - source
    places = gguf_packing.read_codes(blocks, kind).view(rows, columns).T.float()
    total, top = torch.zeros_like(error[0]), float(kind.levels[-1] - kind.levels[0])
    for column in range(columns):
        total = total + mean[column] * error[column]
    for _ in range(ROUNDS):
        for column in range(columns):
            e, s = error[column], step[column // kind.group]
            way = torch.where(e * s > 0.0, -1.0, 1.0)
            move, to = way * s, places[column] + way
            sway = mean[column] * move
            change = variance[column] * (move * (e + e + move)) + sway * (total + total + sway)
            better = (change < 0.0) & (to >= 0.0) & (to <= top) & (source[column] != 0.0)
            error[column] = torch.where(better, e + move, e)
            places[column] = torch.where(better, to, places[column])
            total = torch.where(better, total + sway, total)
    gguf_packing.write_codes(blocks, places.T.to(torch.uint8).reshape(-1, kind.block), kind)
    return blocks.view(data.shape)
