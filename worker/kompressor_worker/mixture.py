"""Routing in a mixture of experts: which tokens go where, and with which weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kompressor_worker.family import Scoring


@dataclass(frozen=True)
class Rule:
    """How a model's routers choose, by the family's data and config.json."""

    top_k: int
    renormalise: bool
    """Whether gates are shares of one."""
    sigmoid: bool = False
    """Of each logit by itself, instead of a softmax over all of them."""
    groups: int = 1
    kept_groups: int = 1
    best: int = 0
    """How many of a group's best scores say, summed, how good the group is; 0: experts are chosen among all."""
    factor: float = 1.0
    """What gates are multiplied by in the end."""

    @classmethod
    def of(cls, scoring: Scoring, config: Any) -> Rule:
        """`config`: transformers' config object, with its defaults."""
        grouped = scoring.best and (not scoring.grouped_by or getattr(config, "topk_method", None) in scoring.grouped_by)
        return cls(
            int(config.num_experts_per_tok),
            bool(getattr(config, "norm_topk_prob", True)) if scoring.renormalise is None else scoring.renormalise,
            scoring.sigmoid,
            int(config.n_group or 1) if grouped else 1,
            int(config.topk_group or 1) if grouped else 1,
            scoring.best if grouped else 0,
            float(config.routed_scaling_factor) if scoring.scaled else 1.0,
        )

    def within_groups(self, scores: Tensor) -> Tensor:
        """scores [tokens, experts] with -inf where the expert's group is not among the best."""
        if not self.best:
            return scores
        by_group = scores.view(len(scores), self.groups, -1)
        worth = by_group.topk(min(self.best, by_group.shape[-1]), dim=-1).values.sum(-1)
        kept = torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, worth.topk(self.kept_groups, dim=-1).indices, True)
        return by_group.masked_fill(~kept[..., None], float("-inf")).flatten(-2)


SMALLEST = 1e-20
"""Added to a sum of gates before it divides: sigmoids can all be zero."""


@dataclass(frozen=True)
class Routing:
    """Of one batch's tokens. An assignment is a (token, expert) pair."""

    experts: Tensor
    """int64 [tokens, top-k]"""
    gates: Tensor
    """fp32 [tokens, top-k]: what each expert's output is multiplied by."""

    @classmethod
    def choose(cls, logits: Tensor, rule: Rule, correction: Tensor | None = None) -> Routing:
        """Of logits [tokens, experts]. `correction` [experts] is added to the scores for the choice, and is not in the gates."""
        scores = logits.float().sigmoid() if rule.sigmoid else logits.float().softmax(-1)
        ranked = rule.within_groups(scores if correction is None else scores + correction.float())
        experts = ranked.topk(rule.top_k, dim=-1).indices
        gates = scores.gather(-1, experts)
        if rule.renormalise:
            gates = gates / (gates.sum(-1, keepdim=True) + SMALLEST)
        return cls(experts, gates * rule.factor)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Routing:
        return cls(state["experts"], state["gates"])

    def state(self) -> dict[str, Tensor]:
        return {"experts": self.experts, "gates": self.gates}

    def of_expert(self, number: int) -> tuple[Tensor, Tensor]:
        """Its tokens, int64 [n] ascending, and their gates, fp32 [n]."""
        tokens, slots = (self.experts == number).nonzero(as_tuple=True)
        return tokens, self.gates[tokens, slots]

    def counts(self, experts: int) -> Tensor:
        """int64 [experts]: tokens that go to each."""
        return torch.bincount(self.experts.flatten(), minlength=experts)
