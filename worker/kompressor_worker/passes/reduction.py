"""Input columns of a linear taken away, and the others made to stand in for them as far as they can: which go, and what then stays.

With H = X^T X of the linear's input the output error of removing columns P, the others corrected by least squares, is
tr(W_P (A_PP)^-1 W_P^T), A = H^-1: the optimal brain surgeon for groups of columns (Hassibi and Stork 1993; for structures of a transformer
Kurtic et al. 2023, arXiv 2302.04089). Groups go in rounds, those that cost least first, and after each round A and W are what is left of
them. Without a correction the error of removing P is tr(W_P H_PP W_P^T).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kompressor_worker.block import Reduction
from kompressor_worker.errors import BadNumerics
from kompressor_worker.layout import LinearLayout
from kompressor_worker.passes.encoding import finite, refuse_nonfinite

ROUNDS = 16
"""In which columns go, where there are more groups than that: two that say the same do not both look dispensable for long."""
DAMPENING = 0.01
"""Share of the Hessian's mean diagonal that is added to it."""
ATTEMPTS = 4


@dataclass(frozen=True)
class Reduced:
    kept: Tensor
    """int64, ascending: columns that stay."""
    weight: Tensor
    """fp32 [out, kept]"""
    error: float
    """Relative error of the output over the calibration rows: |X W^T - X_K W'^T| / |X W^T|."""
    uncorrected: float
    """The same without the correction."""


def remove(reduction: Reduction, by: str, group: int, keep: int, correct: bool) -> Tensor:
    """Reduces the linear that reads the site; returns the columns that stay, for whoever makes them. What no calibration row has reached is
    judged by its weights. Raises BadNumerics."""
    (linear,) = reduction.site.linears
    weight, hessian = reduction.weights[linear.weight], reduction.site.statistics.hessian
    refuse_nonfinite(linear, weight)
    reached = hessian is not None and bool(hessian.any())
    hessian = finite(hessian, reduction.site.name) if hessian is not None and reached else torch.eye(weight.shape[1], device=weight.device)
    made = reduce(weight.float(), hessian, group, keep, correct and reached, linear.name, reduction.heard)
    reduction.weights[linear.weight] = made.weight.to(weight.dtype)
    reduction.kept = made.kept
    note = {"kept": len(made.kept) // group, "of": weight.shape[1] // group, "error": digits(made.error)}
    note |= {"uncorrected": digits(made.uncorrected)} if correct and reached else {}
    reduction.notes[linear.name] = {"by": by, **note, **({} if reached else {"unreached": True})}
    return made.kept


def keep_rows(weights: dict[str, Tensor], linear: LinearLayout, parts: Sequence[Tensor]) -> None:
    """A linear's rows, int64 indices in pieces, and what it has of a bias."""
    rows = torch.cat(list(parts))
    for name in (linear.weight, f"{linear.name}.bias"):
        if name in weights:
            weights[name] = weights[name][rows]


def digits(value: float) -> float:
    return float(f"{value:.6g}")


def reduce(weight: Tensor, hessian: Tensor, group: int, keep: int, correct: bool, name: str, heard: Callable[[], None]) -> Reduced:
    """Keeps `keep` of the groups of `group` neighbouring columns of weight fp32 [out, in]; hessian fp32 [in, in].

    Raises BadNumerics that names the linear where the Hessian cannot be factorised. `heard` is called between rounds, and may raise."""
    assert weight.shape[1] == len(hessian) and len(hessian) % group == 0, (weight.shape, hessian.shape, group)
    if correct:
        work = dampened(hessian, name)
        groups = cheapest_when_corrected(weight, work, group, keep, heard)
    else:
        work = hessian
        groups = cheapest(weight, hessian, group, keep)
    kept = (groups[:, None] * group + torch.arange(group, device=weight.device)).flatten()
    plain = weight[:, kept]
    made = corrected(weight, work, kept) if correct else plain
    return Reduced(kept, made, relative_error(weight, made, hessian, kept), relative_error(weight, plain, hessian, kept))


def cheapest(weight: Tensor, hessian: Tensor, group: int, keep: int) -> Tensor:
    """int64 [keep], ascending: the groups whose removal alone would cost most."""
    count = len(hessian) // group
    inside = diagonal_blocks(hessian, group)
    columns = weight.view(-1, count, group).transpose(0, 1)  # [count, out, group]
    scores = torch.einsum("gor,grs,gos->g", columns, inside, columns)
    return scores.topk(keep).indices.sort().values


def cheapest_when_corrected(weight: Tensor, hessian: Tensor, group: int, keep: int, heard: Callable[[], None]) -> Tensor:
    """The same, round by round, each with what the rounds before have left."""
    count = len(hessian) // group
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    alive, left = torch.arange(count, device=weight.device), weight.clone()
    rounds = min(ROUNDS, count - keep)
    for number in range(rounds):
        heard()
        going = (len(alive) - keep) // (rounds - number)
        blocks = torch.linalg.inv(diagonal_blocks(inverse, group))
        columns = left.view(len(left), -1, group).transpose(0, 1)
        scores = torch.einsum("gor,grs,gos->g", columns, blocks, columns)
        gone = torch.zeros(len(alive), dtype=torch.bool, device=weight.device)
        gone[scores.topk(going, largest=False).indices] = True
        out = gone.repeat_interleave(group)
        stays = ~out
        solved = torch.linalg.solve(inverse[out][:, out], inverse[out][:, stays])
        left = left[:, stays] - left[:, out] @ solved
        inverse = inverse[stays][:, stays] - inverse[stays][:, out] @ solved
        alive = alive[~gone]
    return alive


def corrected(weight: Tensor, hessian: Tensor, kept: Tensor) -> Tensor:
    """fp32 [out, kept]: the least-squares weights W' of min |X W^T - X_K W'^T|: W H_:K H_KK^-1."""
    return torch.cholesky_solve((weight @ hessian[:, kept]).T, torch.linalg.cholesky(hessian[kept][:, kept])).T.contiguous()


def dampened(hessian: Tensor, name: str) -> Tensor:
    """A copy that can be factorised; columns that nothing reached get the mean, so that they cost what their weights say and touch no
    other. Raises BadNumerics."""
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal.sum() / (~dead).sum().clamp(min=1))
    for attempt in range(ATTEMPTS):
        work = hessian.clone()
        work.diagonal()[dead] = mean
        work.diagonal().add_(DAMPENING * 10**attempt * mean)
        if int(torch.linalg.cholesky_ex(work).info) == 0:
            return work
    raise BadNumerics(
        f"{name}: the Hessian of its input is not positive definite; use more calibration samples, or look for NaN in the blocks before it"
    )


def diagonal_blocks(matrix: Tensor, group: int) -> Tensor:
    """[n, group, group] of [n * group, n * group]."""
    count = len(matrix) // group
    at = torch.arange(count, device=matrix.device)
    return matrix.view(count, group, count, group)[at, :, at, :]


def relative_error(weight: Tensor, made: Tensor, hessian: Tensor, kept: Tensor) -> float:
    """|X W^T - X_K W'^T| / |X W^T|, of H = X^T X; fp32 products, fp64 sums."""
    difference = weight.clone()
    difference[:, kept] -= made
    whole = float(((weight @ hessian) * weight).sum(dtype=torch.float64))
    error = float(((difference @ hessian) * difference).sum(dtype=torch.float64))
    return (max(error, 0.0) / whole) ** 0.5 if whole > 0 else 0.0
