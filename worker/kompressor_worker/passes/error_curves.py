"""What zeros in each linear cost, measured in one survey of the source, for `allocation: error`.

The shape of a linear's curve comes from its weights and the norms of its input: the squared error of its output, for inputs that do not
correlate. Its height comes from the block: with all linears of one kind (q_proj, or the experts' down_proj) pruned to a share, the squared
change of the hidden state behind the block over the hidden state's square, so that all blocks speak of the same thing. It is tried at three
shares, between which the height is a straight line (docs/decisions/0026-allocated-sparsity.md).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kompressor_worker.batch import Batch
from kompressor_worker.errors import BadNumerics
from kompressor_worker.passes.allocation import SHARES, TRIED, trials
from kompressor_worker.passes.encoding import finite
from kompressor_worker.passes.surveyor import SeenBlock, Surveyed, Surveyor
from kompressor_worker.passes.zeroing import ROWS, least
from kompressor_worker.sparsity import Sparsity

if TYPE_CHECKING:
    from kompressor_worker.statistics import Statistic

UNITS = float(1 << 50)
"""Of all errors of a weight: sums of whole numbers below 2^53 are exact in fp64, in any order."""


class ErrorCurves(Surveyor):
    """By linear of `names`: fp64 [len(SHARES)]. Those that no row of data reaches have none."""

    statistics: frozenset[Statistic] = frozenset({"norms"})

    def __init__(self, names: Iterable[str], sparsity: Sparsity, scored: bool) -> None:
        """`sparsity`: what is asked for. `scored`: whether weights go by their magnitude times their input's norm, in each row, or by
        magnitude alone, in the whole weight."""
        super().__init__()
        self._names, self._sparsity, self._scored = frozenset(names), sparsity, scored

    def begin(self, model: Surveyed) -> None:
        self._batches, rows = list[Batch](), 0
        for batch in model.batches:
            if rows < TRIED:
                self._batches.append(batch)
                rows += len(batch.lengths)

    def block(self, seen: SeenBlock) -> None:
        """Raises BadNumerics."""
        squares = {
            linear.name: finite(site.statistics.squares, site.name)
            for site in seen.sites
            for linear in site.linears
            if linear.name in self._names and site.statistics.squares is not None
        }
        kinds: dict[str, list[str]] = {}
        for name in squares:
            kinds.setdefault(kind_of(name, seen.prefix), []).append(name)
        for names in kinds.values():
            curves = {name: self._curve(seen.weights[f"{name}.weight"], squares[name]) for name in names}
            together = torch.stack(list(curves.values())).sum(0).tolist()
            heights = self._heights(seen, {name: squares[name] for name in names}, together)
            for name, curve in curves.items():
                self.tensors[name] = curve * heights

    def _curve(self, weight: Tensor, squares: Tensor) -> Tensor:
        errors = by_row(weight, squares) if self._scored else by_magnitude(weight, squares)
        steps = torch.tensor(SHARES, dtype=torch.float64, device=errors.device) * (len(errors) - 1)
        below = steps.floor().long().clamp(max=len(errors) - 2)
        return errors[below].lerp(errors[below + 1], steps - below).cpu()

    def _heights(self, seen: SeenBlock, squares: Mapping[str, Tensor], together: Sequence[float]) -> Tensor:
        """fp64 [len(SHARES)]: what the block feels over what the curves of one kind of linears say `together`."""
        tried = trials(self._sparsity.share)
        said = [between(share, SHARES, together) for share in tried]
        found = [self._change(seen, squares, Sparsity(share)) / error if error else 0.0 for share, error in zip(tried, said, strict=True)]
        return torch.tensor([between(share, tried, found) for share in SHARES], dtype=torch.float64)

    def _change(self, seen: SeenBlock, squares: Mapping[str, Tensor], sparsity: Sparsity) -> float:
        """Mean over positions of |h' - h|^2 / |h|^2, h behind the block, h' with these linears pruned."""
        pruned = {}
        for name, norms in squares.items():
            weight = seen.weights[f"{name}.weight"]
            scores = weight.abs().float()
            if self._scored:
                scores *= norms.sqrt()
            pruned[f"{name}.weight"] = weight.masked_fill(least(scores, sparsity, by_row=self._scored), 0.0)
        change = seen.change(seen.tried(self._batches, pruned))
        if not change < float("inf"):
            raise BadNumerics(
                f"{seen.prefix[:-1]}: no calibration row gives a finite output with {', '.join(squares)[:200]} pruned; calibrate with "
                "other data, or use allocation: uniform"
            )
        return change


def kind_of(name: str, prefix: str) -> str:
    """A linear's place in its block; the experts share theirs."""
    return re.sub(r"\.\d+(?=\.)", ".*", name.removeprefix(prefix))


def between(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """The straight lines through the points (xs ascending, ys) at x; outside of them their ends."""
    right = min(max(bisect_left(xs, x), 1), len(xs) - 1)
    (left_x, left_y), (right_x, right_y) = (xs[right - 1], ys[right - 1]), (xs[right], ys[right])
    return left_y + (right_y - left_y) * min(1.0, max(0.0, (x - left_x) / (right_x - left_x)))


def by_row(weight: Tensor, squares: Tensor) -> Tensor:
    """fp64 [columns + 1]: sum of w_ij^2 squares_j over those that are gone when so many go in each row, the least first."""
    sums = torch.zeros(weight.shape[1] + 1, dtype=torch.float64, device=weight.device)
    for rows in torch.split(weight, ROWS):
        sums[1:] += (rows.float().square() * squares).sort(dim=1).values.sum(0, dtype=torch.float64)
    return sums.cumsum(0)


def by_magnitude(weight: Tensor, squares: Tensor) -> Tensor:
    """fp64 [1001]: the same where the smallest weights go, at every thousandth of them. Weights of the same bf16 magnitude go together."""
    total = float((weight.float().square().sum(0) * squares).sum(dtype=torch.float64))
    counts = torch.zeros(1 << 15, dtype=torch.float64, device=weight.device)
    errors = torch.zeros_like(counts)
    for rows in torch.split(weight, ROWS):
        bins = rows.abs().to(torch.bfloat16).contiguous().view(torch.int16).flatten().long()
        costs = (rows.float().square() * squares).double().flatten() * (UNITS / total if total else 0.0)
        counts += torch.bincount(bins, minlength=1 << 15)
        errors += torch.bincount(bins, costs.round(), minlength=1 << 15)
    gone, cost = counts.cumsum(0), errors.cumsum(0) * (total / UNITS)
    wanted = torch.linspace(0, weight.numel(), 1001, dtype=torch.float64, device=weight.device)
    last = torch.searchsorted(gone, wanted).clamp(max=len(gone) - 1)
    before_gone, before_cost = (torch.where(last > 0, x[(last - 1).clamp(min=0)], 0.0) for x in (gone, cost))
    inside = (wanted - before_gone) / (gone[last] - before_gone).clamp(min=1)
    return before_cost + inside * (cost[last] - before_cost)
