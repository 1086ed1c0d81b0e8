"""GGUF's blocks that gradients pass through: a weight's codes are chosen anew, its scales and minima stay as they were found.

What the forward sees is what a reader of the file will see, in the model's dtype: levels times steps, minima taken away, in fp32 as ggml
does it. A value within its group's range has the gradient of what it is rounded to, one beyond it none (the straight-through estimator,
Bengio et al. 2013, arXiv 1308.3432). Scales are not learned: those of a super-block are integers of other ones, so that no small change of
one of them leaves the others as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kompressor_worker import kernels
from kompressor_worker.block import Encoded
from kompressor_worker.errors import BadNumerics
from kompressor_worker.formats import gguf_packing
from kompressor_worker.formats.gguf_types import type_of
from kompressor_worker.kernels.gguf_search import DEAD_STEP
from kompressor_worker.layout import LinearLayout
from kompressor_worker.schemes import Scheme
from kompressor_worker.tensors import DTYPES

HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}
INSIDE = 0.49
"""How far from its code a weight begins at most, in steps: another pass may have rounded it to one that is not its nearest."""


class FakeBlocks(nn.Module):
    """One linear's weight in the blocks that it has been encoded in."""

    step: Tensor
    """fp32 [out, groups]."""
    low: Tensor
    """fp32 [out, groups]: what is taken away from every value."""
    stretch: None = None

    def __init__(self, linear: LinearLayout, scheme: Scheme, data: Tensor, device: torch.device | None = None) -> None:
        """`data`: uint8 [out, row bytes]."""
        super().__init__()
        self.linear, self.scheme, self.kind, self.dtype = linear, scheme, type_of(scheme), DTYPES[linear.dtype]
        self.inputs: Mapping[str, Tensor] = {}
        self.plain = HALVES.get(self.kind.name)
        """The dtype, where values are stored as they are."""
        self._data = data.cpu()
        codes = {level: code for code, level in reversed([*enumerate(self.kind.levels)])}  # MXFP4 has a second zero: the first is taken
        levels = sorted(codes)
        self._levels, self._codes = levels, [codes[level] for level in levels]
        if self.plain is not None:
            return
        ends = [2 * levels[0] - levels[1], *levels, 2 * levels[-1] - levels[-2]]
        nearest = {at: min(at - below, above - at) for below, at, above in zip(ends, ends[1:], ends[2:], strict=False)}
        self._gaps = [float(nearest[level]) for level in self.kind.levels]
        """By code: from its level to the nearest other one."""
        step, low = gguf_packing.group_scales(gguf_packing.read_scales(data.reshape(-1, self.kind.nbytes), self.kind), self.kind)
        step = step.reshape(len(data), -1)
        self.register_buffer("step", step.to(device), persistent=False)
        self.register_buffer("low", (torch.zeros_like(step) if low is None else low.reshape(step.shape)).to(device), persistent=False)

    @classmethod
    def found(cls, linear: LinearLayout, scheme: Scheme, weight: Tensor, device: torch.device | None = None) -> FakeBlocks:
        """In the blocks that rounding to nearest makes of weight [out, in]. Raises BadNumerics."""
        data, _, _, bad = kernels.gguf_quantize(weight, type_of(scheme).name, unbiased=False)
        if bad:
            raise BadNumerics(
                f"{linear.weight}: {bad} of {weight.numel()} values are NaN or Inf; the checkpoint is damaged, fetch it again"
            )
        return cls(linear, scheme, data, device)

    def forward(self, weight: Tensor) -> Tensor:
        return self.weight(weight)

    def weight(self, weight: Tensor, rows: Tensor | None = None) -> Tensor:
        """What a reader sees of weight [out, in], in the model's dtype; differentiable by it. With `rows` int64 [n]: of these alone, which
        weight [n, in] are then."""
        rounded: Tensor = Rounding.apply(weight, rows, self)  # type: ignore[no-untyped-call]
        return rounded

    @torch.no_grad()
    def encode(self, weight: Tensor, stands_for: Tensor | None = None) -> Encoded:
        """What decodes to `weight(weight)`, bit for bit. Errors are against `stands_for` [out, in], the weight itself where it is None."""
        weight = weight.detach()
        if self.plain is not None:
            data = weight.to(self.plain).cpu().contiguous().view(torch.uint8).view(len(weight), -1)
        else:
            places = torch.tensor(self._codes, dtype=torch.uint8, device=weight.device)[self.places(weight, None)]
            data = self._data.reshape(-1, self.kind.nbytes).clone()
            gguf_packing.write_codes(data, places.cpu().reshape(len(data), -1), self.kind)
        data = data.view(len(weight), -1)
        error, norm = kernels.gguf_errors((weight if stands_for is None else stands_for).to(self.dtype).cpu(), data, self.kind.name)
        return Encoded({self.linear.weight: data}, error, norm)

    @torch.no_grad()
    def begins(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """For weight [out, in], encoded as `tensors` (by full name), both fp32 [out, in]: from where it is rounded to its code, which is
        the weight itself unless a pass has chosen another than the nearest; and how far the next value is."""
        data = tensors[self.linear.weight].to(weight.device)
        codes = gguf_packing.read_codes(data.reshape(-1, self.kind.nbytes), self.kind).view(weight.shape).long()
        levels = gguf_packing.levels_of(self.kind, weight.device)
        step, low = (x.repeat_interleave(self.kind.group, 1) for x in (self.step, self.low))
        rounded = levels[codes] * step - low
        unit = torch.tensor(self._gaps, device=weight.device)[codes] * step.abs()
        within = weight.float().clamp(rounded - INSIDE * unit, rounded + INSIDE * unit)
        return torch.where(self.values(weight, None) == rounded, weight.float(), within), unit

    def places(self, weight: Tensor, rows: Tensor | None) -> Tensor:
        """int64, shaped as weight: the nearest levels, counted from the lowest."""
        at = self._quotient(weight, rows)
        if self.kind.even:
            return at.round_().sub_(self._levels[0]).clamp_(0, len(self._levels) - 1).long()
        levels = torch.tensor(self._levels, dtype=torch.float32, device=weight.device)
        return torch.bucketize(at, (levels[1:] + levels[:-1]) / 2)

    def values(self, weight: Tensor, rows: Tensor | None) -> Tensor:
        """fp32: what weight is rounded to."""
        if self.kind.even:
            levels = self._quotient(weight, rows).round_().clamp_(self._levels[0], self._levels[-1])
        else:
            levels = torch.tensor(self._levels, dtype=torch.float32, device=weight.device)[self.places(weight, rows)]
        made = levels.view(len(levels), -1, self.kind.group)
        return made.mul_(self._of(self.step, rows)).sub_(self._of(self.low, rows)).flatten(1)

    def inside(self, weight: Tensor, rows: Tensor | None) -> Tensor:
        """bool: which values are no further beyond the ends than others may be from their levels."""
        at = self._quotient(weight, rows)
        first, second, *_, before, last = self._levels
        return (at >= first - (second - first) / 2) & (at <= last + (last - before) / 2)

    def _quotient(self, weight: Tensor, rows: Tensor | None) -> Tensor:
        """fp32, a new tensor shaped as weight: in levels."""
        step = torch.where(self.step == 0, DEAD_STEP, self.step)
        grouped = weight.reshape(len(weight), -1, self.kind.group)
        return (grouped + self._of(self.low, rows)).div_(self._of(step, rows)).flatten(1)

    def _of(self, groups: Tensor, rows: Tensor | None) -> Tensor:
        """[rows, groups, 1] of [out, groups]."""
        return (groups if rows is None else groups[rows])[..., None]


class Rounding(torch.autograd.Function):
    """weight [n, in], which rows these are (None: all), and whose."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor | None, of: FakeBlocks) -> Tensor:
        ctx.save_for_backward(weight, rows)
        ctx.of = of
        return (of.values(weight, rows) if of.plain is None else weight.to(of.plain)).to(of.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, rows = ctx.saved_tensors
        passed: Tensor = gradient if ctx.of.plain is not None else gradient * ctx.of.inside(weight, rows)
        return passed.to(weight.dtype), None, None
