"""Weights set to zero: which go where nothing is made good, and what there is to say of a linear afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from kompressor_worker.block import Pruned, Stage
from kompressor_worker.kernels.pruning import smallest_in_all, smallest_in_groups, smallest_in_rows
from kompressor_worker.layout import LinearLayout
from kompressor_worker.sparsity import Sparsity

ROWS = 1024


def in_rows(scores: Tensor, count: int) -> Tensor:
    """bool: `count` of fp32 [out, in], equally many of the smallest in each row; what does not go up in that, one more in those rows where
    that one is smallest. Of equals the first."""
    each, more = divmod(count, len(scores))
    chosen = smallest_in_rows(scores, each)
    if more:
        following = scores.masked_fill(chosen, float("inf")).min(dim=1)
        rows = smallest_in_all(following.values, more)
        chosen[rows, following.indices[rows]] = True
    return chosen


def least(scores: Tensor, sparsity: Sparsity, by_row: bool) -> Tensor:
    """bool [out, in]: those of least score fp32 [out, in], over the whole weight or in each row, or as the pattern says."""
    if sparsity.of:
        return smallest_in_groups(scores, sparsity.keep, sparsity.of)
    if by_row:
        return in_rows(scores, sparsity.zeros(tuple(scores.shape)))
    return smallest_in_all(scores, sparsity.zeros(tuple(scores.shape)))


def put(stage: Stage, linear: LinearLayout, pruned: Tensor) -> None:
    """The weight [out, in] (any float dtype) in place of the linear's own, and what it has cost."""
    original = stage.weights[linear.weight]
    pruned = pruned.to(original.dtype)
    error = norm = 0.0
    for top in range(0, len(original), ROWS):
        rows = slice(top, top + ROWS)
        before = original[rows].float()
        error += float((pruned[rows].float() - before).square().sum(dtype=torch.float64))
        norm += float(before.square().sum(dtype=torch.float64))
    stage.weights[linear.weight] = pruned
    stage.pruned[linear.name] = Pruned(int((pruned == 0).sum()), error, norm)
