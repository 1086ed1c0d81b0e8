"""SparseGPT's column loop (Frantar and Alistarh 2023, arXiv 2301.00774) in plain torch; the compiled one must equal it within the rounding
of its sums.

As in GPTQ's (`column_loop`), columns go one after the other, and what a weight's loss has cost is made good by the columns still to come:
with H^-1 = U^T U a weight that is set to zero leaves the error w_j / U_jj, of which column k > j takes -e_j U_jk; one that stays leaves
none. Which weights go is decided when a block of columns is reached, from the weights as they are then: those with the smallest
(w_j / U_jj)^2, which is what their going costs. A pattern N:M decides at every M columns, row by row.

Operations, reads and limit are GPTQ's.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
"""Columns that are decided together, as the paper has it."""


def smallest_in_all(scores: Tensor, count: int) -> Tensor:
    """bool, of the shape of fp32 `scores`: the `count` smallest, of equals those first in memory."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.reshape(1, -1)
    return _up_to(flat, flat.kthvalue(count, dim=1, keepdim=True).values, count).view(scores.shape)


def smallest_in_rows(scores: Tensor, count: int) -> Tensor:
    """bool: the `count` smallest in each row of fp32 [out, in], of equals the first."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    smallest = scores.topk(count, dim=1, largest=False, sorted=False).values  # on a CPU twice as fast as kthvalue, row by row
    return _up_to(scores, smallest.amax(1, keepdim=True), count)


def _up_to(scores: Tensor, last: Tensor, count: int) -> Tensor:
    """bool [rows, n]: the `count` smallest of each row, where last [rows, 1] is the largest of them."""
    chosen, equal = scores < last, scores == last
    room = count - chosen.sum(1, keepdim=True)
    crowded = (equal.sum(1, keepdim=True) > room).flatten().nonzero().flatten()
    equal[crowded] &= equal[crowded].cumsum(1) <= room[crowded]
    return chosen.logical_or_(equal)


def smallest_in_groups(scores: Tensor, keep: int, of: int) -> Tensor:
    """bool [out, in]: of every `of` neighbours in a row of scores fp32 [out, in] all but the `keep` largest; of equals the last stay."""
    groups = scores.view(len(scores), -1, of)
    chosen = torch.empty_like(groups, dtype=torch.bool)
    for j in range(of):
        before = (groups[..., :j] <= groups[..., j : j + 1]).sum(-1) + (groups[..., j + 1 :] < groups[..., j : j + 1]).sum(-1)
        chosen[..., j] = before < of - keep
    return chosen.view(scores.shape)


def prune_columns(weight: Tensor, factor: Tensor, mask: Tensor | None, keep: int, of: int) -> tuple[Tensor, Tensor]:
    """A block: what is left of weight fp32 [out, width], and the errors fp32 [out, width] that later columns are to take.

    factor fp32 [width, width]: the block's square of U. mask uint8 [out, width], 1 where a weight goes; None: by the pattern, `keep` of
    every `of`, which divides width."""
    work, diagonal = weight.clone(), factor.diagonal()
    kept, errors = torch.empty_like(work), torch.empty_like(work)
    goes = torch.empty_like(work, dtype=torch.bool) if mask is None else mask.bool()
    for j in range(work.shape[1]):
        if of and j % of == 0:
            group = slice(j, j + of)
            goes[:, group] = smallest_in_groups((work[:, group] / diagonal[group]).square(), keep, of)
        column = work[:, j]
        kept[:, j] = column.masked_fill(goes[:, j], 0.0)
        errors[:, j] = torch.where(goes[:, j], column / diagonal[j], 0.0)
        work[:, j + 1 :] -= errors[:, j : j + 1] * factor[j, j + 1 :]
    return kept, errors
