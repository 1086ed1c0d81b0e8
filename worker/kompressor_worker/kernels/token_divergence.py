"""What a student's prediction of each token is worth beside its teacher's, in plain torch: the specification of the compiled kernels.

For logits y of the student and z of the teacher, q = softmax(y / T) and p = softmax(z / T) at the temperature T, a token's loss is

    (1 - labels) T^2 D(p, q) + labels (-log softmax(y)[target])

with T^2 as Hinton et al. 2015 (arXiv:1503.02531) have it: gradients then keep their size whatever the temperature. D is KL(p || q)
("forward"), KL(q || p) ("reverse", as MiniLLM, arXiv:2306.08543) or the Jensen-Shannon divergence, the mean of both to m = (p + q) / 2
("jensenShannon", as GKD, arXiv:2306.13649, at beta = 0.5). With s the gradient of D by y / T,

    forward s = q - p;   reverse s = q (log(q/p) - D);   Jensen-Shannon s = q (log(q/m) - KL(q || m)) / 2

of which a temperature cancels against T^2. A token without a target (below 0) has no cross-entropy. All logits are finite.

The student's logits are replaced by the gradient: no third matrix of the size of the logits is held. Arithmetic is fp32, a row's sums
fp32 or better. Reads two matrices of logits and writes one, in fp32 12 bytes a logit, for two exponentials: 60 to 120 operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def divergence(
    student: Tensor, teacher: Tensor | None, targets: Tensor, kind: str, temperature: float, labels: float, cap: float | None,
    teacher_cap: float | None, gradient: bool,
) -> Tensor:  # fmt: skip
    """Logits [n, vocabulary] of both (bf16 or fp32), targets int64 [n]; caps as in `softcap * tanh(logits / softcap)`.

    Returns fp64 [n, 3]: D, cross-entropy, and 1 where both have the same most likely token. With `gradient` the student's logits become the
    gradient of the sum of losses by them. Without a teacher D and its gradient are zero."""
    y = capped(student, cap)
    between, same, slope = y.new_zeros(len(y)), y.new_zeros(len(y)), None
    if teacher is not None:
        z = capped(teacher, teacher_cap)
        between, slope = BETWEEN[kind]((z / temperature).log_softmax(1), (y / temperature).log_softmax(1))
        same = (y.argmax(1) == z.argmax(1)).float()
    entropy, off = cross_entropy(y, targets)
    if gradient:
        made = off.mul_(labels)
        if slope is not None:
            made += slope.mul_((1 - labels) * temperature)
        student.copy_(uncapped(made, y, cap))
    return torch.stack([between.double(), entropy.double(), same.double()], dim=1)


def top_k_divergence(
    student: Tensor, indices: Tensor, log_probabilities: Tensor, rest: Tensor, targets: Tensor, kind: str, temperature: float,
    labels: float, cap: float | None, gradient: bool,
) -> Tensor:  # fmt: skip
    """The same where of the teacher only its k most likely tokens are known: indices int32 [n, k], log_probabilities fp32 [n, k]; rest fp32
    [n]: log of the probability of all others together. The most likely comes first.

    D is between distributions over k + 1 bins, a token each and the last for all others; a temperature is applied to those. With a bin's
    gradient s, a token of the last bin has s q_token / q_bin, so that the student's shares within it are left as they are."""
    y, at = capped(student, cap), indices.long()
    whole = y.logsumexp(1, keepdim=True)
    some, others = y.gather(1, at), y.scatter(1, at, -math.inf)
    bins = torch.cat([some, others.logsumexp(1, keepdim=True)], dim=1) - whole
    known = torch.cat([log_probabilities.float(), rest.float()[:, None]], dim=1)
    between, slope = BETWEEN[kind]((known / temperature).log_softmax(1), (bins / temperature).log_softmax(1))
    entropy, off = cross_entropy(y, targets)
    same = (y.argmax(1) == at[:, 0]).double()
    if gradient:
        slope.mul_((1 - labels) * temperature)
        within = (others - whole - bins[:, -1:]).exp_().mul_(slope[:, -1:])
        made = off.mul_(labels) + within.scatter_add_(1, at, slope[:, :-1])
        student.copy_(uncapped(made, y, cap))
    return torch.stack([between.double(), entropy.double(), same], dim=1)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """fp32, never the logits themselves."""
    copy = logits.to(torch.float32, copy=True)
    return copy if cap is None else copy.div_(cap).tanh_().mul_(cap)


def uncapped(slope: Tensor, y: Tensor, cap: float | None) -> Tensor:
    """The gradient by the logits from that by `capped`, y."""
    return slope if cap is None else slope * (1 - (y / cap).square())


def cross_entropy(y: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """[n], and its gradient by y [n, vocabulary]; zeros where there is no target."""
    labelled, at = (targets >= 0)[:, None], targets.clamp(min=0)[:, None]
    log_q = y.log_softmax(1)
    entropy = -log_q.gather(1, at).masked_fill(~labelled, 0.0)
    off = log_q.exp_().scatter_add_(1, at, torch.full_like(entropy, -1.0))
    return entropy[:, 0], off.mul_(labelled)


def forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """D [n] and its gradient [n, bins] by what log_q [n, bins] is the log_softmax of."""
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(1), log_q.exp() - p


def reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    q, ratio = log_q.exp(), log_q - log_p
    between = (q * ratio).sum(1)
    return between, q * (ratio - between[:, None])


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    p, q, log_m = log_p.exp(), log_q.exp(), torch.logaddexp(log_p, log_q) - math.log(2)
    ratio = log_q - log_m
    own = (q * ratio).sum(1)
    return ((p * (log_p - log_m)).sum(1) + own) / 2, q * (ratio - own[:, None]) / 2


BETWEEN: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "jensenShannon": jensen_shannon,
}
