"""Routing in a mixture of experts: which tokens go where, and with which weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Of one batch's tokens. An assignment is a (token, expert) pair; assignments are ordered by expert, then by token."""

    experts: Tensor
    """int64 [tokens, top-k]"""
    gates: Tensor
    """fp32 [tokens, top-k]: what each expert's output is multiplied by."""

    @classmethod
    def choose(cls, logits: Tensor, top_k: int, renormalise: bool) -> Routing:
        """Softmax over all experts, then the largest; their shares of one, if the family renormalises (Mixtral does)."""
        gates, experts = logits.float().softmax(-1).topk(top_k, dim=-1)
        return cls(experts, gates / gates.sum(-1, keepdim=True) if renormalise else gates)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Routing:
        return cls(state["experts"], state["gates"])

    def state(self) -> dict[str, Tensor]:
        return {"experts": self.experts, "gates": self.gates}

    @property
    def assignments(self) -> int:
        return self.experts.numel()

    def _order(self) -> Tensor:
        return torch.argsort(self.experts.flatten(), stable=True)

    def tokens_by_expert(self) -> Iterator[tuple[int, Tensor]]:
        """(expert, its tokens) for every expert that got one."""
        tokens = self._order() // self.experts.shape[1]
        return ((expert, tokens[rows]) for expert, rows in self.rows_by_expert())

    def rows_by_expert(self) -> Iterator[tuple[int, slice]]:
        """(expert, its assignments) for every expert that got one."""
        counts, start = torch.bincount(self.experts.flatten()).tolist(), 0
        for expert, count in enumerate(counts):
            if count:
                yield expert, slice(start, start + count)
            start += count

    def gates_by_expert(self) -> Tensor:
        """fp32 [assignments]"""
        return self.gates.flatten()[self._order()]
