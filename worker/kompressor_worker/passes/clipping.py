"""Grids whose range is shrunk where that costs less than it saves: most weights get finer steps, a few at the ends are clipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kompressor_worker import grid
from kompressor_worker.schemes import Scheme

RATIOS = tuple(1 - i / 40 for i in range(20))
"""Shares of a tile's range that are tried: 1 down to 0.525."""

Loss = Callable[[Tensor], Tensor]
"""What an error costs: fp32 [out, tiles, width] to [out, tiles]."""


def squared(error: Tensor) -> Tensor:
    """Every weight counts alike."""
    return error.square().sum(-1)


def best_grid(weight: Tensor, scheme: Scheme, dtype: torch.dtype, loss: Loss = squared, ratios: Sequence[float] = RATIOS) -> grid.Grid:
    """The grid of weight [out, in] fp32 that has the least loss among those that span `ratios` of each tile's range, tile by tile.

    Only for schemes whose tiles are parts of one row, full ones. Scales as stored in `dtype`."""
    rows, columns = weight.shape
    width = scheme.tile((rows, columns))[1]
    tiles = weight.view(rows, columns // width, width)
    low, high = tiles.amin(-1), tiles.amax(-1)
    best = torch.full_like(low, torch.inf)
    chosen = torch.ones_like(low)
    for ratio in ratios:
        tried = grid.grid_of_range(low * ratio, high * ratio, scheme, dtype)
        error = grid.dequantize(grid.quantize(weight, tried, scheme), tried, scheme) - weight
        cost = loss(error.view_as(tiles))
        better = cost < best
        best, chosen = torch.where(better, cost, best), torch.where(better, ratio, chosen)
    return grid.grid_of_range(low * chosen, high * chosen, scheme, dtype)


def clipped(weight: Tensor, found: grid.Grid, scheme: Scheme) -> int:
    """How many weights [out, in] lie beyond the grid's ends by more than half a step; integers only."""
    if scheme.type != "int":
        return 0
    bottom, top = grid.integer_range(scheme)
    rows, tiles = found.step.shape
    codes = weight.float().reshape(rows, tiles, -1) / found.step[..., None]
    if found.zero_point is not None:
        codes = codes + found.zero_point.float()[..., None]
    return int(((codes < bottom - 0.5) | (codes > top + 0.5)).sum())
