"""Scaling a shared input without changing the function: what the norm or the linear before it gives less, the readers take more.

Dividing input column j by s_j: the norm's weight (or the producing rows) by s_j, column j of every reader times s_j. What rounding to the
stored dtype does to the norm is put right in the readers, so only their own rounding is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kompressor_worker.block import Fold, Site


def divide_input(weights: dict[str, Tensor], site: Site, scale: Tensor) -> Tensor:
    """Divides the site's input by `scale`, fp32 [columns] > 0: changes `weights` (full names, whole block) and the statistics of the site
    and its children. The scale that was applied, which differs from the one asked for by the norm's rounding."""
    assert site.fold is not None, site.name
    if site.fold.rows is None:
        scale = _divide_norm(weights, site.fold, scale)
    else:
        _divide_rows(weights, site.fold, site.fold.rows, scale)
    for reader in site.readers:
        weight = weights[reader]
        weights[reader] = (weight.float() * scale.to(weight.device)).to(weight.dtype)
    for each in (site, *site.children):
        each.statistics.divide(scale)
    return scale


def row_divisor(fold: Fold, scale: Tensor, rows: int) -> Tensor:
    """fp32 [rows]: what each row of the producer is divided by; rows that make no input column stay."""
    assert fold.rows is not None
    divisor = torch.ones(rows, device=scale.device)
    divisor[torch.tensor(fold.rows, device=scale.device)] = scale
    return divisor


def shared_by_row(values: Tensor, fold: Fold) -> Tensor:
    """values [columns], those of columns that come from the same row replaced by their mean."""
    if fold.rows is None:
        return values
    rows = torch.tensor(fold.rows, device=values.device)
    sums = values.new_zeros(int(rows.max()) + 1).index_add_(0, rows, values)
    counts = values.new_zeros(len(sums)).index_add_(0, rows, torch.ones_like(values))
    return (sums / counts)[rows]


def _divide_norm(weights: dict[str, Tensor], fold: Fold, scale: Tensor) -> Tensor:
    stored = weights[fold.tensor]
    before = stored.double() + fold.offset
    divided = (before / scale.to(stored.device) - fold.offset).to(stored.dtype)
    applied = (before / (divided.double() + fold.offset)).float().to(scale.device)
    # a channel that the norm silences, or that rounding would (a stored -1 where the model adds 1), stays as it is
    usable = (applied > scale / 2) & (applied < scale * 2)
    weights[fold.tensor] = torch.where(usable.to(stored.device), divided, stored)
    return torch.where(usable, applied, 1.0)


def _divide_rows(weights: dict[str, Tensor], fold: Fold, rows: tuple[int, ...], scale: Tensor) -> None:
    weight = weights[fold.tensor]
    divisor = row_divisor(fold, scale, len(weight)).to(weight.device)
    assert torch.equal(divisor[list(rows)], scale.to(weight.device)), f"{fold.tensor}: one row, two scales"
    weights[fold.tensor] = (weight.float() / divisor[:, None]).to(weight.dtype)
    bias = fold.tensor.removesuffix("weight") + "bias"
    if bias in weights:
        weights[bias] = (weights[bias].float() / divisor).to(weights[bias].dtype)
