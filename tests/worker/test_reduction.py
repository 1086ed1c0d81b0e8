"""Which columns of a linear go and what the others become, beside least squares written out."""

from __future__ import annotations

import torch
from torch import Tensor

from kompressor_worker.passes import reduction
from kompressor_worker.passes.reduction import cheapest, reduce

ROWS, OUT, COUNT, GROUP = 400, 24, 12, 4


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs X [rows, columns] that depend on each other, a weight, and X^T X. Rows for the dampening are among them, as if measured."""
    chance = torch.Generator().manual_seed(seed)
    mixed = torch.randn(COUNT * GROUP, COUNT * GROUP, generator=chance) + 2 * torch.eye(COUNT * GROUP)
    x = torch.randn(ROWS, COUNT * GROUP, generator=chance) @ mixed
    weight = torch.randn(OUT, COUNT * GROUP, generator=chance)
    pull = (reduction.DAMPENING * (x.T @ x).diagonal().mean()).sqrt()
    return torch.cat([x, pull * torch.eye(COUNT * GROUP)]), weight, x.T @ x


def columns(groups: Tensor) -> Tensor:
    return (groups[:, None] * GROUP + torch.arange(GROUP)).flatten()


def loss(x: Tensor, weight: Tensor, kept: Tensor) -> float:
    """Least |X W^T - X_K W'^T|^2 over all W', by a solver that knows no Hessian."""
    wanted = x.double() @ weight.double().T
    there = x[:, kept].double()
    made = torch.linalg.lstsq(there, wanted).solution
    return float((wanted - there @ made).square().sum())


def test_the_first_to_go_is_the_one_whose_loss_the_others_make_good_best() -> None:
    for seed in range(5):
        x, weight, hessian = problem(seed)
        every = [torch.tensor([g for g in range(COUNT) if g != gone]) for gone in range(COUNT)]
        best = min(every, key=lambda groups: loss(x, weight, columns(groups)))
        made = reduce(weight, hessian, GROUP, COUNT - 1, True, "w", lambda: None)
        assert made.kept.tolist() == columns(best).tolist()
        assert made.kept.tolist() != columns(cheapest(weight, hessian, GROUP, COUNT - 1)).tolist() or seed, "nothing to correct for"


def test_what_stays_is_least_squares_and_the_errors_told_are_those_of_the_outputs() -> None:
    dampened, weight, hessian = problem(9)
    x, made = dampened[:ROWS], reduce(weight, hessian, GROUP, 8, True, "w", lambda: None)
    wanted = x @ weight.T
    error = float((wanted - x[:, made.kept] @ made.weight.T).norm() / wanted.norm())
    plain = float((wanted - x[:, made.kept] @ weight[:, made.kept].T).norm() / wanted.norm())
    assert abs(made.error - error) < 1e-3 and abs(made.uncorrected - plain) < 1e-3
    least = (loss(x, weight, made.kept) ** 0.5) / float(wanted.norm())
    assert least <= error < 1.02 * least + 1e-3 < plain  # what the dampening costs


def test_of_two_that_say_the_same_one_stays() -> None:
    """Each column but a few has a twin: one of each pair goes, not both of those that matter least."""
    chance = torch.Generator().manual_seed(0)
    half = torch.randn(300, 12, generator=chance)
    x = torch.cat([half, half + 0.01 * torch.randn(300, 12, generator=chance)], dim=1)
    made = reduce(torch.randn(16, 24, generator=chance), x.T @ x, 1, 12, True, "w", lambda: None)
    assert sorted(k % 12 for k in made.kept.tolist()) == list(range(12))
    assert made.error < 0.05 < made.uncorrected
    assert reduction.ROUNDS >= 12, "or the pairs would have to go together"
