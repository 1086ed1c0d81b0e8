"""What each candidate costs each group of linears, measured in one survey of the source, for `autoScheme`.

Each group is encoded in a candidate that is near to the budget, and its block tried so on a few rows. What that has changed goes on to the
logits: the KL there, in nats a token, is what the group costs in this candidate. Rows go on from some blocks, evenly spread; in those
between it is interpolated what a change behind the block costs. In a few blocks the other candidates are encoded and tried too; elsewhere
they cost more or less as their rounding errors are larger or smaller, corrected by what those blocks say of that. Experts are encoded one
by one, and what they change in each token adds up (docs/decisions/0031-adaptive-bits.md).
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kompressor_worker.batch import Batch
from kompressor_worker.dropping import block_numbers
from kompressor_worker.errors import BadNumerics
from kompressor_worker.layout import LinearLayout, ModelLayout
from kompressor_worker.passes.auto_scheme import RIDDEN, RIDING, THOROUGH
from kompressor_worker.passes.scheme_choice import Candidate, SchemeGroup
from kompressor_worker.passes.scheme_encoding import decoded, encode, expert_sites
from kompressor_worker.passes.scheme_plans import KINDS, Plan
from kompressor_worker.passes.surveyor import SeenBlock, SeenExpert, Surveyed, Surveyor
from kompressor_worker.passes.variants import Variants

if TYPE_CHECKING:
    from kompressor_worker.statistics import Statistic

TOKENS = 512
"""Of those that are routed to an expert, it is judged by so many at most."""
COLD = 16
"""An expert with fewer tokens is judged by a sample of all tokens instead, as if a few of them came to it."""

Choose = Callable[[list[dict[int, float]]], tuple[list[Plan], list[tuple[int, float]]]]
"""Costs by group and candidate to plans, and a curve of (bytes, cost)."""


class SchemeCosts(Surveyor):
    """`found`: costs fp64 [groups, candidates] in nats a token, NaN where there is no such candidate; plans int64 [plans, groups] and
    kinds int64 [plans]; sweep fp64 [points, 2]: bytes of the groups, and cost."""

    reads_head = True
    measures_experts = False

    def __init__(
        self,
        source: ModelLayout,
        groups: Sequence[SchemeGroup],
        candidates: Sequence[Candidate],
        nearest: Sequence[int],
        algorithm: str,
        choose: Choose,
    ) -> None:
        """`nearest`: by group, the candidate that it is encoded in; none that leaves it exact, if there is another."""
        super().__init__()
        self._groups, self._candidates, self._nearest, self._choose = groups, candidates, nearest, choose
        self._algorithm = algorithm
        self.statistics: frozenset[Statistic] = frozenset({"hessian"} if algorithm == "gptq" else ())
        self._of = {linear.name: number for number, group in enumerate(groups) for linear in group.linears}
        self.wants_experts = any(group.routed for group in groups)
        layers = len(block_numbers(source))
        self._ridden, self._thorough = spread(layers, RIDDEN), spread(layers, THOROUGH)
        self._variants = Variants(self.tensors, len(groups), replace(source, dtype="F32"))
        self._changes: list[Tensor] = []
        """Of the block at hand, by riding batch, fp32 [rows * length, hidden]: what its experts change."""
        self.tensors["costs"] = torch.full((len(groups), len(candidates)), math.nan, dtype=torch.float64)
        """Changes behind the block, tried where they are, else as rounding errors go;"""
        self.tensors["rounded"] = self.tensors["costs"].clone()
        """and all as those go."""
        self.tensors["layers"] = torch.zeros(len(groups), dtype=torch.int64)
        self.tensors["ridden"] = torch.zeros(len(groups), dtype=torch.float64)
        """By group from which rows have gone on: what it had changed."""

    def begin(self, model: Surveyed) -> None:
        self._variants.begin(model, RIDING)
        self._batches = list(model.batches[: self._variants.batches])

    # ---- one block

    def expert(self, seen: SeenExpert) -> None:
        """Raises BadNumerics."""
        number = next((self._of[name] for x in seen.weights if (name := x.removesuffix(".weight")) in self._of), None)
        if number is None:
            return
        linears = [x for x in self._groups[number].linears if x.weight in seen.weights]  # gate, up, down
        if not self._changes:
            hidden = [batch.state["hidden"] for batch in self._batches]
            self._changes = [torch.zeros(h.shape[0] * h.shape[1], h.shape[2], device=h.device) for h in hidden]
        sites, tokens = expert_sites(seen, linears, self.statistics), judged_by(seen)
        errors = dict.fromkeys(self._possible(number), 0.0)
        for c in self._tried(number, seen.layer):
            scheme = self._candidates[c].scheme
            assert scheme is not None, "leaving it exact loses nothing"
            weights, schemes = decoded(self._algorithm, linears, seen.weights, scheme, sites), {x.name: scheme for x in linears}
            errors[c] = tokens.error(seen.says(tokens.inputs, weights, schemes))
            for part in (p for p in seen.routed if p.batch < len(self._changes) and c == self._nearest[number]):
                change = seen.says(part.inputs, weights, schemes) - part.outputs
                self._changes[part.batch].index_add_(0, part.positions, change * part.gates[:, None])
        self._note(number, seen.layer, errors, self._relative(number, linears, seen.weights))

    def block(self, seen: SeenBlock) -> None:
        """Raises BadNumerics."""
        seen = self._variants.at(seen)
        self._variants.forward(seen)
        numbers = sorted({number for name, number in self._of.items() if name.startswith(seen.prefix)})
        routed = [number for number in numbers if self._groups[number].routed]
        for number in numbers:
            self.tensors["layers"][number] = seen.layer
            if number not in routed:
                self._plain(seen, number)
        if routed:
            self._routed(seen, routed)

    def _plain(self, seen: SeenBlock, number: int) -> None:
        group = self._groups[number]
        changes = dict.fromkeys(self._possible(number), 0.0)
        for c in self._tried(number, seen.layer):
            scheme = self._candidates[c].scheme
            assert scheme is not None, "leaving it exact loses nothing"
            weights = decoded(self._algorithm, group.linears, seen.weights, scheme, seen.sites)
            rows = seen.tried(self._batches, weights, {x.name: scheme for x in group.linears})
            changes[c] = self._rides(seen, number, rows) if c == self._nearest[number] else self._finite(seen.change(rows), number)
        self._note(number, seen.layer, changes, self._relative(number, group.linears, seen.weights))

    def _note(self, number: int, layer: int, tried: Mapping[int, float], relative: Mapping[int, float]) -> None:
        """Adds up what a group's linears change, which come all at once, or expert by expert."""
        for c, share in relative.items():
            rounded = tried[self._nearest[number]] * share
            for name, change in (("costs", tried[c] if c in self._tried(number, layer) else rounded), ("rounded", rounded)):
                self.tensors[name][number, c] = self.tensors[name][number, c].nan_to_num() + change

    def _possible(self, number: int) -> list[int]:
        return [c for c, size in enumerate(self._groups[number].nbytes) if size is not None]

    def _tried(self, number: int, layer: int) -> list[int]:
        """The nearest candidate, and those that round inputs, of which no error of weights says anything; in some blocks all."""
        schemes = {c: x for c in self._possible(number) if (x := self._candidates[c].scheme) is not None}
        return [c for c, x in schemes.items() if c == self._nearest[number] or x.inputs != "none" or layer in self._thorough]

    def _routed(self, seen: SeenBlock, numbers: Sequence[int]) -> None:
        """What experts change adds up in each token, and goes on together; each has its part of it."""
        rows = []
        for number, batch in enumerate(self._batches):
            after = seen.after[number]
            hidden = (after.float() + self._changes[number].view(after.shape)).to(after.dtype)
            rows.append(Batch(batch.lengths, {"hidden": hidden}, batch.excluded))
        self._changes = []
        change = self._rides(seen, numbers[0], rows)
        costs = self.tensors["costs"]
        parts = sum(float(costs[number, self._nearest[number]]) for number in numbers)
        for number in numbers:
            costs[number] *= change / parts if parts else 0.0
            self.tensors["rounded"][number] *= change / parts if parts else 0.0

    def _rides(self, seen: SeenBlock, number: int, rows: Sequence[Batch]) -> float:
        """What these rows differ by behind the block; in some blocks they go on to the logits."""
        change = self._finite(seen.change(rows), number)
        if seen.layer in self._ridden and change:
            self.tensors["ridden"][number] = change
            self._variants.start(number, [batch.state["hidden"] for batch in rows])
        return change

    def _relative(self, number: int, linears: Sequence[LinearLayout], weights: Mapping[str, Tensor]) -> dict[int, float]:
        """By candidate of a group: the squared errors of rounding these linears of it to nearest, over those of the nearest candidate."""
        errors = {}
        for c, candidate in enumerate(self._candidates):
            if self._groups[number].nbytes[c] is not None:
                found = () if candidate.scheme is None else encode("rtn", linears, weights, candidate.scheme).values()
                errors[c] = sum(x.squared_error for x in found)
        unit = errors[self._nearest[number]]
        return {c: error / unit if unit else 0.0 for c, error in errors.items()}

    def _finite(self, change: float, number: int) -> float:
        if not change < math.inf:
            name = self._groups[number].name
            raise BadNumerics(
                f"autoScheme: no calibration row gives a finite output with {name} quantised; calibrate with other data, or list it under "
                "ignore"
            )
        return change

    # ---- the end

    def head(self, first: int, rows: Tensor, norm: Tensor) -> None:
        if self._variants.started:
            self._variants.head(first, rows, norm)

    def found(self) -> dict[str, Tensor]:
        layers = self.tensors["layers"].tolist()
        known = self._known(layers)
        anywhere: dict[int, float] = {}
        for prices in known.values():
            for layer, price in prices.items():
                anywhere[layer] = max(price, anywhere.get(layer, 0.0))
        factors = [
            price_at(layer, known.get(kind_of(group), anywhere)) for group, layer in zip(self._groups, layers, strict=True)
        ]  # nats a token for a change of one
        costs = self._corrected(layers) * torch.tensor(factors, dtype=torch.float64)[:, None]
        listed = [{c: value for c, value in enumerate(row) if not math.isnan(value)} for row in costs.tolist()]
        plans, sweep = self._choose(listed)
        chosen, kinds = torch.tensor([plan.chosen for plan in plans]), torch.tensor([KINDS.index(plan.kind) for plan in plans])
        return {"costs": costs, "plans": chosen, "kinds": kinds, "sweep": torch.tensor(sweep, dtype=torch.float64)}

    def _corrected(self, layers: Sequence[int]) -> Tensor:
        """fp64 [groups, candidates]: costs, of candidates that were not tried as the blocks say where all were, by kind of group."""
        costs, rounded = self.tensors["costs"].cpu().clone(), self.tensors["rounded"].cpu()
        sums: dict[tuple[str, int], dict[int, list[float]]] = {}
        for number, layer in enumerate(layers):
            for c in self._tried(number, layer) if layer in self._thorough else ():
                both = sums.setdefault((kind_of(self._groups[number]), c), {}).setdefault(layer, [0.0, 0.0])
                both[0], both[1] = both[0] + float(costs[number, c]), both[1] + float(rounded[number, c])
        ratios = {of: {at: a / b for at, (a, b) in by.items() if a > 0 and b > 0} for of, by in sums.items()}
        for number, layer in enumerate(layers):
            for c in set(self._possible(number)) - set(self._tried(number, layer)):
                costs[number, c] *= price_at(layer, ratios.get((kind_of(self._groups[number]), c), {}))
        return costs

    def _known(self, layers: Sequence[int]) -> dict[str, dict[int, float]]:
        """By kind of group and block."""
        known: dict[str, dict[int, float]] = {}
        for number, kl in self._variants.divergences().items():
            change = float(self.tensors["ridden"][number])
            if change > 0 and 0 < kl < math.inf:
                known.setdefault(kind_of(self._groups[number]), {})[layers[number]] = kl / change
        return known


def kind_of(group: SchemeGroup) -> str:
    """A group's place in its block; the experts share theirs."""
    name = group.linears[0].name.partition(".experts.")[0] if group.routed else group.name
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def spread(layers: int, most: int) -> frozenset[int]:
    """Of so many blocks `most`, the first and the last among them."""
    count = min(layers, most)
    return frozenset(layers - 1 if count == 1 else i * (layers - 1) // (count - 1) for i in range(count))


def price_at(layer: int, known: Mapping[int, float]) -> float:
    """Between the blocks where it is known a straight line in its logarithm; outside of them as at the nearest; 1 where it is nowhere."""
    at = sorted(known)
    if not at:
        return 1.0
    right = bisect_left(at, layer)
    if right in (0, len(at)) or at[right] == layer:
        return known[at[min(right, len(at) - 1)]]
    a, b = at[right - 1], at[right]
    return float(known[a] * (known[b] / known[a]) ** ((layer - a) / (b - a)))


@dataclass(frozen=True)
class Judged:
    """Tokens that an expert is judged by."""

    inputs: Tensor
    outputs: Tensor
    weight: Tensor
    """fp32 [n]: squared gates."""
    share: float
    """All of its tokens over these."""

    def error(self, said: Tensor) -> float:
        """Squared, of what it adds to the stream over all of its tokens, where it says this to these [n, hidden]."""
        return self.share * float(((said - self.outputs).square().sum(-1) * self.weight).double().sum())


def judged_by(seen: SeenExpert) -> Judged:
    if seen.tokens < COLD:
        gates = torch.full((len(seen.sample),), 1.0 / seen.experts, device=seen.sample.device)
        return Judged(seen.sample, seen.sample_outputs, gates, max(1, seen.tokens) / max(1, len(seen.sample)))
    inputs, gates, outputs = (torch.cat([getattr(p, name) for p in seen.routed])[:TOKENS] for name in ("inputs", "gates", "outputs"))
    return Judged(inputs, outputs, gates.square(), seen.tokens / len(inputs))
