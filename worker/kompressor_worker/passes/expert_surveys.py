"""What passes that leave fewer experts measure of the source: what each adds to its tokens, and how alike their outputs are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kompressor_worker.passes.surveyor import SeenBlock, SeenExpert, Surveyor

SKETCHED = 128
"""Channels that outputs are compared in: where there are more, as many random projections of them."""


class Contributions(Surveyor):
    """By block: of every expert the tokens that are routed to it (`tokens`), and over these the sum of the gate times the norm of the
    output (`contributed`)."""

    wants_experts = True
    whole_block = False

    def expert(self, seen: SeenExpert) -> None:
        tokens, contributed = (self._of(name, seen) for name in ("tokens", "contributed"))
        tokens[seen.number] = seen.tokens
        contributed[seen.number] = sum(float((part.gates * part.outputs.norm(dim=-1)).sum(dtype=torch.float64)) for part in seen.routed)

    def _of(self, name: str, seen: SeenExpert) -> Tensor:
        return self.tensors.setdefault(f"{name}/{seen.layer}", torch.zeros(seen.experts, dtype=torch.float64))


class Likeness(Contributions):
    """The same, and by block the products of all pairs of experts' outputs (`products` [experts, experts]), mean over a sample of tokens
    that is the same for all."""

    def __init__(self) -> None:
        super().__init__()
        self._outputs: dict[int, Tensor] = {}
        self._tokens = 1

    @property
    def resting(self) -> bool:
        return not self._outputs

    def expert(self, seen: SeenExpert) -> None:
        super().expert(seen)
        outputs = seen.sample_outputs
        self._tokens = max(1, len(outputs))
        self._outputs[seen.number] = (outputs @ sketch(outputs.shape[1]).to(outputs.device)).flatten()

    def block(self, seen: SeenBlock) -> None:
        if not self._outputs:
            return
        outputs = torch.stack([self._outputs[number] for number in range(len(self._outputs))])
        self.tensors[f"products/{seen.layer}"] = (outputs @ outputs.T).double() / self._tokens
        self._outputs = {}


def sketch(channels: int) -> Tensor:
    """fp32 [channels, SKETCHED or fewer]: products of vectors behind it are those before it, on average (Johnson and Lindenstrauss)."""
    if channels <= SKETCHED:
        return torch.eye(channels)
    return torch.randn(channels, SKETCHED, generator=torch.Generator().manual_seed(0)) / float(SKETCHED**0.5)


def by_layer(found: Mapping[str, Tensor], *names: str) -> dict[int, tuple[Tensor, ...]]:
    """What was found, by block, in this order."""
    layers = sorted(int(name.partition("/")[2]) for name in found if name.startswith(f"{names[0]}/"))
    return {layer: tuple(found[f"{name}/{layer}"] for name in names) for layer in layers}


def importance(tokens: Tensor, contributed: Tensor | None, least: int) -> Tensor:
    """fp64 [experts]. Contributed: its mean over the tokens; for tokens that an expert lacks of `least` the layer's mean stands in, so that
    few tokens neither save nor doom it. Of one with none nothing is lost: 0. Without `contributed`: the share of all tokens."""
    if contributed is None:
        return tokens / tokens.sum().clamp(min=1)
    mean = contributed / tokens.clamp(min=1)
    used = tokens > 0
    missing = (least - tokens).clamp(min=0)
    shrunk = (contributed + missing * mean[used].mean()) / (tokens + missing).clamp(min=1)
    return torch.where(used, shrunk, torch.zeros_like(mean))


def keep(scores: Tensor, tokens: Tensor, kept: int, groups: int) -> list[int]:
    """Experts of the highest scores, as many of each group, ascending; of equal scores those with more tokens, then the first."""
    within = len(scores) // groups
    found: list[int] = []
    for group in range(groups):
        members = range(group * within, (group + 1) * within)
        order = sorted(members, key=lambda expert: (-float(scores[expert]), -float(tokens[expert]), expert))
        found += sorted(order[: kept // groups])
    return found
