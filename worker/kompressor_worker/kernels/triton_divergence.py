"""Divergence of a student's tokens from its teacher's in Triton: a token a program, which goes over its row of logits three or four times,
after the first from the L2 cache, and leaves the gradient in place of the student's.

bf16 moves 6 bytes a logit from and to memory at least, for about 80 operations, two to four exponentials among them: bound by memory on
GPUs with more than some 15 operations a byte to spend, which all have. Sums are fp32 in CHUNK lanes side by side.
"""
# mypy: disable-error-code="import-untyped,import-not-found,untyped-decorator,no-untyped-def,no-untyped-call,misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kompressor_worker.kernels.token_divergence import BETWEEN, capped

CHUNK = 4096
NOWHERE = tl.constexpr(-1e30)
TINY = tl.constexpr(2.0**-126)
KINDS = {"forward": 0, "reverse": 1, "jensenShannon": 2}


@triton.jit
def tangent(x, cap):
    """tanh(x / cap)."""
    scaled = tl.math.div_rn(x, cap + tl.zeros_like(x))
    t = tl.exp(-2.0 * tl.abs(scaled))
    size = tl.math.div_rn(1.0 - t, 1.0 + t)
    return tl.where(scaled < 0, -size, size)


@triton.jit
def read(row, at, held, cap, has_cap: tl.constexpr):
    """Logits in fp32, after the cap; far below all others where there are none, or -inf."""
    x = tl.load(row + at, mask=held, other=float("-inf")).to(tl.float32)
    y = x
    if has_cap:
        y = tangent(x, cap) * cap
    return tl.where(x < NOWHERE, NOWHERE, y)


@triton.jit
def highest(row, count, cap, has_cap: tl.constexpr, chunk: tl.constexpr):
    """The largest logit, and the first place where it stands."""
    lane = tl.arange(0, chunk)
    most, place = tl.full((chunk,), NOWHERE, tl.float32), lane
    for start in range(0, count, chunk):
        x = read(row, start + lane, start + lane < count, cap, has_cap)
        place = tl.where(x > most, start + lane, place)
        most = tl.where(x > most, x, most)
    largest = tl.max(most, axis=0)
    return largest, tl.min(tl.where(most == largest, place, count), axis=0)


@triton.jit
def write(row, at, held, made, cap, has_cap: tl.constexpr):
    """The gradient in place of the logits, times the slope of the cap."""
    if has_cap:
        t = tangent(tl.load(row + at, mask=held, other=0.0).to(tl.float32), cap)
        made = made * (1.0 - t * t)
    tl.store(row + at, made.to(row.dtype.element_ty), mask=held)


@triton.jit
def judge_rows(
    student, teacher, targets, made, count, by, labels, size, cap, teacher_cap,
    kind: tl.constexpr, apart: tl.constexpr, has_teacher: tl.constexpr, has_cap: tl.constexpr, has_teacher_cap: tl.constexpr,
    gradient: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """by: 1 / temperature; size: (1 - labels) * temperature; apart: the temperature is not 1."""
    n = tl.program_id(0)
    lane, row, other = tl.arange(0, chunk), student + n.to(tl.int64) * count, teacher + n.to(tl.int64) * count
    target = tl.load(targets + n)
    most, likeliest = highest(row, count, cap, has_cap, chunk)
    top, place = most, likeliest
    if has_teacher:
        top, place = highest(other, count, teacher_cap, has_teacher_cap, chunk)
    whole, answer = tl.zeros((chunk,), tl.float32), tl.zeros((chunk,), tl.float32)
    own, theirs, product = tl.zeros((chunk,), tl.float32), tl.zeros((chunk,), tl.float32), tl.zeros((chunk,), tl.float32)
    for start in range(0, count, chunk):
        held = start + lane < count
        y = read(row, start + lane, held, cap, has_cap)
        answer += tl.where(start + lane == target, y, 0.0)
        if apart or not has_teacher:
            whole += tl.exp(y - most)
        if has_teacher:
            z = read(other, start + lane, held, teacher_cap, has_teacher_cap)
            q, p = tl.exp((y - most) * by), tl.exp((z - top) * by)
            own += q
            theirs += p
            if kind != 2:
                product += (p if kind == 0 else q) * ((z - y) * by)
    q_sum = tl.sum(own, axis=0)
    entire = tl.sum(whole, axis=0) if apart or not has_teacher else q_sum
    entropy, divergence, middle = 0.0, 0.0, 0.0
    if target >= 0:
        entropy = most + tl.log(entire) - tl.sum(answer, axis=0)
    weight = tl.where(target >= 0, labels, 0.0)
    log_own, log_theirs, p_sum = 0.0, 0.0, 1.0
    if has_teacher:
        p_sum, products = tl.sum(theirs, axis=0), tl.sum(product, axis=0)
        log_own, log_theirs = most * by + tl.log(q_sum), top * by + tl.log(p_sum)
        if kind == 0:
            divergence = tl.math.div_rn(products, p_sum) - log_theirs + log_own
        elif kind == 1:
            divergence = log_theirs - log_own - tl.math.div_rn(products, q_sum)
        else:
            mine, others = tl.zeros((chunk,), tl.float32), tl.zeros((chunk,), tl.float32)
            for start in range(0, count, chunk):
                held = start + lane < count
                y = read(row, start + lane, held, cap, has_cap) * by - log_own
                z = read(other, start + lane, held, teacher_cap, has_teacher_cap) * by - log_theirs
                q, p = tl.exp(y), tl.exp(z)
                log_middle = tl.log(tl.maximum((p + q) * 0.5, TINY))
                mine += q * (tl.maximum(y, -87.0) - log_middle)
                others += p * (tl.maximum(z, -87.0) - log_middle)
            middle = tl.sum(mine, axis=0)
            divergence = (middle + tl.sum(others, axis=0)) * 0.5
    tl.store(made + n * 3, divergence)
    tl.store(made + n * 3 + 1, entropy)
    tl.store(made + n * 3 + 2, ((likeliest == place) & has_teacher).to(tl.float32))
    if gradient:
        log_whole = most + tl.log(entire)
        for start in range(0, count, chunk):
            held = start + lane < count
            y = read(row, start + lane, held, cap, has_cap)
            slope = tl.exp(y - log_whole) * weight - tl.where(start + lane == target, weight, 0.0)
            if has_teacher:
                y = y * by - log_own
                z = read(other, start + lane, held, teacher_cap, has_teacher_cap) * by - log_theirs
                q, p = tl.exp(y), tl.exp(z)
                if kind == 0:
                    slope += (q - p) * size
                elif kind == 1:
                    slope += q * (y - z - divergence) * size
                else:
                    log_middle = tl.log(tl.maximum((p + q) * 0.5, TINY))
                    slope += q * (tl.maximum(y, -87.0) - log_middle - middle) * (0.5 * size)
            write(row, start + lane, held, slope, cap, has_cap)


def divergence(
    student: Tensor, teacher: Tensor | None, targets: Tensor, kind: str, temperature: float, labels: float, cap: float | None,
    teacher_cap: float | None, gradient: bool,
) -> Tensor:  # fmt: skip
    """As `token_divergence.divergence`."""
    (rows, count), made = student.shape, torch.empty((len(student), 3), dtype=torch.float32, device=student.device)
    if rows:
        judge_rows[(rows,)](
            student, student if teacher is None else teacher, targets, made, count, 1 / temperature, labels, (1 - labels) * temperature,
            cap or 1.0, teacher_cap or 1.0, KINDS[kind], temperature != 1, teacher is not None, cap is not None, teacher_cap is not None,
            gradient, min(CHUNK, triton.next_power_of_2(count)), num_warps=8,
        )  # fmt: skip
    return made.double()


@triton.jit
def sum_rest(student, log_sums, count, cap, has_cap: tl.constexpr, chunk: tl.constexpr):
    """logsumexp of a row of logits."""
    n = tl.program_id(0)
    lane, row = tl.arange(0, chunk), student + n.to(tl.int64) * count
    most, _ = highest(row, count, cap, has_cap, chunk)
    total = tl.zeros((chunk,), tl.float32)
    for start in range(0, count, chunk):
        total += tl.exp(read(row, start + lane, start + lane < count, cap, has_cap) - most)
    tl.store(log_sums + n, most + tl.log(tl.sum(total, axis=0)))


@triton.jit
def write_rest(student, log_sums, factors, targets, count, labels, cap, has_cap: tl.constexpr, chunk: tl.constexpr):
    """softmax of a row times its factor, less `labels` at the target."""
    n = tl.program_id(0)
    lane, row = tl.arange(0, chunk), student + n.to(tl.int64) * count
    log_sum, factor, target = tl.load(log_sums + n), tl.load(factors + n), tl.load(targets + n)
    for start in range(0, count, chunk):
        held = start + lane < count
        y = read(row, start + lane, held, cap, has_cap)
        made = tl.exp(y - log_sum) * factor - tl.where(start + lane == target, labels, 0.0)
        write(row, start + lane, held, made, cap, has_cap)


def top_k_divergence(
    student: Tensor, indices: Tensor, log_probabilities: Tensor, rest: Tensor, targets: Tensor, kind: str, temperature: float,
    labels: float, cap: float | None, gradient: bool,
) -> Tensor:  # fmt: skip
    """As `token_divergence.top_k_divergence`: what is as long as the vocabulary in kernels, what has k + 1 columns in torch."""
    (rows, count), at, labelled = student.shape, indices.long(), targets >= 0
    log_sums, chunk = torch.empty_like(rest), min(CHUNK, triton.next_power_of_2(count))
    same, target = student.argmax(1) == at[:, 0], targets.clamp(min=0)[:, None]
    raw, answer = student.gather(1, at), capped(student.gather(1, target), cap)[:, 0]
    some = capped(raw, cap)
    student.scatter_(1, at, -torch.inf)
    if rows:
        sum_rest[(rows,)](student, log_sums, count, cap or 1.0, cap is not None, chunk, num_warps=8)
    bins = torch.cat([some, log_sums[:, None]], dim=1)
    whole = bins.logsumexp(1, keepdim=True)
    bins -= whole
    known = torch.cat([log_probabilities, rest[:, None]], dim=1)
    between, slope = BETWEEN[kind]((known / temperature).log_softmax(1), (bins / temperature).log_softmax(1))
    entropy = torch.where(labelled, whole[:, 0] - answer, 0.0)
    if gradient and rows:
        weights = labelled.float()[:, None] * labels
        made = slope.mul_((1 - labels) * temperature) + weights * bins.exp()
        write_rest[(rows,)](
            student, log_sums, made[:, -1].contiguous(), torch.where(labelled, targets, -1), count, labels, cap or 1.0, cap is not None,
            chunk, num_warps=8,
        )  # fmt: skip
        made = made[:, :-1] - (at == target) * weights
        student.scatter_(1, at, (made if cap is None else made * (1 - (some / cap).square())).to(student.dtype))
    return torch.stack([between.double(), entropy.double(), same.double()], dim=1)
