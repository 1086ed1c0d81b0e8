"""The loss over the vocabulary: the textbook's formula under plain autograd, in chunks, and by every kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from ctypes import CDLL
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from kompressor_worker.kernels import compiled, token_divergence
from kompressor_worker.kernels.divergence import Divergence, TopK, distillation_loss, top_k_loss

KINDS = ("forward", "reverse", "jensenShannon")
N, VOCABULARY = 13, 301


def given(seed: int, dtype: torch.dtype = torch.float32, width: int = 24, teacher_width: int = 40) -> tuple[Tensor, ...]:
    """Hidden states and heads of student and teacher, targets of which some are none."""
    generator = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(size, generator=generator).to(dtype)
        for size in ((N, width), (VOCABULARY, width), (N, teacher_width), (VOCABULARY, teacher_width))
    ]
    targets = torch.randint(0, VOCABULARY, (N,), generator=generator)
    targets[::4] = -100
    made[1] *= 0.6
    made[3] *= 0.5
    return (*made, targets)


def logits_of(hidden: Tensor, head: Tensor, cap: float | None) -> Tensor:
    logits = hidden.double() @ head.double().T
    return logits if cap is None else torch.tanh(logits / cap) * cap


def textbook(log_p: Tensor, log_q: Tensor, kind: str) -> Tensor:
    """By torch's own functions, fp64."""
    if kind == "forward":
        return kl_div(log_q, log_p, log_target=True, reduction="sum")
    if kind == "reverse":
        return kl_div(log_p, log_q, log_target=True, reduction="sum")
    log_m = torch.log((log_p.exp() + log_q.exp()) / 2)
    return (kl_div(log_m, log_p, log_target=True, reduction="sum") + kl_div(log_m, log_q, log_target=True, reduction="sum")) / 2


def expected(student: Tensor, log_p: Tensor, log_q: Tensor, targets: Tensor, d: Divergence) -> Tensor:
    labels = cross_entropy(student, targets, ignore_index=-100, reduction="sum")
    return (1 - d.labels) * d.temperature**2 * textbook(log_p, log_q, d.kind) + d.labels * labels


def close(ours: Tensor, theirs: Tensor, precision: float) -> bool:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm()) < precision


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature,labels,cap", [(1.0, 0.0, None), (2.5, 0.3, None), (1.0, 0.3, 5.0), (0.7, 0.9, 3.0)])
def test_loss_and_gradients_are_the_textbooks(kind: Any, temperature: float, labels: float, cap: float | None) -> None:
    hidden, head, teacher_hidden, teacher_head, targets = given(1)
    d = Divergence(kind, temperature, labels)
    leaves = [hidden.double().requires_grad_(), head.double().requires_grad_()]
    student, teacher = logits_of(*leaves, cap), logits_of(teacher_hidden, teacher_head, 4.0)
    theirs = expected(student, log_softmax(teacher / temperature, 1), log_softmax(student / temperature, 1), targets, d)
    (theirs * 0.25).backward()
    ours = [hidden.requires_grad_(), head.requires_grad_()]
    scratch = 5 * 2 * 4 * VOCABULARY  # five tokens at a time, the last chunk of three
    loss = distillation_loss(*ours, teacher_hidden, teacher_head, targets, d, softcap=cap, teacher_softcap=4.0, scratch_bytes=scratch)
    (loss.total * 0.25).backward()
    assert loss.total.item() == pytest.approx(theirs.item(), rel=1e-5)
    for one, other in zip(ours, leaves, strict=True):
        assert one.grad is not None and other.grad is not None and close(one.grad, other.grad, 1e-5)
    same = (student.argmax(1) == teacher.argmax(1)).sum()
    assert loss.figures[2:].tolist() == [float(same), N, float((targets >= 0).sum())]
    assert float(loss.figures[1]) == pytest.approx(cross_entropy(student, targets, ignore_index=-100, reduction="sum").item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature,labels,cap", [(1.0, 0.0, None), (2.5, 0.3, 4.0)])
def test_top_k_is_the_textbooks_formula_over_bins(kind: Any, temperature: float, labels: float, cap: float | None) -> None:
    hidden, head, teacher_hidden, teacher_head, targets = given(2)
    d, k = Divergence(kind, temperature, labels), 7
    top = TopK.of(teacher_hidden, teacher_head, k, softcap=4.0, scratch_bytes=3 * 8 * VOCABULARY)
    p = logits_of(teacher_hidden, teacher_head, 4.0).softmax(1)
    most, indices = p.topk(k, 1)
    assert torch.equal(top.indices, indices.to(torch.int32))
    leaves = [hidden.double().requires_grad_(), head.double().requires_grad_()]
    student = logits_of(*leaves, cap)
    q = student.softmax(1)
    some = q.gather(1, indices)
    bins = [torch.cat([x, 1 - x.sum(1, keepdim=True)], 1).log() / temperature for x in (most, some)]
    theirs = expected(student, log_softmax(bins[0], 1), log_softmax(bins[1], 1), targets, d)
    theirs.backward()
    ours = [hidden.requires_grad_(), head.requires_grad_()]
    loss = top_k_loss(*ours, top, targets, d, softcap=cap, scratch_bytes=4 * 8 * VOCABULARY)
    loss.total.backward()
    assert loss.total.item() == pytest.approx(theirs.item(), rel=1e-5)
    for one, other in zip(ours, leaves, strict=True):
        assert one.grad is not None and other.grad is not None and close(one.grad, other.grad, 1e-5)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    hidden, head, _, _, targets = given(3)
    hidden.requires_grad_()
    for kind in KINDS:
        loss = distillation_loss(hidden, head, hidden, head, targets, Divergence(kind))  # type: ignore[arg-type]
        binned = top_k_loss(hidden, head, TopK.of(hidden, head, 9), targets, Divergence(kind))  # type: ignore[arg-type]
        for made in (loss, binned):
            assert abs(made.total.item()) < 1e-5 and float(made.figures[2]) == N
            (gradient,) = torch.autograd.grad(made.total, hidden)
            assert float(gradient.abs().max()) < 1e-5


def test_labels_alone_need_no_teacher_and_evaluation_makes_no_gradient() -> None:
    hidden, head, _, _, targets = given(4)
    hidden.requires_grad_()
    loss = distillation_loss(hidden, head, None, None, targets, Divergence(labels=1.0))
    assert loss.total.item() == pytest.approx(cross_entropy(hidden @ head.T, targets, reduction="sum").item(), rel=1e-5)
    loss.total.backward()
    (theirs,) = torch.autograd.grad(cross_entropy(hidden @ head.T, targets, reduction="sum"), hidden)
    assert hidden.grad is not None and close(hidden.grad, theirs, 1e-5) and head.grad is None
    with torch.no_grad():
        assert not distillation_loss(hidden, head, hidden, head, targets, Divergence()).total.requires_grad


def test_bins_far_apart_stay_finite() -> None:
    """A teacher that is sure, a student that is sure of something else: what is left for the rest is nothing in fp32."""
    head = torch.eye(VOCABULARY)
    hidden = (torch.nn.functional.one_hot(torch.arange(N), VOCABULARY) * 120.0).requires_grad_()
    teacher = torch.nn.functional.one_hot(torch.arange(N) + 1, VOCABULARY) * 120.0
    for kind in KINDS:
        for labels in (0.0, 0.5):
            d = Divergence(kind, labels=labels)  # type: ignore[arg-type]
            for loss in (
                distillation_loss(hidden, head, teacher, head, torch.arange(N), d),
                top_k_loss(hidden, head, TopK.of(teacher, head, 4), torch.arange(N), d),
            ):
                assert math.isfinite(loss.total.item()) and torch.autograd.grad(loss.total, hidden)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@settings(max_examples=40)
@drawn(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(1, 17), (5, 130), (9, 1024), (3, 2500)]),
    kind=st.sampled_from(KINDS),
    temperature=st.sampled_from([1.0, 0.6, 3.0]),
    labels=st.sampled_from([0.0, 0.4, 1.0]),
    cap=st.sampled_from([None, 9.0]),
    gradient=st.booleans(),
)
def test_compiled_equals_eager(
    lib: CDLL, dtype: torch.dtype, seed: int, shape: tuple[int, int], kind: str, temperature: float, labels: float, cap: float | None,
    gradient: bool,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    student, teacher = ((torch.randn(shape, generator=generator) * 4).to(dtype) for _ in range(2))
    targets = torch.randint(-1, shape[1], shape[:1], generator=generator)
    log_p = teacher.float().log_softmax(1)
    most, indices = log_p.topk(7, 1)
    some = indices.to(torch.int32), most.contiguous(), log_p.scatter(1, indices, -torch.inf).logsumexp(1), targets
    asked = kind, temperature, labels, cap
    for theirs in (teacher, None):
        whole = theirs, targets, *asked, 5.0
        same(partial(compiled.divergence, lib), token_divergence.divergence, student, *whole, gradient)
    same(partial(compiled.top_k_divergence, lib), token_divergence.top_k_divergence, student, *some, *asked, gradient)


def same(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], student: Tensor, *given: Any) -> None:
    """To rounding, in the figures and in the gradient, which stands where the logits were; these stay where none is wanted."""
    one, other = student.clone(), student.clone()
    assert torch.allclose(ours(one, *given), theirs(other, *given), rtol=1e-4, atol=1e-4)
    assert torch.allclose(one.float(), other.float(), rtol=1e-4 if student.dtype is torch.float32 else 1e-2, atol=3e-6)
    assert given[-1] or torch.equal(one, student)


def test_threads_change_nothing(lib: CDLL, threads: None) -> None:
    student, teacher, targets = torch.randn(40, 9000), torch.randn(40, 9000), torch.arange(40)
    made = []
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        one = student.clone()
        made.append((compiled.divergence(lib, one, teacher, targets, "jensenShannon", 2.0, 0.5, None, None, True), one))
    assert all(torch.equal(a, b) for pair in made[1:] for a, b in zip(made[0], pair, strict=True))
