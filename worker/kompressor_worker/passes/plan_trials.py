"""The KL of whole plans of schemes, all of the model's groups encoded together: a second survey for `autoScheme`.

The rows of each plan go beside the source's from the first block to the logits, through weights that are encoded in the plan's candidates
on the source's own inputs. A group is encoded once for each candidate that some plan gives it, and decoded for one plan at a time. So
beside the plans' rows there is one block in memory, as stored, as encoded and as one plan reads it, however deep the model is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kompressor_worker.batch import Batch
from kompressor_worker.block import Site
from kompressor_worker.layout import LinearLayout, ModelLayout
from kompressor_worker.passes.scheme_choice import Candidate, SchemeGroup
from kompressor_worker.passes.scheme_encoding import as_read, encode, expert_sites, stored_in
from kompressor_worker.passes.surveyor import SeenBlock, SeenExpert, Surveyed, Surveyor
from kompressor_worker.passes.variants import Variants
from kompressor_worker.schemes import Scheme

if TYPE_CHECKING:
    from kompressor_worker.statistics import Statistic

Made = dict[str, tuple[dict[str, Tensor], Scheme]]
"""By linear: its tensors as stored, by full name, and the scheme that they are stored in."""


class PlanTrials(Surveyor):
    """`found`: kl fp64 [plans], nats a token."""

    reads_head = True
    measures_experts = False

    def __init__(
        self,
        source: ModelLayout,
        groups: Sequence[SchemeGroup],
        candidates: Sequence[Candidate],
        plans: Sequence[Sequence[int]],
        algorithm: str,
        samples: int,
    ) -> None:
        """`plans`: candidates by group. `samples`: calibration rows, and those that share a batch with them."""
        super().__init__()
        self._groups, self._candidates, self._plans, self._algorithm, self._samples = groups, candidates, plans, algorithm, samples
        self.statistics: frozenset[Statistic] = frozenset({"hessian"} if algorithm == "gptq" else ())
        self._of = {linear.name: number for number, group in enumerate(groups) for linear in group.linears}
        self.wants_experts = any(group.routed for group in groups)
        self._variants = Variants(self.tensors, len(plans), replace(source, dtype="F32"))
        self._made: dict[int, Made] = {}
        """Of the block at hand, by candidate."""

    def begin(self, model: Surveyed) -> None:
        self._variants.begin(model, self._samples)

    def expert(self, seen: SeenExpert) -> None:
        """Raises BadNumerics."""
        number = next((self._of[name] for x in seen.weights if (name := x.removesuffix(".weight")) in self._of), None)
        if number is not None:
            linears = [x for x in self._groups[number].linears if x.weight in seen.weights]
            sites = expert_sites(seen, linears, self.statistics)
            for c, scheme in self._wanted(number).items():
                self._encode(c, linears, seen.weights, scheme, sites)

    def block(self, seen: SeenBlock) -> None:
        """Raises BadNumerics."""
        numbers = sorted({number for name, number in self._of.items() if name.startswith(seen.prefix)})
        for number in numbers:
            group = self._groups[number]
            for c, scheme in ({} if group.routed else self._wanted(number)).items():
                self._encode(c, group.linears, seen.weights, scheme, seen.sites)
        seen = self._variants.at(seen)
        if not self._variants.started:
            for plan in range(len(self._plans)):
                self._variants.start(plan, seen.before)

        def through(plan: int, rows: Sequence[Batch]) -> None:
            weights, schemes = self._read(seen, self._plans[plan], numbers)
            seen.with_weights(rows, weights, schemes)

        self._variants.forward(seen, through)
        self._made = {}

    def _wanted(self, number: int) -> dict[int, Scheme]:
        """Candidates that plans give this group; what leaves it exact needs no encoding."""
        schemes = {c: self._candidates[c].scheme for c in sorted({plan[number] for plan in self._plans})}
        return {c: scheme for c, scheme in schemes.items() if scheme is not None}

    def _encode(
        self, candidate: int, linears: Sequence[LinearLayout], weights: Mapping[str, Tensor], scheme: Scheme, sites: Sequence[Site]
    ) -> None:
        stored = stored_in(scheme, linears, weights)
        for name, made in encode(self._algorithm, linears, weights, scheme, sites).items():
            self._made.setdefault(candidate, {})[name] = made.tensors, stored[name]

    def _read(self, seen: SeenBlock, plan: Sequence[int], numbers: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Scheme]]:
        """The block's weights as a reader of this plan has them, and the schemes by linear."""
        weights: dict[str, Tensor] = {}
        schemes: dict[str, Scheme] = {}
        for number in numbers:
            scheme = self._candidates[plan[number]].scheme
            if scheme is None:
                continue
            for linear in self._groups[number].linears:
                tensors, stored = self._made[plan[number]][linear.name]
                weights[linear.weight] = as_read(linear.name, tensors, seen.weights[linear.weight], stored)
                schemes[linear.name] = scheme
        return weights, schemes

    def head(self, first: int, rows: Tensor, norm: Tensor) -> None:
        self._variants.head(first, rows, norm)

    def found(self) -> dict[str, Tensor]:
        return {"kl": torch.tensor(list(self._variants.divergences().values()), dtype=torch.float64)}
