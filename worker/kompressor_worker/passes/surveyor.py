"""What a pass measures of the whole source before the stream begins, where one block cannot decide by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kompressor_worker.batch import Batch
    from kompressor_worker.block import Site
    from kompressor_worker.layout import ModelLayout
    from kompressor_worker.schemes import Scheme
    from kompressor_worker.statistics import Statistic

SAMPLE = 512
"""Tokens of a mixture that all its experts are compared on."""


@dataclass(frozen=True)
class Surveyed:
    """The source, and the calibration rows that flow through it."""

    device: torch.device
    vocabulary: int
    softcap: float | None
    """Of the logits."""
    norm: Callable[[Tensor, Tensor], Tensor]
    """Hidden states behind a norm with this weight as stored, in their dtype."""
    batches: Sequence[Batch]
    """Their `state["hidden"]` is the input of the block that comes next."""
    tokens: Sequence[Tensor]
    """int64 [rows, length] a batch."""


class Forward(Protocol):
    def __call__(self, rows: Sequence[Batch], model: ModelLayout | None = None, schemes: Mapping[str, Scheme] | None = None) -> None:
        """`model`: by whose config.json and dtype, where these are not the source's: windows, positions, fp32. `schemes`: of linears whose
        inputs are rounded as they go by them."""
        ...


@dataclass(frozen=True)
class SeenBlock:
    """A block of the source after the calibration rows have gone through it."""

    layer: int
    prefix: str
    """Of its tensors' names, with the dot."""
    weights: dict[str, Tensor]
    """By full name, model dtype: all of its tensors for surveyors of whole blocks, otherwise the norms', and a router's."""
    sites: tuple[Site, ...]
    """Its inputs, with the statistics that surveyors have asked for."""
    before: Sequence[Tensor]
    """Hidden states [rows, length, hidden] a batch: at its input,"""
    middle: Sequence[Tensor]
    """between attention and feed-forward,"""
    after: Sequence[Tensor]
    """at its output."""
    valid: Sequence[Tensor | None]
    """bool [rows, length] a batch: positions that count; None: all."""
    forward: Forward
    """Takes other rows through it; for surveyors of whole blocks."""

    def positions(self, hidden: Sequence[Tensor], batch: int) -> Tensor:
        """fp32 [n, hidden]: those of one batch that count."""
        valid = self.valid[batch]
        return (hidden[batch].flatten(0, 1) if valid is None else hidden[batch][valid]).float()

    def tried(self, batches: Sequence[Batch], weights: Mapping[str, Tensor], schemes: Mapping[str, Scheme] | None = None) -> list[Batch]:
        """Copies of these batches, which are among the first, at its output, with these weights in place of its own. `schemes`: of linears
        whose inputs are rounded as they go by them."""
        from kompressor_worker.batch import Batch

        rows = [Batch(b.lengths, {"hidden": h}, b.excluded) for b, h in zip(batches, self.before, strict=False)]
        self.with_weights(rows, weights, schemes)
        return rows

    def with_weights(self, rows: Sequence[Batch], weights: Mapping[str, Tensor], schemes: Mapping[str, Scheme] | None = None) -> None:
        """Takes rows through it with these weights in place of its own; `schemes` as of `tried`."""
        kept = {name: self.weights[name] for name in weights}
        self.weights.update(weights)
        self.forward(rows, schemes=schemes)
        self.weights.update(kept)

    def change(self, rows: Sequence[Batch]) -> float:
        """Of rows that were `tried`: mean over positions of |h' - h|^2 / |h|^2, h at its output; NaN where no position counts."""
        total, count = 0.0, 0
        for number in range(len(rows)):
            changed, hidden = self.positions([b.state["hidden"] for b in rows], number), self.positions(self.after, number)
            shares = (changed - hidden).square().sum(-1) / hidden.square().sum(-1).clamp(min=1e-30)
            total, count = total + float(shares.double().sum()), count + len(shares)
        return total / count if count else float("nan")

    def energies(self, hidden: Sequence[Tensor]) -> Iterator[Tensor]:
        """fp32 [n, hidden] a batch: squares over their mean in the same position, as a norm that gets `hidden` sees them."""
        for batch in range(len(hidden)):
            squares = self.positions(hidden, batch).square()
            yield squares / squares.mean(-1, keepdim=True).clamp(min=1e-30)

    def added(self, before: Sequence[Tensor], after: Sequence[Tensor], norm: Tensor) -> Iterator[Tensor]:
        """The same of what was added between the two, where a norm with this weight is behind it: its output, the weight taken off."""
        scale = norm.where(norm.abs() > 1e-6, norm.new_full((), float("inf")))
        for batch in range(len(before)):
            yield ((self.positions(after, batch) - self.positions(before, batch)) / scale).square()


@dataclass(frozen=True)
class Routed:
    """The tokens of one batch that go to one expert."""

    inputs: Tensor
    """[n, hidden], model dtype: what the expert gets."""
    gates: Tensor
    """fp32 [n]: what the model multiplies its outputs by."""
    outputs: Tensor
    """fp32 [n, hidden], before the gate."""
    batch: int
    """Its number."""
    positions: Tensor
    """int64 [n]: which of the batch's rows * length positions they are."""


@dataclass(frozen=True)
class SeenExpert:
    """One expert of a mixture, while the calibration rows go through its block of the source."""

    layer: int
    """Of its block, counted from 0."""
    number: int
    experts: int
    """How many the mixture has."""
    weights: dict[str, Tensor]
    """Its own, by full name, model dtype."""
    routed: Sequence[Routed]
    """By batch; without those of which no token goes to it."""
    sample: Tensor
    """[s, hidden], model dtype: inputs of up to SAMPLE of the mixture's tokens, spread over all rows; the same for all its experts."""
    sample_outputs: Tensor
    """fp32 [s, hidden]: what it would say to these, routed to it or not, before the gate."""
    products: Callable[[Tensor], Tensor]
    """[n, columns], model dtype: what its down projection gets for inputs [n, hidden]."""
    says: Callable[[Tensor, Mapping[str, Tensor], Mapping[str, Scheme]], Tensor]
    """fp32 [n, hidden]: what it would say to inputs [n, hidden] with these weights in place of its own, its inputs rounded as these schemes
    do it, by linear."""

    @property
    def tokens(self) -> int:
        """Of the calibration data, how many go to it."""
        return sum(len(part.gates) for part in self.routed)


class Surveyor:
    """Base. All that it gathers is in `tensors`, which are saved and restored with the rows, so that a survey goes on where it stopped."""

    statistics: frozenset[Statistic] = frozenset()
    """What it wants measured at every input of linears."""
    reads_head: bool = False
    """Whether it wants the head's rows."""
    whole_block: bool = True
    """Whether it wants all weights of a block at once, or to take other rows through it; a mixture is in memory whole then."""
    measures_experts: bool = True
    """Whether that goes for the inputs of routed experts too."""
    wants_experts: bool = False
    """Whether it wants to see each expert of a mixture by itself."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    @property
    def resting(self) -> bool:
        """Whether `tensors` say all that there is to say: a survey is saved only then."""
        return True

    def begin(self, model: Surveyed) -> None:
        """Before the first unit, and after a restart."""

    def expert(self, seen: SeenExpert) -> None:
        """Each expert of a block, before the block itself, in any order; only where `wants_experts`. Raises BadNumerics."""

    def part(self, weights: Mapping[str, Tensor]) -> None:
        """The weights of each part of a block (parts.py), by full name, once the rows have gone through it."""

    def block(self, seen: SeenBlock) -> None:
        """After each block, in order. Raises BadNumerics."""

    def head(self, first: int, rows: Tensor, norm: Tensor) -> None:
        """Rows [v, hidden] of the head from token id `first`, and the final norm's weight as stored."""

    def found(self) -> dict[str, Tensor]:
        """What the pass decides by (`Pass.decide`)."""
        return self.tensors
