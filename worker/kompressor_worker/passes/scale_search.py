"""AWQ's search: by how much each input channel is divided so that rounding the weights that read it changes their output least.

The change of a layer's output by an error dW of its weight, summed over all calibration rows, is tr(dW H dW^T) with H = X^T X: exact, and
no row is needed for it any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kompressor_worker import grid
from kompressor_worker.block import Fold
from kompressor_worker.kernels.pieces import Heard, unheard
from kompressor_worker.passes.folding import shared_by_row
from kompressor_worker.schemes import Scheme

SMALLEST = 1e-4
"""Of a mean magnitude or a share, before it is raised to a power: AutoAWQ's choice."""


@dataclass(frozen=True)
class Reader:
    """A weight to be rounded, and what its input is like."""

    weight: Tensor
    """fp32 [out, in]"""
    hessian: Tensor
    """fp32 [in, in]"""
    scheme: Scheme
    dtype: torch.dtype
    """What scales are stored in."""


@dataclass(frozen=True)
class Scaling:
    scale: Tensor
    """fp32 [in], the same for columns that come from the same row."""
    ratio: float
    """The power of the activations' magnitude."""
    duo: bool
    """Whether the weights' magnitude is in it too."""
    gain: float
    """Loss with it over loss without any."""


def best_scaling(readers: Sequence[Reader], magnitude: Tensor, fold: Fold, steps: int, heard: Heard = unheard) -> Scaling | None:
    """The best of 2 * steps candidates; None if none is better than no scale at all. magnitude fp32 [in]: mean |x| over the rows. `heard`
    is called before each reader is tried, and may raise."""
    plain = _loss(readers, torch.ones_like(magnitude), heard)
    best: Scaling | None = None
    least = plain
    for scale, ratio, duo in _candidates(readers, magnitude, fold, steps):
        loss = _loss(readers, scale, heard)
        if loss < least:
            least, best = loss, Scaling(scale, ratio, duo, loss / plain)
    return best


def output_error(error: Tensor, hessian: Tensor) -> float:
    """tr(dW H dW^T) of dW [out, in] and H [in, in], fp32."""
    return float(((error @ hessian) * error).sum(dtype=torch.float64))


def _candidates(readers: Sequence[Reader], magnitude: Tensor, fold: Fold, steps: int) -> Iterator[tuple[Tensor, float, bool]]:
    """mean|x|^r, and mean|x|^r / mean|w|^(1-r) with w as a share of its tile's largest; normalised so that sqrt(max * min) is 1."""
    dead = magnitude <= 0
    x = shared_by_row(magnitude, fold).clamp(min=SMALLEST)
    shares = sum(_share_of_tile(r).sum(0) for r in readers) / sum(len(r.weight) for r in readers)
    assert isinstance(shares, Tensor)
    w = shared_by_row(shares, fold)
    for step in range(steps):
        ratio = step / steps
        for duo in (False, True):
            if step == 0 and not duo:
                continue  # no scale at all
            scale = x.pow(ratio) / (w.pow(1 - ratio) + SMALLEST if duo else 1.0)
            scale = scale.clamp(min=SMALLEST)
            scale = scale / (scale.max() * scale.min()).sqrt()
            yield shared_by_row(torch.where(dead, 1.0, scale), fold), ratio, duo


def _share_of_tile(reader: Reader) -> Tensor:
    """fp32 [out, in]: |w| over the largest of its tile."""
    rows, columns = reader.weight.shape
    tiles = reader.weight.abs().view(rows, -1, reader.scheme.tile((rows, columns))[1])
    return (tiles / tiles.amax(-1, keepdim=True).clamp(min=SMALLEST)).view(rows, columns)


def _loss(readers: Sequence[Reader], scale: Tensor, heard: Heard) -> float:
    total = 0.0
    for reader in readers:
        heard()
        scaled = (reader.weight * scale).to(reader.dtype)
        found = grid.grid_of(scaled, reader.scheme)
        rounded = grid.dequantize(grid.quantize(scaled, found, reader.scheme), found, reader.scheme)
        total += output_error(rounded / scale - reader.weight, reader.hessian)
    return total
