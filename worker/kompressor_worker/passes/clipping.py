"""Grids whose range is shrunk where that costs less than it saves: most weights get finer steps, a few at the ends are clipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kompressor_worker import grid, kernels
from kompressor_worker.kernels.pieces import Heard, unheard
from kompressor_worker.schemes import Scheme

RATIOS = tuple(1 - i / 40 for i in range(20))
"""Shares of a tile's range that are tried: 1 down to 0.525."""

Loss = Callable[[Tensor], Tensor]
"""What an error costs: fp32 [out, tiles, width] to [out, tiles]."""


def on_output(hessian: Tensor, width: int) -> Loss:
    """What an error of one tile changes in the layer's output on the calibration rows: hessian [in, in], its diagonal blocks."""
    blocks = torch.stack([hessian[at : at + width, at : at + width] for at in range(0, len(hessian), width)])

    def loss(error: Tensor) -> Tensor:
        by_tile = error.transpose(0, 1)  # [tiles, out, width]
        return (torch.bmm(by_tile, blocks) * by_tile).sum(-1).T

    return loss


def best_shares(
    weight: Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    heard: Heard = unheard,
    loss: Loss | None = None,
    ratios: Sequence[float] = RATIOS,
) -> Tensor:
    """For each tile of weight [out, in] the one of `ratios` with the least loss when the grid spans that share of its range.

    fp32 [out, tiles]. Only for integer schemes whose tiles are whole parts of one row. Scales as stored in `dtype`. `loss`; None: the sum
    of squares. `heard` is called before each ratio, and may raise."""
    rows, tiles = scheme.scale_shape((weight.shape[0], weight.shape[1]))
    by_tile = weight.float().view(rows, tiles, -1)
    low, high = by_tile.amin(-1), by_tile.amax(-1)
    grids = [grid.grid_of_range(low * ratio, high * ratio, scheme, dtype) for ratio in ratios]
    errors = None if loss else kernels.tile_errors(weight, grids, scheme)
    best = torch.full_like(low, torch.inf)
    chosen = torch.ones_like(best)
    for k, ratio in enumerate(ratios):
        heard()
        if errors is not None:
            cost = errors[k]
        else:
            assert loss is not None
            error = grid.dequantize(grid.quantize(weight, grids[k], scheme), grids[k], scheme) - weight.float()
            cost = loss(error.view(rows, tiles, -1))
        better = cost < best
        best, chosen = torch.where(better, cost, best), torch.where(better, ratio, chosen)
    return chosen


def grid_at(weight: Tensor, scheme: Scheme, dtype: torch.dtype, shares: Tensor) -> grid.Grid:
    """The grid that spans these shares [out, tiles] of each tile's range."""
    tiles = weight.float().view(*shares.shape, -1)
    return grid.grid_of_range(tiles.amin(-1) * shares, tiles.amax(-1) * shares, scheme, dtype)


def clipped(weight: Tensor, found: grid.Grid, scheme: Scheme) -> int:
    """How many weights [out, in] lie beyond the grid's ends by more than half a step; integers only."""
    bottom, top = grid.integer_range(scheme)
    rows, tiles = found.step.shape
    codes = weight.float().view(rows, tiles, -1) / found.step[..., None]
    if found.zero_point is not None:
        codes = codes + found.zero_point.float()[..., None]
    return int(((codes < bottom - 0.5) | (codes > top + 0.5)).sum())
