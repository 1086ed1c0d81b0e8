"""What rounding to each of several integer grids costs, tile by tile, in plain torch: the search for the grid that costs least.

Some ten operations an element and grid. Plain torch reads and writes the weight as often; the compiled one reads it once, whatever the
number of grids, and is bound by arithmetic. A quotient is a product with the reciprocal here: it only decides which grid is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tile_errors(weight: Tensor, step: Tensor, zero_point: Tensor | None, bottom: int, top: int) -> Tensor:
    """fp32 [grids, rows, tiles]: sums over a tile of (dequantised - weight)^2, all in fp32.

    weight [rows, columns]; step fp32 and zero_point (fp32, whole numbers from bottom to top) [grids, rows, tiles], of tiles as wide as
    columns / tiles.
    """
    tiles = weight.float().view(*step.shape[1:], -1)
    errors = torch.empty_like(step)
    for k in range(len(step)):
        s, z = step[k, :, :, None], 0.0 if zero_point is None else zero_point[k, :, :, None]
        codes = (tiles * s.reciprocal() + z).clamp_(bottom, top).round_()
        errors[k] = ((codes - z) * s - tiles).square().sum(-1)
    return errors
