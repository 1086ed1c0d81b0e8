"""The search for scales, minima and codes of GGUF's blocks, in plain torch: what the compiled one must equal bit for bit.

What is minimised is sum w (x - value)^2, w the importance of the column: with the second moments of the layer's input it is the error of
its output, but for what columns have in common. Several widths of a step are tried for each group, each rounded to and fitted again by
weighted least squares; the groups' scales are then rounded to multiples of their block's, and this is fitted in turn to the codes.
`docs/decisions/0040-gguf-kernels.md` says what that gains over llama.cpp's own searches.

Least squares make every block shorter: what is left out is at right angles to what is kept, so sum w x value = sum w value^2, which is less
than sum w x^2. Of a random error that is no matter, but all blocks shrink alike, and what the weights have learned shrinks with them: at 2
bits by a twelfth, layer after layer. So in the end the scale is made larger again, until that sum is what it was, with the codes as they
are. (Such scales are called unbiased: Vargaftik et al. 2021, arXiv 2105.08339.)

Columns of a group come first, [columns, groups, blocks], and sums run over them one after the other: so a lane of a vector is a block, and
no bit depends on how many lanes there are. About 10 operations a column and width with one sum pass, 13 with minima.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from kompressor_worker import grid
from kompressor_worker.formats.gguf_packing import Scales, group_scales, levels_of
from kompressor_worker.formats.gguf_types import GgufType

DEAD = 1e-15
"""A group whose largest magnitude is no more than this is one of zeros: no fp16 scale reaches it."""
DEAD_STEP = 2.0**-100
"""In place of a step of zero, to divide by: whatever the code, its value is the group's own."""
LARGEST = 65504.0
"""Of fp16: scales end there."""
WIDTHS: dict[str, tuple[float, ...]] = {
    "Q4_0": tuple(-5.5 - 0.25 * k for k in range(16)),
    "Q5_0": tuple(-13.0 - 0.5 * k for k in range(16)),
    "Q3_K": tuple(-2.5 - 0.2 * k for k in range(16)),
    "Q6_K": tuple(-28.0 - 0.5 * k for k in range(16)),
    "IQ4_NL": tuple(-90.0 - 4.0 * k for k in range(16)),
}
"""At what level a symmetric group's largest magnitude is put; beyond the last level it is cut off there."""
PLAIN_WIDTHS = {"Q4_0": tuple(-7.25 - 0.5 * k for k in range(4)), "Q5_0": tuple(-14.0 - 1.0 * k for k in range(4))}
"""The same where every column is as good as another and llama.cpp does not search at all: twice as many take less than 1 % of the error."""
MOST_GAIN = 2.0
"""How many times as large a block's scale becomes at most. (Smaller it becomes where the last rounding of scales has made it too large.)"""
OUTER = tuple(1.0 + 0.02 * k for k in range(-3, 5))
"""The same for the largest scale of a block, in shares of the smallest integer."""
CUTS, WEIGHTED_CUTS = (-0.2, 0.2, 0.6, 1.0), (-0.3, 0.0, 0.3, 0.6, 0.9, 1.2)
"""By how many steps a group's range is cut at either end; where columns weigh differently, more is to be found."""


def widths(kind: GgufType, weighted: bool) -> tuple[float, ...]:
    found = WIDTHS.get(kind.name, ())
    return found if weighted else PLAIN_WIDTHS.get(kind.name, found)


@dataclass(frozen=True)
class Found:
    """Of so many blocks."""

    scales: Scales
    codes: Tensor
    """uint8 [blocks, columns]."""


def search(x: Tensor, given: Tensor | None, kind: GgufType, unbiased: bool) -> Found:
    """x and importance (above zero, or None: all alike) fp32 [blocks, columns of a block], finite."""
    x, w = (
        t.view(len(t), kind.block // kind.group, kind.group).permute(2, 1, 0).contiguous()
        for t in (x, torch.ones_like(x) if given is None else given)
    )
    if kind.name == "MXFP4":
        return _exponents(x, w, kind)
    if kind.name == "Q8_0":
        scales = Scales(_half(_largest(x).abs() / 127.0)[0])
    elif kind.minimum is not None:
        scales = _with_minima(x, w, kind, CUTS if given is None else WEIGHTED_CUTS)
    else:
        scales = _symmetric(x, w, kind, widths(kind, given is not None))
    codes = codes_on(x, scales, kind)
    return Found(_unbiased(x, w, scales, codes, kind) if unbiased and kind.name != "Q8_0" else scales, codes)


def _unbiased(x: Tensor, w: Tensor, scales: Scales, codes: Tensor, kind: GgufType) -> Scales:
    """Scales by which a block's values have as large a part along x as x has itself, sum w x value = sum w x^2; x and w as in `search`."""
    step, low = group_scales(scales, kind)
    value = levels_of(kind, x.device)[codes.long()].view(len(codes), -1, kind.group) * step[..., None]
    if low is not None:
        value = value - low[..., None]
    x, w, value = (t.permute(1, 0, 2).reshape(kind.block, -1) for t in (x, w, value.permute(2, 1, 0)))
    gain = _total(w * x * x) / _total(w * x * value)
    gain = torch.where(gain > 0.0, gain, 1.0).clamp(1 / MOST_GAIN, MOST_GAIN)
    minimum = None if scales.minimum is None else _half(scales.minimum.float() * gain)
    return replace(scales, scale=_half(scales.scale.float() * gain), minimum=minimum)


def codes_on(x: Tensor, scales: Scales, kind: GgufType) -> Tensor:
    """uint8 [blocks, columns]: x [columns, groups, blocks] rounded to the nearest levels."""
    step, low = group_scales(scales, kind)
    lifted = x if low is None else x + low.T
    return as_places(rounded(lifted * _inverse(step.T), kind), kind).permute(2, 1, 0).reshape(x.shape[2], kind.block)


def rounded(y: Tensor, kind: GgufType) -> Tensor:
    """The nearest levels."""
    if kind.even:
        return y.clamp(kind.levels[0], kind.levels[-1]).round()
    levels = levels_of(kind, y.device)
    return levels[torch.bucketize(y, (levels[1:] + levels[:-1]) / 2)]


def as_places(levels: Tensor, kind: GgufType) -> Tensor:
    """uint8: the places of these levels."""
    if kind.even:
        return (levels - kind.levels[0]).to(torch.uint8)
    return torch.bucketize(levels, levels_of(kind, levels.device)).to(torch.uint8)


def _total(t: Tensor) -> Tensor:
    """Over the first dimension, one after the other."""
    return reduce(torch.add, t.unbind(0), torch.zeros_like(t[0]))


def _largest(t: Tensor) -> Tensor:
    """Of the first dimension, with its sign; of two as large the positive one."""
    high, low = t.amax(0), t.amin(0)
    return torch.where(high >= -low, high, low)


def _half(t: Tensor) -> Tensor:
    return t.clamp(-LARGEST, LARGEST).half() + 0.0  # no zero below zero


def _inverse(step: Tensor) -> Tensor:
    return torch.where(step == 0, 0.0, step.reciprocal())


def _sums(x: Tensor, w: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    wq = w * q
    return _total(wq * x), _total(wq * q)


def _symmetric(x: Tensor, w: Tensor, kind: GgufType, tried: tuple[float, ...]) -> Scales:
    scale, most = torch.zeros_like(x[0]), _largest(x)
    best, live, each = torch.zeros_like(scale), most.abs() > DEAD, most.reciprocal()
    for at in tried:
        qx, qq = _sums(x, w, rounded(x * torch.where(live, each * at, 0.0), kind))
        fitted = qx / qq
        gain = fitted * qx
        better = (gain > best) & (gain < torch.inf)
        best, scale = torch.where(better, gain, best), torch.where(better, fitted, scale)
    if kind.small is None:
        outer = _half(scale)
        qx, qq = _sums(x, w, rounded(x * _inverse(outer.float()), kind))
        return Scales(_half(torch.where(qq > 0, qx / qq, outer.float()))[0])
    _, weight = _sums(x, w, rounded(x * _inverse(scale), kind))
    outer = _outer(scale, weight, kind)
    bottom, top = kind.small_range
    small = (scale * _inverse(outer.float())).clamp(bottom, top).round()
    step = outer.float() * small
    qx, qq = _sums(x, w, rounded(x * _inverse(step), kind))
    above, below = _total(small * qx), _total(small * small * qq)
    outer = _half(torch.where(below > 0, above / below, outer.float()))
    return Scales(outer, small=small.T.short())


def _outer(scale: Tensor, weight: Tensor, kind: GgufType) -> Tensor:
    """fp16 [blocks]: whose multiples are nearest to scale [groups, blocks], weighted."""
    bottom, top = kind.small_range
    most, best = _largest(scale), torch.full_like(scale[0], torch.inf)
    chosen = torch.zeros_like(most).half()
    for share in OUTER:
        outer = _half(most / (bottom * share))
        wide = outer.float()
        off = scale - wide * (scale * _inverse(wide)).clamp(bottom, top).round()
        cost = _total(weight * off * off)
        better = cost < best
        best, chosen = torch.where(better, cost, best), torch.where(better, outer, chosen)
    return chosen


@dataclass(frozen=True)
class _Line:
    """Sums of weighted least squares of x on a line through the codes, of a group or of a block."""

    w: Tensor
    wx: Tensor

    def sums(self, x: Tensor, w: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wq = w * q
        return _total(wq), _total(wq * q), _total(wq * x)

    def fit(self, q: Tensor, qq: Tensor, qx: Tensor, below_zero: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Slope, offset, and the cost but for sum w x^2; an offset above zero becomes none where it may not be."""
        det = self.w * qq - q * q
        slope, offset, usable = (self.w * qx - q * self.wx) / det, (qq * self.wx - q * qx) / det, det > 0
        if below_zero:
            none = (offset > 0) | ~usable
            slope, offset, usable = torch.where(none, qx / qq, slope), torch.where(none, 0.0, offset), qq > 0
        cost = torch.where(usable & (slope > 0), -(slope * qx + offset * self.wx), torch.inf)
        return slope, offset, cost


def _with_minima(x: Tensor, w: Tensor, kind: GgufType, cuts: tuple[float, ...]) -> Scales:
    line = _Line(_total(w), _total(w * x))
    scale, offset = _lines(x, w, line, kind, cuts)
    if kind.small is not None:
        return _small_lines(x, w, line, scale, 0.0 - offset, kind)
    step, start = _half(scale).float(), _half(offset).float()
    q = rounded((x - start) * _inverse(step), kind)
    fitted, moved, cost = line.fit(*line.sums(x, w, q), below_zero=False)
    better = cost < torch.inf
    return Scales(_half(torch.where(better, fitted, step))[0], _half(torch.where(better, moved, start))[0])


def _lines(x: Tensor, w: Tensor, line: _Line, kind: GgufType, cuts: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Scale and offset of each group, fp32 [groups, blocks]."""
    below_zero, top = kind.small is not None, float(kind.levels[-1])
    offset = line.wx / line.w
    low, high = x.amin(0), x.amax(0)
    if below_zero:
        low, offset = low.clamp(max=0.0), offset.clamp(max=0.0)
    best, scale, span = -(offset * line.wx), torch.zeros_like(low), high - low
    step, live = span / top, span > DEAD
    for at_low in cuts:
        start = low + at_low * step
        for at_high in cuts:
            inverse = torch.where(live, (span - (at_low + at_high) * step).reciprocal() * top, 0.0)
            fitted, moved, cost = line.fit(*line.sums(x, w, rounded((x - start) * inverse, kind)), below_zero)
            better = cost < best
            best, scale, offset = (torch.where(better, a, b) for a, b in ((cost, best), (fitted, scale), (moved, offset)))
    return scale, offset


def _small_lines(x: Tensor, w: Tensor, line: _Line, scale: Tensor, minimum: Tensor, kind: GgufType) -> Scales:
    """Scales and minima [groups, blocks] as multiples of their block's: the integers beside the nearest are tried, minima are fitted to
    each, and the block's two numbers to all."""
    top = float(kind.small_range[1])
    outer, outer_low = _half(scale.amax(0) / top).float(), _half(minimum.amax(0) / top).float()
    nearest = (scale * _inverse(outer)).clamp(0.0, top).round()
    best = torch.full_like(scale, torch.inf)
    kept = [torch.zeros_like(scale) for _ in range(5)]  # scale, minimum and sums of the best
    for beside in (-1.0, 0.0, 1.0):
        small = (nearest + beside).clamp(0.0, top)
        step = outer * small
        inverse = _inverse(step)
        q = _total(w * rounded((x + minimum) * inverse, kind))
        least = ((step * q - line.wx) / line.w * _inverse(outer_low)).clamp(0.0, top).round()
        low = outer_low * least
        q, qq, qx = line.sums(x, w, rounded((x + low) * inverse, kind))
        cost = step * (step * qq - 2.0 * qx - 2.0 * low * q) + low * (2.0 * line.wx + low * line.w)
        better = cost < best
        best = torch.where(better, cost, best)
        kept = [torch.where(better, a, b) for a, b in zip((small, least, q, qq, qx), kept, strict=True)]
    small, least, q, qq, qx = kept
    aa, ab, bb = _total(small * small * qq), _total(small * least * q), _total(least * least * line.w)
    ax, bx = _total(small * qx), _total(least * line.wx)
    det = aa * bb - ab * ab
    fitted, fitted_low = (ax * bb - bx * ab) / det, (ax * ab - bx * aa) / det
    usable = (det > 1e-6 * (aa * bb)) & (fitted > 0) & (fitted_low > 0)
    outer = torch.where(usable, fitted, torch.where((bb == 0) & (ax > 0), ax / aa, outer))
    return Scales(_half(outer), _half(torch.where(usable, fitted_low, outer_low)), small.T.short(), least.T.short())


def _exponents(x: Tensor, w: Tensor, kind: GgufType) -> Found:
    """MXFP4: the power of two that costs least of three."""
    x, w = x[:, 0], w[:, 0]
    usual = grid.mx_exponent(_largest(x).abs()).to(torch.int32)
    best = torch.full_like(x[0], torch.inf)
    exponent, codes = torch.zeros_like(usual), torch.zeros_like(x, dtype=torch.uint8)
    for beside in (0, -1, 1):
        tried = (usual + beside).clamp(0, 254)
        scale = grid.mx_scale(tried.to(torch.uint8))
        value = grid.round_to_fp4((x / scale).clamp(-grid.FP4_MAX, grid.FP4_MAX))
        off = value * scale - x
        cost = _total(w * off * off)
        better = cost < best if beside else torch.ones_like(cost, dtype=torch.bool)
        best, exponent = torch.where(better, cost, best), torch.where(better, tried, exponent)
        place = torch.bucketize(value.abs(), torch.tensor(grid.FP4_VALUES, device=x.device)) + 8 * (x < 0)
        codes = torch.where(better, place.to(torch.uint8), codes)
    return Found(Scales(exponent.to(torch.uint8)), codes.T.contiguous())
