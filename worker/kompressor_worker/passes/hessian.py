"""The Hessian of a layer's squared output error, made ready for GPTQ: dampened, ordered, inverted and factorised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kompressor_worker import kernels
from kompressor_worker.errors import BadNumerics
from kompressor_worker.kernels.pieces import Heard, unheard

ROWS = 512
ATTEMPTS = 4
"""Ten times the dampening each time; after these the Hessian is no sum of squares any more."""


@dataclass(frozen=True)
class Factor:
    """H^-1 = U^T U for one order of columns."""

    inverse: Tensor
    """fp32 [columns, columns]: U, upper triangular."""
    order: Tensor | None
    """int64 [columns]: the column that is processed first, second ...; None: as they lie."""
    dampening: float
    """Share of the mean diagonal that was added for the factorisation to work."""
    dead: int
    """Columns that no activation reached: they are rounded to nearest and touch no other."""

    @classmethod
    def of(cls, hessian: Tensor, dampening: float, ordered: bool, name: str, heard: Heard = unheard) -> Factor:
        """Of hessian [columns, columns] fp32, a sum over any number of rows, which is left as it is. `ordered`: largest diagonal first.
        `heard` is called between pieces, and may raise.

        Raises BadNumerics that names the site if no dampening up to 1000 times `dampening` makes it positive definite."""
        diagonal = hessian.diagonal()
        dead = diagonal <= 0
        order = torch.argsort(diagonal, descending=True, stable=True) if ordered else None
        mean = float(diagonal.sum() / (~dead).sum().clamp(min=1))
        share = dampening
        for attempt in range(ATTEMPTS):
            share = dampening * 10**attempt
            inverse = kernels.inverse_factor(_dampened(hessian, order, dead, mean, share), heard)
            if inverse is not None:
                return cls(inverse, order, share, int(dead.sum()))
        raise BadNumerics(
            f"{name}: the Hessian of its input is not positive definite even with dampening {share:g}; "
            "use more calibration samples, or look for NaN in the blocks before it"
        )

    @property
    def columns(self) -> Tensor:
        """int64 [columns], in the order of processing."""
        return torch.arange(len(self.inverse), device=self.inverse.device) if self.order is None else self.order

    def ordered(self, weight: Tensor) -> Tensor:
        return weight if self.order is None else weight[:, self.order]

    def as_they_lay(self, codes: Tensor) -> Tensor:
        """The inverse of `ordered`."""
        return codes if self.order is None else codes[:, torch.argsort(self.order)]


def _dampened(hessian: Tensor, order: Tensor | None, dead: Tensor, mean: float, share: float) -> Tensor:
    """A copy in this order of columns; `share` of the mean diagonal added, and the mean in place of what no activation reached."""
    if order is None:
        work = hessian.clone()
    else:
        work, dead = torch.empty_like(hessian), dead[order]
        for top in range(0, len(order), ROWS):  # a third matrix would be needed otherwise
            work[top : top + ROWS] = hessian[order[top : top + ROWS]].index_select(1, order)
    work.diagonal()[dead] = mean
    work.diagonal().add_(share * mean)
    return work
