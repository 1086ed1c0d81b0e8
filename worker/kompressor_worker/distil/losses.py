"""What a student's forward is judged by: the teacher's logits, the text itself, and states of layers that are to be alike."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kompressor_worker.distil.alike import Alike, Projections
from kompressor_worker.distil.lesson import Lesson
from kompressor_worker.distil.loading import build
from kompressor_worker.distil.model import Seen, TrainedModel, Wanted, computing_dtype
from kompressor_worker.distil.order import Micro
from kompressor_worker.distil.together import Together
from kompressor_worker.kernels.divergence import Divergence, distillation_loss
from kompressor_worker.tensors import DTYPES


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
    teacher: TrainedModel
    divergence: Divergence
    alike: Alike

    @classmethod
    def of(cls, lesson: Lesson, together: Together, student: TrainedModel, alike: Alike) -> Losses:
        """Reads the teacher."""
        asked, layout = lesson.params.divergence, lesson.teacher.layout
        shard = together.shard(computing_dtype(DTYPES[layout.dtype], together.device), trained=False)
        teacher = build(lesson.teacher, together.device, False, lesson.work.limits, shard)
        shard(teacher)
        return cls(student, teacher, Divergence(asked.kind, asked.temperature, asked.labels), alike)

    def __call__(self, micro: Micro) -> tuple[Tensor, Measured]:
        """The sum over the tokens, for a backward, and what there is to say of them."""
        taught = bool(self.alike) or self.divergence.labels < 1
        return self._compared(micro, self.divergence, self.alike, grad=True) if taught else self._untaught(micro)

    def compare(self, micro: Micro) -> Measured:
        """By the plain divergence, for an evaluation."""
        return self._compared(micro, Divergence(), None, grad=False)[1]

    def _compared(self, micro: Micro, divergence: Divergence, alike: Alike | None, grad: bool) -> tuple[Tensor, Measured]:
        of_student, of_teacher = (alike.of_student, alike.of_teacher) if alike else (Wanted(), Wanted())

        def meet(theirs: Seen) -> tuple[Tensor, Measured]:
            def judge(mine: Seen) -> tuple[Tensor, Measured]:
                return self._judge(mine, theirs, micro.targets, divergence, bool(alike))

            with torch.set_grad_enabled(grad):
                made: tuple[Tensor, Measured] = self.student(micro.tokens, micro.lengths, micro.at, of_student, judge)
            return made

        with torch.no_grad():  # the student's forward is within the teacher's, whose head is whole as long
            made: tuple[Tensor, Measured] = self.teacher(micro.tokens, micro.lengths, micro.at, of_teacher, meet)
        return made

    def _untaught(self, micro: Micro) -> tuple[Tensor, Measured]:
        def judge(mine: Seen) -> tuple[Tensor, Measured]:
            return self._judge(mine, None, micro.targets, self.divergence, False)

        made: tuple[Tensor, Measured] = self.student(micro.tokens, micro.lengths, micro.at, Wanted(), judge)
        return made

    def _judge(self, mine: Seen, theirs: Seen | None, targets: Tensor, divergence: Divergence, alike: bool) -> tuple[Tensor, Measured]:
        hidden, head = (None, None) if theirs is None else (theirs.hidden, theirs.head)
        mine_cap, their_cap = self.student.decoder.final_softcap, self.teacher.decoder.final_softcap
        given = mine.hidden, mine.head, hidden, head, targets, divergence
        loss = distillation_loss(*given, softcap=mine_cap, teacher_softcap=their_cap)
        total = loss.total
        if alike and theirs is not None:
            assert isinstance(self.student.alike, Projections)
            total = total + self.student.alike(mine, theirs)
        diverged, entropy, agreement, tokens, _ = loss.figures.tolist()
        return total, Measured(float(total.detach()), diverged, entropy, agreement, tokens)
