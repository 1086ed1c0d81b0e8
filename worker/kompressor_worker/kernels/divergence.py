"""The loss of a student over the vocabulary: never two whole matrices [tokens, vocabulary], and gradients made on the way.

Tokens go by chunks: logits of both models, `torch.ops.kompressor.divergence`, which puts the gradient in the place of the student's, and at
once the two products by which that reaches the hidden states and the head. So nothing of a chunk outlives it, forward and backward together
read the head twice and compute each logit once. What is kept for autograd's backward are the gradients themselves, which a scalar loss can
only scale (as Liger, arXiv:2410.10989, does for cross-entropy).

Products are in the dtype of the hidden states; the head is cast to it where it has another (fp32 master weights), its gradient is summed in
fp32 and comes in the head's own. Logits of bf16 products are fp32 on a GPU, and on a CPU where no gradient is wanted: an evaluation is not
to measure their rounding, which shows as more KL than W8A8 has. Training on a CPU has them in bf16, whose products are half as fast again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["forward", "reverse", "jensenShannon"]
CPU_SCRATCH_BYTES, CUDA_SCRATCH_BYTES = 128 << 20, 1 << 30
"""What a chunk's two matrices of logits may take: enough tokens that the products do not wait for the head, nor for its gradient."""
HEAD_ROWS = 8192
"""Of a head in bf16 that are fp32 at a time."""
FIGURES = ("divergence", "crossEntropy", "agreement", "tokens", "labels")


@dataclass(frozen=True)
class Divergence:
    """What a student is judged by; `token_divergence` has the formulas."""

    kind: Kind = "forward"
    temperature: float = 1.0
    """Both models' logits are divided by it before the divergence, which is multiplied by its square; cross-entropy knows none."""
    labels: float = 0.0
    """Share of the cross-entropy with the text itself, in [0, 1]; with 1 there need be no teacher."""

    def __post_init__(self) -> None:
        assert self.kind in ("forward", "reverse", "jensenShannon") and self.temperature > 0 and 0 <= self.labels <= 1, self


class Loss(NamedTuple):
    total: Tensor
    """fp32 scalar: the sum over the tokens; differentiable in the student's hidden states and head."""
    figures: Tensor
    """fp64 [5], detached, in the order of FIGURES: sums of the divergence (neither scaled nor weighed), of the cross-entropy, of the tokens
    where both models have the same most likely one; and how many tokens, and tokens with a target, there were."""


@dataclass(frozen=True)
class TopK:
    """Of a teacher's distributions the k most likely tokens, and what is left for all others."""

    indices: Tensor
    """int32 [n, k], the most likely first."""
    log_probabilities: Tensor
    """fp32 [n, k]: logits less their logsumexp."""
    rest: Tensor
    """fp32 [n]: log of the probability of all others together, summed from theirs."""

    def __len__(self) -> int:
        return len(self.rest)

    def __getitem__(self, at: slice) -> TopK:
        return TopK(self.indices[at], self.log_probabilities[at], self.rest[at])

    def to(self, device: torch.device) -> TopK:
        return TopK(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))

    @classmethod
    def cat(cls, parts: list[TopK]) -> TopK:
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    @classmethod
    @torch.no_grad()
    def of(cls, hidden: Tensor, head: Tensor, k: int, *, softcap: float | None = None, scratch_bytes: int | None = None) -> TopK:
        """Of hidden states [n, width] after the final norm and a head [vocabulary, width]; k < vocabulary."""
        assert 0 < k < len(head), (k, len(head))
        head, parts = head.to(hidden.dtype), []
        for at in _chunks(hidden, len(head), scratch_bytes):
            logits = logits_of(hidden[at], head, exact=True)
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            most, indices = logits.topk(k, dim=1)
            rest = logits.scatter_(1, indices, -torch.inf).logsumexp(1)
            whole = torch.logaddexp(most.logsumexp(1), rest)
            parts.append(cls(indices.to(torch.int32), most - whole[:, None], rest - whole))
        return cls.cat(parts)


def distillation_loss(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor | None, teacher_head: Tensor | None, targets: Tensor, divergence: Divergence,
    *, softcap: float | None = None, teacher_softcap: float | None = None, scratch_bytes: int | None = None,
) -> Loss:  # fmt: skip
    """Hidden states after the final norm [n, width] and head [vocabulary, width] of the student (bf16 or fp32) and of the teacher, whose
    width may be another; targets int64 [n], below 0 where there is none. Logits are `softcap * tanh(hidden head^T / softcap)`.

    Where `divergence.labels` is 1 the teacher may be None: the figures then have no divergence and no agreement."""
    assert (teacher_hidden is None) == (teacher_head is None) and (teacher_hidden is not None or divergence.labels == 1), divergence
    if teacher_hidden is not None and teacher_head is not None:
        assert len(teacher_hidden) == len(hidden) and len(teacher_head) == len(head), (teacher_hidden.shape, teacher_head.shape, head.shape)
        teacher_hidden, teacher_head = (made.detach().to(hidden.dtype) for made in (teacher_hidden, teacher_head))
    d = divergence

    def measure(at: slice, logits: Tensor, gradient: bool) -> Tensor:
        theirs = None
        if teacher_hidden is not None and teacher_head is not None:
            theirs = logits_of(teacher_hidden[at], teacher_head, exact=logits.dtype is torch.float32)
        given = logits, theirs, targets[at], d.kind, d.temperature, d.labels, softcap, teacher_softcap, gradient
        measured: Tensor = torch.ops.kompressor.divergence(*given)
        return measured

    return _loss(hidden, head, targets, d, measure, scratch_bytes)


def top_k_loss(
    hidden: Tensor, head: Tensor, teacher: TopK, targets: Tensor, divergence: Divergence,
    *, softcap: float | None = None, scratch_bytes: int | None = None,
) -> Loss:  # fmt: skip
    """The same from a teacher's k most likely tokens: k bins, and one for all the rest. At temperature 1 a lower bound of the whole
    divergence (data processing inequality), which is 0 for a student that equals the teacher; other temperatures apply to the bins."""
    assert len(teacher) == len(hidden), (len(teacher), len(hidden))
    d = divergence

    def measure(at: slice, logits: Tensor, gradient: bool) -> Tensor:
        part = teacher[at]
        given = part.indices, part.log_probabilities, part.rest, targets[at], d.kind, d.temperature, d.labels, softcap, gradient
        measured: Tensor = torch.ops.kompressor.top_k_divergence(logits, *given)
        return measured

    return _loss(hidden, head, targets, d, measure, scratch_bytes)


Measure = Callable[[slice, Tensor, bool], Tensor]
"""Tokens, the student's logits of them, whether these are to become the gradient -> fp64 [tokens, 3] as `token_divergence.divergence`."""


def _loss(hidden: Tensor, head: Tensor, targets: Tensor, d: Divergence, measure: Measure, scratch_bytes: int | None) -> Loss:
    assert hidden.dim() == 2 and hidden.shape[1] == head.shape[1] and targets.shape == hidden.shape[:1], (hidden.shape, head.shape)
    wanted = torch.is_grad_enabled() and hidden.requires_grad, torch.is_grad_enabled() and head.requires_grad
    total, figures = _InChunks.apply(hidden, head, targets, d, measure, wanted, scratch_bytes)  # type: ignore[no-untyped-call]
    return Loss(total, figures)


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, d: Divergence, measure: Measure, wanted: tuple[bool, bool],
        scratch_bytes: int | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        weight = head.to(hidden.dtype)
        by_hidden = torch.empty_like(hidden) if wanted[0] else None
        by_head = torch.zeros_like(head, dtype=torch.float32) if wanted[1] else None
        sums = torch.zeros(3, dtype=torch.float64, device=hidden.device)
        for at in _chunks(hidden, len(head), scratch_bytes):
            logits = logits_of(hidden[at], weight, exact=not any(wanted))
            sums += measure(at, logits, any(wanted)).sum(0)
            logits = logits.to(hidden.dtype) if any(wanted) else logits
            if by_hidden is not None:
                torch.mm(logits, weight, out=by_hidden[at])
            if by_head is not None:
                _add_product(by_head, logits, hidden[at])
        labels = (targets >= 0).sum()
        figures = torch.cat([sums, torch.stack([torch.full_like(labels, len(targets)), labels]).double()])
        ctx.save_for_backward(by_hidden, None if by_head is None else by_head.to(head.dtype))
        ctx.mark_non_differentiable(figures)
        return ((1 - d.labels) * d.temperature**2 * sums[0] + d.labels * sums[1]).float(), figures

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Once: the gradients are scaled where they lie."""
        by_hidden, by_head = (None if made is None else made.mul_(scale) for made in ctx.saved_tensors)
        return by_hidden, by_head, None, None, None, None, None


def _chunks(hidden: Tensor, vocabulary: int, scratch_bytes: int | None) -> list[slice]:
    allowed = scratch_bytes or (CUDA_SCRATCH_BYTES if hidden.is_cuda else CPU_SCRATCH_BYTES)
    size = max(1, allowed // (2 * vocabulary * (4 if hidden.is_cuda else hidden.element_size())))
    return [slice(start, min(start + size, len(hidden))) for start in range(0, max(1, len(hidden)), size)]


def logits_of(hidden: Tensor, head: Tensor, exact: bool) -> Tensor:
    """hidden [n, width] head^T [vocabulary, width], both of one dtype, in fp32 or in that. On a CPU `exact` ones of bf16 cost more."""
    if hidden.dtype is torch.float32:
        return hidden @ head.T
    if hidden.is_cuda:
        return torch.mm(hidden, head.T, out_dtype=torch.float32)
    if not exact:
        return hidden @ head.T
    logits, wide = torch.empty(len(hidden), len(head)), hidden.float()
    products: Any = torch.backends.mkldnn  # its types leave out matmul
    before = products.matmul.fp32_precision
    products.matmul.fp32_precision = "bf16"  # what the operands are already: only the sums, and so the logits, are wider
    try:
        for start in range(0, len(head), HEAD_ROWS):
            part = head[start : start + HEAD_ROWS].float()
            logits[:, start : start + HEAD_ROWS] = wide @ part.T
    finally:
        products.matmul.fp32_precision = before
    return logits


def _add_product(sums: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """sums [vocabulary, width] fp32 += gradient [n, vocabulary]^T hidden [n, width]."""
    if hidden.dtype is torch.float32:
        sums.addmm_(gradient.T, hidden)
    else:
        sums += gradient.T @ hidden
