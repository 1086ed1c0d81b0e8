"""The channels of the residual stream that `pruneHidden` keeps: how they are chosen, and how weights lose the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kompressor_worker.architectures import FAMILIES
from kompressor_worker.block import Reduction
from kompressor_worker.family import Family
from kompressor_worker.layout import ModelLayout, UnitLayout
from kompressor_worker.passes.encoding import finite
from kompressor_worker.passes.reduction import dampened, digits
from kompressor_worker.passes.surveyor import SeenBlock, Surveyor
from kompressor_worker.resizing import axes

if TYPE_CHECKING:
    from kompressor_worker.block import Site

FINAL = "final"
"""The norm before the head, in place of its name."""
IMPORTANCE = "importance"
BEHIND = {"post_attention_layernorm.weight": "o", "post_feedforward_layernorm.weight": "down"}
"""Norms of what is added to the stream, in families that have them."""


class ChannelSurvey(Surveyor):
    """`importance` [hidden]: each norm's readers get sum over their rows of (x_c W_c)^2 from channel c; its share of all channels', summed
    over the norms. By norm, `energy/...` [hidden]: mean over positions of h_c^2 / mean(h^2), h what the norm gets."""

    reads_head = True
    whole_block = False

    def __init__(self, family: Family) -> None:
        super().__init__()
        self._family = family
        self._squares: dict[str, Tensor] = {}
        """By weight of the block that is being seen: fp64 [columns], summed over its rows."""

    def part(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            if weight.dim() == 2:
                self._squares[name] = sum_of_squares(weight)

    def block(self, seen: SeenBlock) -> None:
        norms: list[Site] = [site for site in seen.sites if site.fold is not None and site.fold.rows is None]
        for site, hidden in zip(norms, (seen.before, seen.middle), strict=True):
            assert site.fold is not None
            energy = mean_of(seen.energies(hidden))
            self.tensors[f"energy/{site.fold.tensor}"] = energy
            reads = torch.stack([self._squares[name] for name in site.readers]).sum(0)
            self._count(energy, seen.weights[site.fold.tensor], reads)
        self._squares = {}
        self.tensors[f"energy/{FINAL}"] = mean_of(seen.energies(seen.after))
        if self._family.post_norms:
            for (name, _), (a, b) in zip(BEHIND.items(), ((seen.before, seen.middle), (seen.middle, seen.after)), strict=True):
                norm = f"{seen.prefix}{name}"
                self.tensors[f"energy/{norm}"] = mean_of(seen.added(a, b, seen.weights[norm].float() + self._family.norm_offset))

    def head(self, first: int, rows: Tensor, norm: Tensor) -> None:
        squares = sum_of_squares(rows)
        self.tensors["head"] = self.tensors.get("head", torch.zeros_like(squares)) + squares
        self.tensors["norm"] = norm

    def found(self) -> dict[str, Tensor]:
        device = self.tensors[IMPORTANCE].device
        head, norm = self.tensors.pop("head").to(device), self.tensors.pop("norm").to(device)
        self._count(self.tensors[f"energy/{FINAL}"], norm, head)
        return self.tensors

    def _count(self, energy: Tensor, norm: Tensor, reads: Tensor) -> None:
        got = energy * (norm.float() + self._family.norm_offset).square().double() * reads
        share = got / got.sum().clamp(min=1e-300)
        self.tensors[IMPORTANCE] = self.tensors.get(IMPORTANCE, torch.zeros_like(share)) + share


@dataclass
class Channels:
    kept: Tensor
    """int64, ascending."""
    factors: Mapping[str, float]
    """By norm (its name in the source, or FINAL): what its weight is multiplied by."""
    widened: float
    """Root of channels before over channels after: what embeddings are multiplied by where the model scales them by their number."""
    _layout: ModelLayout | None = field(default=None)

    @classmethod
    def choose(cls, found: Mapping[str, Tensor], keep: int) -> Channels:
        importance = found[IMPORTANCE]
        kept = importance.topk(keep).indices.sort().values
        # x / rms(x) over the kept channels alone is larger or smaller than before by the root of their share of the energy
        factors = {
            name.removeprefix("energy/"): float((energy[kept].sum() / keep).sqrt())
            for name, energy in sorted(found.items())  # a survey that was saved comes back in another order
            if name.startswith("energy/")
        }
        return cls(kept.cpu(), factors, (len(importance) / keep) ** 0.5)

    def factors_told(self) -> dict[str, float]:
        return {name: digits(factor) for name, factor in self.factors.items()}

    def place(self, layout: ModelLayout) -> None:
        """In the model as it becomes."""
        self._layout = layout

    @property
    def family(self) -> Family:
        assert self._layout is not None
        return FAMILIES[self._layout.family or ""]

    def rows(self, x: Tensor) -> Tensor:
        """x [..., hidden] without the channels that go."""
        return x.index_select(-1, self.kept.to(x.device))

    def embedding(self, rows: Tensor) -> Tensor:
        return (self.rows(rows).float() * self.widened).to(rows.dtype) if self.family.scaled_embeddings else self.rows(rows)

    def cut(self, unit: UnitLayout, weights: dict[str, Tensor]) -> None:
        """A decoder block's weights as far as they are there, or the final norm."""
        unit = replace(unit, stages=tuple(stage for stage in unit.stages if any(t.name in weights for t in stage.tensors)))
        sources = {t.name: t.stored[0].name for stage in unit.stages for t in stage.tensors if t.stored}
        for name, sizes in axes(self.family, unit).items():
            if name not in weights or "hidden" not in sizes:
                continue
            weight = weights[name]
            for axis, size in enumerate(sizes):
                if size == "hidden":
                    weight = weight.index_select(axis, self.kept.to(weight.device))
            norm = sources[name] if sources[name] in self.factors else FINAL if unit.name == "head" and weight.dim() == 1 else None
            weights[name] = weight.contiguous() if norm is None else self._norm(weight, norm)

    def _norm(self, weight: Tensor, name: str) -> Tensor:
        assert self._layout is not None
        offset, factor = self.family.norm_offset, self.factors[name]
        if name == FINAL and self.family.scaled_embeddings and self._layout.tied_embeddings:
            factor /= self.widened  # the head reads embeddings that have been widened
        return ((weight.float() + offset) * factor - offset).to(weight.dtype)


def fit(reduction: Reduction, by: str) -> None:
    """The output projection's weights W' of least |X W'^T - Y|, Y the original's output in the channels that stay, pulled towards what they
    are. Raises BadNumerics."""
    (linear,) = reduction.site.linears
    hessian, cross = reduction.site.statistics.hessian, reduction.cross
    if hessian is None or cross is None or not bool(hessian.any()):
        return
    for statistic in (hessian, cross):
        finite(statistic, reduction.site.name)
    weight = reduction.weights[linear.weight].float()
    work = dampened(hessian, linear.name)
    change = torch.cholesky_solve((cross - weight @ hessian).T, torch.linalg.cholesky(work)).T
    made = weight + change

    def error(candidate: Tensor) -> float:
        """|X W^T - Y|^2, less |Y|^2"""
        return float((candidate * (candidate @ hessian - 2 * cross)).sum(dtype=torch.float64))

    whole = reduction.wanted_square
    before, after = ((max(0.0, error(w) + whole) / whole) ** 0.5 if whole else 0.0 for w in (weight, made))
    reduction.weights[linear.weight] = made.to(reduction.weights[linear.weight].dtype)
    reduction.notes[linear.name] = {"by": by, "error": digits(after), "uncorrected": digits(before)}


def sum_of_squares(weight: Tensor) -> Tensor:
    """fp64 [columns]: over its rows."""
    return weight.float().square().sum(0, dtype=torch.float64)


def mean_of(parts: Iterable[Tensor]) -> Tensor:
    """fp64 [columns]: mean over the rows of all parts [n, columns] fp32."""
    total, count = None, 0
    for part in parts:
        sums = part.sum(0, dtype=torch.float64)
        total, count = sums if total is None else total + sums, count + len(part)
    assert total is not None
    return total / max(1, count)
