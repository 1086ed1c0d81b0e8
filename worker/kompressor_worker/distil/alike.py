"""The losses beside the logits': hidden states and attention outputs of pairs of layers that are to be alike.

Of a position: the mean square of the difference over the mean square of the teacher's. (Jiao et al. 2020, arXiv 1909.10351, and
Muralidharan et al. 2024, arXiv 2407.14679, take plain mean squares, which a few loud positions rule.) Where the student is narrower, a
learned projection widens its states; it is part of the training, not of what is published.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kompressor_worker.distil.model import Seen, Wanted
from kompressor_worker.errors import UserError
from kompressor_worker.passes.distil import DistilParams, LayerPairs

SMALLEST = 1e-6


def pairs_of(asked: LayerPairs | None, student: int, teacher: int, name: str) -> list[tuple[int, int]]:
    """(student's layer, teacher's), of models with so many. Raises UserError."""
    if asked is None:
        return []
    if asked.pairs is not None:
        for mine, theirs in asked.pairs:
            if mine >= student or theirs >= teacher:
                raise UserError(
                    f"distil.{name}: there is no pair [{mine}, {theirs}]: the student has layers 0 to {student - 1}, the teacher 0 to "
                    f"{teacher - 1}"
                )
        return [(mine, theirs) for mine, theirs in asked.pairs]
    count = min(asked.layers or student, student)
    mine_of = [(i + 1) * student // count - 1 for i in range(count)]
    return [(mine, (mine + 1) * teacher // student - 1) for mine in mine_of]


@dataclass(frozen=True)
class Alike:
    """Which layers are compared, and how much that counts."""

    blocks: list[tuple[int, int]]
    attentions: list[tuple[int, int]]
    block_weight: float
    attention_weight: float

    @classmethod
    def of(cls, params: DistilParams, student: int, teacher: int) -> Alike:
        """Of models with so many layers. Raises UserError."""
        blocks, attentions = params.hidden_states, params.attention_outputs
        return cls(
            pairs_of(blocks, student, teacher, "hiddenStates"),
            pairs_of(attentions, student, teacher, "attentionOutputs"),
            blocks.weight if blocks else 0.0,
            attentions.weight if attentions else 0.0,
        )

    def __bool__(self) -> bool:
        return bool(self.blocks or self.attentions)

    @property
    def of_student(self) -> Wanted:
        return Wanted(frozenset(mine for mine, _ in self.blocks), frozenset(mine for mine, _ in self.attentions))

    @property
    def of_teacher(self) -> Wanted:
        return Wanted(frozenset(theirs for _, theirs in self.blocks), frozenset(theirs for _, theirs in self.attentions))


class Projections(nn.Module):
    """What widens the student's states to the teacher's width: a matrix a pair, none where the widths are the same."""

    def __init__(self, alike: Alike, student: int, teacher: int, seed: int, device: torch.device) -> None:
        """Of models of these widths."""
        super().__init__()
        self.alike = alike
        drawn = torch.Generator().manual_seed(seed)

        def matrices(count: int) -> nn.ParameterList:
            made = [torch.randn(teacher, student, generator=drawn) * student**-0.5 for _ in range(count)]
            return nn.ParameterList(nn.Parameter(each.to(device)) for each in made if student != teacher)

        self.blocks, self.attentions = matrices(len(alike.blocks)), matrices(len(alike.attentions))

    def forward(self, student: Seen, teacher: Seen) -> Tensor:
        """The weighted sum over positions, each pair counted as one of their number; fp32 scalar."""
        total = student.hidden.new_zeros((), dtype=torch.float32)
        for pairs, matrices, mine, theirs, weight in (
            (self.alike.blocks, self.blocks, student.blocks, teacher.blocks, self.alike.block_weight),
            (self.alike.attentions, self.attentions, student.attentions, teacher.attentions, self.alike.attention_weight),
        ):
            for number, (layer, other) in enumerate(pairs):
                x, wanted = mine[layer].float(), theirs[other].float()
                if len(matrices):
                    x = x @ matrices[number].T
                error = (x - wanted).square().mean(-1) / wanted.square().mean(-1).clamp(min=SMALLEST)
                total = total + weight / len(pairs) * error.sum()
        return total
