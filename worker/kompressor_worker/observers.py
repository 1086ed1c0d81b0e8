"""From the histogram of a linear's input to the range of its static quantiser.

The histogram counts bf16 bit patterns, so it is the distribution itself, and what a quantiser costs is computed exactly: every value that
occurs is rounded as it will be, on the grid that will be stored. A range is searched among shares of the largest one, by steps of an eighth
of an octave over eight octaves and then by steps of a 128th around the best; with a zero point, both ends alike, then each by itself.

- minmax: all values are inside.
- percentile: so many in a hundred are inside; for a symmetric grid by magnitude, else half of the rest is cut off at either end.
- mse: the least expected squared error of the values, those beyond the ends among them.
- entropy: the least KL divergence between the distribution and what the grid keeps of it. This is TensorRT's calibration (Migacz, GTC 2017)
  without its 2048 equal bins: the bins are bf16's, and within the cell of a code the mass is spread over those that occur in proportion to
  their width, which equal bins do by themselves. What is cut off counts to the outermost cells of the distribution, not of its model, as
  there. Exact zeros are left out: every grid holds them exactly.

Entropy cuts off most, as TensorRT's does: the input of a down projection at a quarter of its range. KL of a small trained Llama in
W8A8_STATIC over that of min-max: mse 0.60, percentile 0.81, entropy 4.5; with a few tokens in the calibration text that spike: mse 0.09,
entropy 0.60.

Weights have no histogram and few values to a tile: for them a percentile is the largest value or the next, and a divergence of 128 values
says nothing. Their search for the least squared error is `passes.clipping`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from kompressor_worker import grid
from kompressor_worker.schemes import Scheme
from kompressor_worker.statistics import bin_values

Observer = Literal["minmax", "percentile", "mse", "entropy"]
OCTAVES = 8
"""How far below the largest value the end of the range is looked for."""
COARSE, FINE = 8, 128
"""Steps an octave, the finer ones within two coarse ones around the best of these."""
Cost = Callable[[Tensor, Tensor], Tensor]
"""Of ranges (low, high), fp32 [candidates] each: fp64 [candidates]."""


def input_grid(scheme: Scheme) -> Scheme:
    """The grid of a scheme's static inputs, as a scheme of its own: one tile."""
    match scheme.inputs:
        case "int8_tensor" | "int8_tensor_asym":
            return Scheme(scheme.inputs, "int-quantized", 8, "int", "tensor", symmetric=scheme.inputs == "int8_tensor")
        case "fp8_tensor":
            return Scheme(scheme.inputs, "float-quantized", 8, "float", "tensor")
    raise AssertionError(f"{scheme.name}: its inputs are not static")


def range_of(
    histogram: Tensor, quantiser: Scheme, observer: Observer, dtype: torch.dtype, percentile: float = 99.99
) -> tuple[Tensor, Tensor]:
    """Lowest and highest value, fp32 [], of the range for `quantiser` (`input_grid`) with a scale stored in `dtype`.

    histogram int64 [65536], by bf16 bit pattern (`statistics.bf16_histogram`); NaN and Inf in it are passed over. (0, 0) if it is empty.
    """
    values, counts = occurring(histogram)
    if not len(values):
        return torch.zeros(()), torch.zeros(())
    low, high = values[0].clamp(max=0.0), values[-1].clamp(min=0.0)
    if observer == "minmax":
        return low, high
    if observer == "percentile":
        return _percentile(values, counts, quantiser.symmetric, percentile)
    make = squared_error if observer == "mse" else divergence
    cost = make(values, counts, quantiser, dtype)
    return _search_magnitude(cost, low, high) if quantiser.symmetric else _search_ends(cost, low, high)


def occurring(histogram: Tensor) -> tuple[Tensor, Tensor]:
    """The finite values of a histogram, fp32 ascending, and their counts, fp64; -0 counts as 0."""
    values = bin_values(histogram.device)
    kept = (histogram > 0) & values.isfinite()
    values, counts = values[kept] + 0.0, histogram[kept].double()
    order = values.argsort(stable=True)
    return values[order], counts[order]


def squared_error(values: Tensor, counts: Tensor, quantiser: Scheme, dtype: torch.dtype) -> Cost:
    """Mean of (rounded - value)^2 over the distribution of `occurring` values, for ranges whose scale is stored in `dtype`."""
    share = counts / counts.sum()

    def cost(low: Tensor, high: Tensor) -> Tensor:
        rows, each = _rows(values, low, quantiser)
        found = grid.grid_of_range(low[:, None], high[:, None], each, dtype)
        error = grid.dequantize(grid.quantize(rows, found, each), found, each).sub_(values)
        return (error.double().square_() * share).sum(-1)

    return cost


def divergence(values: Tensor, counts: Tensor, quantiser: Scheme, dtype: torch.dtype) -> Cost:
    """KL divergence, in nats, of the distribution of `occurring` values from what a grid keeps of it; infinite where a cell at the end has
    nothing but what is cut off."""
    values, share = values[values != 0], counts[values != 0]
    share = share / share.sum()
    width = (_step_up(values) - _step_down(values)).double() / 2
    sums = torch.stack([share, width, torch.xlogy(share, share / width)])
    sums = torch.nn.functional.pad(sums.cumsum(-1), (1, 0))
    bounds = torch.arange(CELLS + 1, dtype=torch.int16, device=values.device)

    def cost(low: Tensor, high: Tensor) -> Tensor:
        rows, each = _rows(values, low, quantiser)
        found = grid.grid_of_range(low[:, None], high[:, None], each, dtype)
        # values ascend and so do their cells: a cell is a run of values, its sums are differences of running sums
        edges = torch.searchsorted(_cells(grid.quantize(rows, found, each)), bounds.repeat(len(low), 1))
        mass = sums[0][edges].diff()
        first, last = torch.searchsorted(values, _reach(found, each)).unbind(1)
        kept, span, own = sums[:, edges.clamp(first[:, None], last[:, None])].diff().unbind()
        there = mass > 0
        between = torch.where(there, mass * (mass * kept.sum(-1, keepdim=True) / kept).log(), 0.0)
        within = torch.where(kept > 0, own / kept - (kept / span).log(), 0.0)
        return (between + mass * within).sum(-1)

    return cost


CELLS = 256
"""Codes of eight bits."""


def _cells(codes: Tensor) -> Tensor:
    """Number of each code, int16, ascending with the value that it stands for; -0 and 0 of FP8 are one."""
    if codes.dtype == torch.int8:
        return codes.short() + 128
    bits = codes.view(torch.uint8).short()
    return torch.where(bits < 128, 127 + bits, 255 - bits)


def _reach(found: grid.Grid, quantiser: Scheme) -> Tensor:
    """fp32 [candidates, 2]: from where to where a value goes to its nearest code, and is not cut off: half a step beyond the last ones."""
    ends = torch.tensor([-464.0, 464.0] if quantiser.type == "float" else [-128.5, 127.5], device=found.scale.device)
    return (ends if found.zero_point is None else ends - found.zero_point) * found.scale


def _rows(values: Tensor, candidates: Tensor, quantiser: Scheme) -> tuple[Tensor, Scheme]:
    """The values once for every candidate, and the quantiser with a scale a row."""
    return values.expand(len(candidates), -1), replace(quantiser, strategy="channel")


def _step_up(values: Tensor) -> Tensor:
    """The next bf16 value, of fp32 ones that bf16 holds."""
    return torch.nextafter(values.bfloat16(), torch.full((), torch.inf, dtype=torch.bfloat16, device=values.device)).float()


def _step_down(values: Tensor) -> Tensor:
    return -_step_up(-values)


def _percentile(values: Tensor, counts: Tensor, symmetric: bool, percentile: float) -> tuple[Tensor, Tensor]:
    if symmetric:
        order = values.abs().argsort(stable=True)
        high = _quantile(values.abs()[order], counts[order], percentile)
        return -high, high
    rest = (100.0 - percentile) / 2
    low = -_quantile(-values.flip(0), counts.flip(0), 100.0 - rest)
    return low.clamp(max=0.0), _quantile(values, counts, 100.0 - rest).clamp(min=0.0)


def _quantile(values: Tensor, counts: Tensor, percentile: float) -> Tensor:
    """The smallest of the ascending values that, with those below it, makes up `percentile` of all."""
    inside = counts.cumsum(0)
    wanted = inside[-1] * (percentile / 100.0)
    return values[int(torch.searchsorted(inside, wanted).clamp(max=len(values) - 1))]


def _search_magnitude(cost: Cost, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    most = torch.maximum(-low, high)
    end = _search(lambda ends: cost(-ends, ends), most)
    return -end, end


def _search_ends(cost: Cost, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Both ends shrunk alike, then each on its own: the one does not follow the other where values are mostly of one sign."""
    share = _search(lambda shares: cost(low * shares, high * shares), torch.ones_like(high))
    ours, theirs = low * share, high * share
    theirs = _search(lambda ends: cost(ours.expand_as(ends), ends), high, theirs)
    ours = _search(lambda ends: cost(ends, theirs.expand_as(ends)), low, ours)
    return ours, theirs


def _search(cost: Callable[[Tensor], Tensor], whole: Tensor, start: Tensor | None = None) -> Tensor:
    """The best end among shares of `whole` and `start`; of equals the largest."""
    if whole == 0:
        return whole
    steps = torch.arange(OCTAVES * COARSE + 1, device=whole.device)
    ends = whole * torch.exp2(-steps / COARSE)
    if start is not None:
        ends = torch.cat([ends, start.reshape(1)])
    best = ends[cost(ends).argmin()]
    near = torch.arange(2 * FINE // COARSE, -2 * FINE // COARSE - 1, -1, device=whole.device)
    ends = best * torch.exp2(near / FINE)
    ends = ends[ends.abs() <= whole.abs()]
    return ends[cost(ends).argmin()]
