"""What is measured of a linear's input during the one forward of a block: sums that batches add to, in any order of passes.

A site is an input that one or more linears share, so they share its statistics. All sums are fp32 or exact integers. The histogram counts
bit patterns of bf16: 65,536 bins, so for activations in bf16 it is the distribution itself, without a range to be guessed beforehand.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from kompressor_worker import kernels

Statistic = Literal["hessian", "norms", "means", "range", "magnitude", "histogram"]
BINS = 1 << 16


@dataclass
class Statistics:
    """Of one site with inputs x [rows, columns]; what was not asked for is None."""

    columns: int
    wanted: Collection[Statistic]
    rows: int = 0
    hessian: Tensor | None = None
    """fp32 [columns, columns]: sum over rows of x^T x; both triangles."""
    squares: Tensor | None = None
    """fp32 [columns]: sum over rows of x^2 ("norms")."""
    sums: Tensor | None = None
    """fp32 [columns]: sum over rows of x ("means")."""
    low: Tensor | None = None
    high: Tensor | None = None
    """fp32 [columns]: smallest and largest value ("range")."""
    magnitude: Tensor | None = None
    """fp32 [columns]: sum over rows of |x|."""
    histogram: Tensor | None = None
    """int64 [65536]: how many values have this bf16 bit pattern, by the pattern as an unsigned number."""
    stale: set[Statistic] = field(default_factory=set)
    """What a change of the input has made wrong: to be measured again before use."""

    @property
    def largest(self) -> Tensor:
        """fp32 [columns]: largest magnitude."""
        assert self.low is not None and self.high is not None
        return torch.maximum(self.low.abs(), self.high.abs())

    def add(self, x: Tensor) -> None:
        """Counts x [rows, columns], in the model's dtype or fp32."""
        assert x.dim() == 2 and x.shape[1] == self.columns, (x.shape, self.columns)
        if not len(x):
            return
        self.rows += len(x)
        if "histogram" in self.wanted:
            self.histogram = _plus(self.histogram, bf16_histogram(x))
        if "hessian" in self.wanted:
            if self.hessian is None:
                self.hessian = torch.zeros(self.columns, self.columns, device=x.device)
            kernels.add_gram(self.hessian, x)
        x = x.float()
        if "norms" in self.wanted:
            self.squares = _plus(self.squares, x.square().sum(0))
        if "means" in self.wanted:
            self.sums = _plus(self.sums, x.sum(0))
        if "range" in self.wanted:
            low, high = x.amin(0), x.amax(0)
            self.low = low if self.low is None else torch.minimum(self.low, low)
            self.high = high if self.high is None else torch.maximum(self.high, high)
        if "magnitude" in self.wanted:
            self.magnitude = _plus(self.magnitude, x.abs().sum(0))

    def divide(self, scale: Tensor) -> None:
        """The statistics of x / scale, scale fp32 [columns] > 0: exact but for the histogram, which is stale afterwards."""
        if self.hessian is not None:
            self.hessian.div_(scale[:, None]).div_(scale[None, :])
        if self.squares is not None:
            self.squares.div_(scale.square())
        for sums in (self.sums, self.low, self.high, self.magnitude):
            if sums is not None:
                sums.div_(scale)
        if self.histogram is not None:
            self.stale.add("histogram")

    def renew(self, measured: Statistics) -> None:
        """Takes over what was measured again."""
        for kind in measured.wanted:
            for attribute in ATTRIBUTES[kind]:
                setattr(self, attribute, getattr(measured, attribute))
            self.stale.discard(kind)


ATTRIBUTES: dict[Statistic, tuple[str, ...]] = {
    "hessian": ("hessian",),
    "norms": ("squares",),
    "means": ("sums",),
    "range": ("low", "high"),
    "magnitude": ("magnitude",),
    "histogram": ("histogram",),
}


def bf16_histogram(x: Tensor) -> Tensor:
    """int64 [65536] counts of the bf16 bit patterns of x (bf16, or rounded to it)."""
    patterns = x.to(torch.bfloat16).contiguous().view(torch.int16).flatten().to(torch.int32) & 0xFFFF
    return torch.bincount(patterns, minlength=BINS)


def bin_values(device: torch.device | str = "cpu") -> Tensor:
    """fp32 [65536]: the value of each bin; NaN and Inf among them."""
    return torch.arange(BINS, dtype=torch.int32, device=device).to(torch.int16).view(torch.bfloat16).float()


def _plus(sums: Tensor | None, more: Tensor) -> Tensor:
    return more if sums is None else sums.add_(more)
