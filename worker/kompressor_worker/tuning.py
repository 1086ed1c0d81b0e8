"""What is learned of one block: weights that are published as they are, and of encoded ones the side to which each is rounded, and scales.

Plain weights follow Adam (Kingma and Ba 2014, arXiv 1412.6980), each tensor's rate a share of its root mean square, so that one rate suits
norms and matrices of any scale. On a grid only signs of gradients count (AutoRound, Cheng et al. 2023, arXiv 2309.05516): a weight moves
within a step of where it began, half to each side, so it ends on its own code or on a neighbour.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kompressor_worker.block import Encoded, Pruned
from kompressor_worker.block_work import PartWork
from kompressor_worker.formats.gguf_types import type_of
from kompressor_worker.layout import LinearLayout
from kompressor_worker.schemes import Scheme
from kompressor_worker.straight_through import Learning, fake_of

BETAS = (0.9, 0.95)
TINY = 1e-8
LEAST_SIZE = 1e-3
"""What stands for the root mean square of a tensor that has less, such as a bias of zeros."""
REACH = 0.5
"""How far a weight may go on its grid, in steps, and by what share a step may change."""

Rates = tuple[float, float]
"""Of plain weights, and on grids."""


class Plain:
    """A tensor that is published in the model's dtype; learned in fp32."""

    def __init__(self, weight: Tensor, mask: Tensor | None) -> None:
        """`mask`: bool, where it is not pruned; None: everywhere."""
        self.dtype, self.mask = weight.dtype, mask
        self.value = weight.float().clone().requires_grad_()
        self._size = max(float(weight.float().square().mean().sqrt()), LEAST_SIZE)
        self._first, self._second = torch.zeros_like(self.value), torch.zeros_like(self.value)
        self._taken = 0

    def move(self, rates: Rates) -> None:
        gradient, (first, second) = self.value.grad, BETAS
        if gradient is None:  # an expert that no row has reached
            return
        if self.mask is not None:
            gradient = gradient * self.mask
        self._taken += 1
        self._first.lerp_(gradient, 1 - first)
        self._second.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        spread = (self._second / (1 - second**self._taken)).sqrt_().add_(TINY)
        self.value.data.addcdiv_(self._first, spread, value=-rates[0] * self._size / (1 - first**self._taken))
        self.value.grad = None

    def published(self) -> Tensor:
        return self.value.detach().to(self.dtype)


class OnGrid:
    """A weight that is encoded: where it stands on its grid, and the grid's steps."""

    def __init__(self, linear: LinearLayout, weight: Tensor, scheme: Scheme, encoded: Encoded) -> None:
        """`weight` [out, in]: the one that `encoded` stands for."""
        self.stands_for, self.saturated = weight, encoded.saturated
        self.fake = fake_of(linear, scheme, encoded.tensors, weight.device)
        self._mask = weight != 0 if linear.pruned is not None else None
        self._began, self._unit = self.fake.begins(weight, encoded.tensors)
        self.value = self._began.clone().requires_grad_()

    def move(self, rates: Rates) -> None:
        gradient, rate, stretch = self.value.grad, rates[1], self.fake.stretch
        if gradient is None:
            return
        direction = gradient.sign() if self._mask is None else gradient.sign() * self._mask
        self.value.data.addcmul_(direction, self._unit, value=-rate)
        torch.clamp(self.value.data, self._began - REACH * self._unit, self._began + REACH * self._unit, out=self.value.data)
        if stretch is not None and stretch.grad is not None:
            stretch.data.sub_(rate * stretch.grad.sign()).clamp_(-REACH, REACH)
            stretch.grad = None
        self.value.grad = None

    def state(self) -> tuple[Tensor, Tensor | None]:
        return self.value.detach().clone(), None if self.fake.stretch is None else self.fake.stretch.detach().clone()

    def encoded(self, state: tuple[Tensor, Tensor | None]) -> Encoded:
        """Raises BadNumerics."""
        value, stretch = state
        if stretch is not None and self.fake.stretch is not None:
            self.fake.stretch.data.copy_(stretch)
        return self.fake.encode(value, self.stands_for)


def in_halves(scheme: Scheme) -> bool:
    """Whether values are stored as they are, in a type of a GGUF file: such weights are learned like all that are not encoded."""
    return scheme.format == "gguf" and not type_of(scheme).levels


@dataclass(frozen=True)
class Best:
    """What was learned when the error was least."""

    plain: dict[str, Tensor]
    on_grid: dict[str, tuple[Tensor, Tensor | None]]


class Learned:
    """All of one block."""

    def __init__(self, part: PartWork, linears: Sequence[LinearLayout], exact: Collection[str], dtype: torch.dtype) -> None:
        """`exact`: names of tensors that stay as they are; `dtype`: what products are computed in."""
        self._part, self._linears, self._dtype = part, {x.name: x for x in linears}, dtype
        self.on_grid = {
            name: OnGrid(self._linears[name], part.weights[f"{name}.weight"], part.schemes[name], encoded)
            for name, encoded in part.encoded.items()
            if not in_halves(part.schemes[name])
        }
        self._in_halves = {
            name: fake_of(self._linears[name], part.schemes[name], encoded.tensors)
            for name, encoded in part.encoded.items()
            if name not in self.on_grid
        }
        encoded = {f"{name}.weight" for name in self.on_grid}
        pruned = {x.weight for x in linears if x.pruned is not None}
        self.plain = {
            name: Plain(weight, weight != 0 if name in pruned else None)
            for name, weight in part.weights.items()
            if name not in encoded and name not in exact and weight.is_floating_point()
        }
        self._exact = {name: weight for name, weight in part.weights.items() if name not in encoded and name not in self.plain}

    def linear(self, as_published: bool) -> Learning:
        """For a forward, and its weights with it: as they are learned, or as they would be published now."""
        weights = dict(self._exact)
        weights |= {name: plain.published() if as_published else plain.value for name, plain in self.plain.items()}
        weights |= {f"{name}.weight": held.value for name, held in self.on_grid.items()}
        return Learning(weights, {name: held.fake for name, held in self.on_grid.items()}, self._dtype)

    def move(self, rates: Rates) -> None:
        for plain in self.plain.values():
            plain.move(rates)
        for held in self.on_grid.values():
            held.move(rates)

    def state(self) -> Best:
        return Best({name: p.published() for name, p in self.plain.items()}, {name: held.state() for name, held in self.on_grid.items()})

    def put(self, best: Best, before: Mapping[str, Tensor]) -> None:
        """Into the part. `before`: weights of pruned linears as they were then. Raises BadNumerics."""
        self._part.weights |= best.plain
        self._part.encoded |= {name: self.on_grid[name].encoded(state) for name, state in best.on_grid.items()}
        for name, fake in self._in_halves.items():
            self._part.encoded[name] = fake.encode(best.plain[f"{name}.weight"])
        for name, pruned in self._part.pruned.items():
            weight = self._linears[name].weight
            if weight in best.plain and weight in before:
                error = float((best.plain[weight].float() - before[weight].float()).square().sum(dtype=torch.float64))
                zeros = int((best.plain[weight] == 0).sum())
                self._part.pruned[name] = Pruned(zeros, error, pruned.squared_norm)
