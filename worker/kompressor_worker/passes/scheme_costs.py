"""What each candidate costs each group of linears, measured in one survey of the source, for `autoScheme`.

Each group is encoded once, in the candidate that is nearest to the budget, and its block tried so on a few rows. What that has changed goes
on to the logits: the KL there, in nats a token, is what the group costs in this candidate. Rows go on from some blocks, evenly spread; in
those between it is interpolated what a change behind the block costs. The other candidates cost more or less as their rounding errors are
larger or smaller. Experts are encoded one by one, and what they change in each token adds up (docs/decisions/0031-adaptive-bits.md).
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kompressor_worker.batch import Batch
from kompressor_worker.block import Encoded, Site, Stage
from kompressor_worker.errors import BadNumerics
from kompressor_worker.formats.stored import decode
from kompressor_worker.layout import LinearLayout, StageLayout
from kompressor_worker.passes.auto_scheme import RIDDEN, RIDING, encoder
from kompressor_worker.passes.scheme_choice import Candidate, SchemeGroup
from kompressor_worker.passes.surveyor import SeenBlock, SeenExpert, Surveyed, Surveyor
from kompressor_worker.passes.variants import Variants
from kompressor_worker.schemes import Scheme
from kompressor_worker.statistics import Statistics

if TYPE_CHECKING:
    from kompressor_worker.statistics import Statistic

TOKENS = 512
"""Of those that are routed to an expert, it is judged by so many at most."""
COLD = 16
"""An expert with fewer tokens is judged by a sample of all tokens instead, as if a few of them came to it."""

Choose = Callable[[list[dict[int, float]]], tuple[list[int], list[tuple[int, float]]]]
"""Costs by group and candidate to the candidates chosen, and a curve of (bytes, cost)."""


class SchemeCosts(Surveyor):
    """`found`: costs fp64 [groups, candidates] in nats a token, NaN where there is no such candidate; choice int64 [groups]; sweep fp64
    [points, 2]: bytes of the groups, and cost."""

    reads_head = True
    measures_experts = False

    def __init__(
        self,
        layers: int,
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
        self._ridden = spread(layers)
        self._variants = Variants(self.tensors, len(groups))
        self._changes: list[Tensor] = []
        """Of the block at hand, by riding batch, fp32 [rows * length, hidden]: what its experts change."""
        self.tensors["costs"] = torch.full((len(groups), len(candidates)), math.nan, dtype=torch.float64)
        """Changes behind the block."""
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
        sites, tokens = self._expert_sites(seen, linears), judged_by(seen)
        errors = dict.fromkeys(self._possible(number), 0.0)
        for c in self._tried(number):
            scheme = self._candidates[c].scheme
            assert scheme is not None, "leaving it exact loses nothing"
            weights, schemes = self._encoded(linears, seen.weights, scheme, sites), {x.name: scheme for x in linears}
            errors[c] = tokens.error(seen.says(tokens.inputs, weights, schemes))
            for part in (p for p in seen.routed if p.batch < len(self._changes) and c == self._nearest[number]):
                change = seen.says(part.inputs, weights, schemes) - part.outputs
                self._changes[part.batch].index_add_(0, part.positions, change * part.gates[:, None])
        for c, share in self._relative(number, linears, seen.weights).items():
            before = float(self.tensors["costs"][number, c])
            error = errors[c] if c in self._tried(number) else errors[self._nearest[number]] * share
            self.tensors["costs"][number, c] = error + (0.0 if math.isnan(before) else before)

    def block(self, seen: SeenBlock) -> None:
        """Raises BadNumerics."""
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
        group, costs = self._groups[number], self.tensors["costs"]
        changes = dict.fromkeys(self._possible(number), 0.0)
        for c in self._tried(number):
            scheme = self._candidates[c].scheme
            assert scheme is not None, "leaving it exact loses nothing"
            weights = self._encoded(group.linears, seen.weights, scheme, seen.sites)
            rows = seen.tried(self._batches, weights, {x.name: scheme for x in group.linears})
            changes[c] = self._rides(seen, number, rows) if c == self._nearest[number] else self._finite(seen.change(rows), number)
        for c, share in self._relative(number, group.linears, seen.weights).items():
            costs[number, c] = changes[c] if c in self._tried(number) else changes[self._nearest[number]] * share

    def _possible(self, number: int) -> list[int]:
        return [c for c, size in enumerate(self._groups[number].nbytes) if size is not None]

    def _tried(self, number: int) -> list[int]:
        """The nearest candidate, and those that round inputs, of which no error of weights says anything."""
        schemes = {c: self._candidates[c].scheme for c in self._possible(number)}
        return [c for c, x in schemes.items() if x is not None and (c == self._nearest[number] or x.inputs != "none")]

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

    def _encoded(
        self, linears: Sequence[LinearLayout], weights: Mapping[str, Tensor], scheme: Scheme, sites: Sequence[Site]
    ) -> dict[str, Tensor]:
        """By full name, what a reader makes of these weights."""
        made = encode(self._algorithm, linears, weights, scheme, sites)
        first, scheme = weights[linears[0].weight], fitting(scheme, linears, weights)
        return {f"{name}.weight": decode(name, x.tensors, scheme, first.dtype).to(first.device) for name, x in made.items()}

    def _expert_sites(self, seen: SeenExpert, linears: Sequence[LinearLayout]) -> list[Site]:
        if not self.statistics:
            return []
        inputs = torch.cat([part.inputs for part in seen.routed]) if seen.routed else seen.sample
        sites = []
        for members, x in ((tuple(linears[:-1]), inputs), ((linears[-1],), seen.products(inputs))):
            measured = Statistics(x.shape[1], self.statistics)
            measured.add(x)
            sites.append(Site(members[0].name, members, (), measured))
        return sites

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
        costs = self.tensors["costs"].cpu() * torch.tensor(factors, dtype=torch.float64)[:, None]
        listed = [{c: value for c, value in enumerate(row) if not math.isnan(value)} for row in costs.tolist()]
        choice, sweep = self._choose(listed)
        return {"costs": costs, "choice": torch.tensor(choice), "sweep": torch.tensor(sweep, dtype=torch.float64)}

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


def spread(layers: int) -> frozenset[int]:
    """Of so many blocks RIDDEN at most, the first and the last among them."""
    count = min(layers, RIDDEN)
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


def encode(
    algorithm: str, linears: Sequence[LinearLayout], weights: Mapping[str, Tensor], scheme: Scheme, sites: Sequence[Site] = ()
) -> dict[str, Encoded]:
    """By linear. Raises BadNumerics."""
    shaped = [_shaped(x, weights) for x in linears]
    stage = Stage(StageLayout(shaped[0].name, (), tuple(shaped)), {x.weight: weights[x.weight] for x in shaped}, sites=tuple(sites))
    made = encoder(algorithm, scheme.name)
    made.take({x.name: fitting(scheme, linears, weights) for x in linears})
    made.apply(stage)
    return stage.encoded


def fitting(scheme: Scheme, linears: Sequence[LinearLayout], weights: Mapping[str, Tensor]) -> Scheme:
    """The source's columns may be more than the result's, and not divisible by what these are divided by."""
    if scheme.group_size is None or not scheme.choosable_groups:
        return scheme
    return scheme.with_group_size(math.gcd(scheme.group_size, *(weights[x.weight].shape[1] for x in linears)))


def _shaped(linear: LinearLayout, weights: Mapping[str, Tensor]) -> LinearLayout:
    """As the source has it."""
    rows, columns = weights[linear.weight].shape
    return LinearLayout(linear.name, (rows, columns), linear.dtype, linear.kind, linear.fused, linear.shared)


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
