"""What a student's forward is judged by: the teacher's logits, the text itself, and states of layers that are to be alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from kompressor_worker.distil.alike import Alike, Projections
from kompressor_worker.distil.lesson import Lesson
from kompressor_worker.distil.model import Seen, TrainedModel, Wanted
from kompressor_worker.distil.order import Micro
from kompressor_worker.distil.teaching import Written
from kompressor_worker.kernels.divergence import Divergence, Loss, distillation_loss, top_k_loss

NOTHING = Wanted()


@dataclass(frozen=True)
class Measured:
    """Sums over tokens."""

    loss: float = 0.0
    divergence: float = 0.0
    cross_entropy: float = 0.0
    agreement: float = 0.0
    """Tokens where student and teacher find the same next one likeliest."""
    tokens: float = 0.0

    def values(self) -> list[float]:
        return [getattr(self, field.name) for field in fields(self)]

    def __add__(self, other: Measured) -> Measured:
        return Measured(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))


@dataclass
class Losses:
    student: TrainedModel
    teacher: TrainedModel | Written
    divergence: Divergence
    alike: Alike

    @classmethod
    def of(cls, lesson: Lesson, student: TrainedModel, teacher: TrainedModel | Written, alike: Alike) -> Losses:
        asked = lesson.params.divergence
        return cls(student, teacher, Divergence(asked.kind, asked.temperature, asked.labels), alike)

    def __call__(self, micro: Micro) -> tuple[Tensor, Measured]:
        """The sum over the tokens, for a backward, and what there is to say of them."""
        if not self.alike and self.divergence.labels == 1:
            return self._student(micro, partial(self._untaught, micro.targets))
        return self._compared(micro, self.divergence, self.alike, 0, grad=True)

    def compare(self, micro: Micro, offset: int = 0) -> Measured:
        """By the plain divergence, for an evaluation. `offset`: what its rows are numbered from, among all that a teacher has seen."""
        return self._compared(micro, Divergence(), None, offset, grad=False)[1]

    def _compared(self, micro: Micro, divergence: Divergence, alike: Alike | None, offset: int, grad: bool) -> tuple[Tensor, Measured]:
        if isinstance(self.teacher, Written):
            said = self.teacher.of(micro, offset)
            cap = self.student.decoder.final_softcap

            def recall(mine: Seen) -> tuple[Tensor, Measured]:
                return self._measured(top_k_loss(mine.hidden, mine.head, said, micro.targets, divergence, softcap=cap))

            with torch.set_grad_enabled(grad):
                return self._student(micro, recall)
        of_student, of_teacher = (alike.of_student, alike.of_teacher) if alike else (Wanted(), Wanted())

        def meet(theirs: Seen) -> tuple[Tensor, Measured]:
            def judge(mine: Seen) -> tuple[Tensor, Measured]:
                return self._judge(mine, theirs, micro.targets, divergence, bool(alike))

            with torch.set_grad_enabled(grad):
                return self._student(micro, judge, of_student)

        with torch.no_grad():  # the student's forward is within the teacher's, whose head is whole as long
            made: tuple[Tensor, Measured] = self.teacher(micro.tokens, micro.lengths, micro.at, of_teacher, meet)
        return made

    def _student(self, micro: Micro, then: Callable[[Seen], tuple[Tensor, Measured]], wanted: Wanted = NOTHING) -> tuple[Tensor, Measured]:
        made: tuple[Tensor, Measured] = self.student(micro.tokens, micro.lengths, micro.at, wanted, then)
        return made

    def _untaught(self, targets: Tensor, mine: Seen) -> tuple[Tensor, Measured]:
        cap = self.student.decoder.final_softcap
        return self._measured(distillation_loss(mine.hidden, mine.head, None, None, targets, self.divergence, softcap=cap))

    def _judge(self, mine: Seen, theirs: Seen, targets: Tensor, divergence: Divergence, alike: bool) -> tuple[Tensor, Measured]:
        assert isinstance(self.teacher, TrainedModel)
        mine_cap, their_cap = self.student.decoder.final_softcap, self.teacher.decoder.final_softcap
        given = mine.hidden, mine.head, theirs.hidden, theirs.head, targets, divergence
        loss = distillation_loss(*given, softcap=mine_cap, teacher_softcap=their_cap)
        if not alike:
            return self._measured(loss)
        assert isinstance(self.student.alike, Projections)
        return self._measured(Loss(loss.total + self.student.alike(mine, theirs), loss.figures))

    @staticmethod
    def _measured(loss: Loss) -> tuple[Tensor, Measured]:
        diverged, entropy, agreement, tokens, _ = loss.figures.tolist()
        return loss.total, Measured(float(loss.total.detach()), diverged, entropy, agreement, tokens)
