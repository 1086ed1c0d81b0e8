"""Which scheme each group of linears gets, where only what they may weigh together is given: an integer program. No torch.

    minimise sum of costs[g][c], one candidate c for each group g, so that the sum of nbytes[g][c] is within the budget

HiGHS solves it (scipy.optimize.milp, imported only then). What it answers depends on nothing but its input: of candidates that cost as much
the smaller one is taken, of those that also weigh as much the first one asked for, and of groups that are alike the first gets the most.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

from kompressor_worker.errors import UserError
from kompressor_worker.formats.gguf_mixes import MIXES
from kompressor_worker.layout import LinearLayout, ModelLayout
from kompressor_worker.passes.result_bytes import stored_bytes
from kompressor_worker.passes.shapes import check_shapes, is_routed_expert
from kompressor_worker.schemes import COMPRESSED_TENSORS, GGUF, Scheme

EXACT = "none"
CHOOSABLE = COMPRESSED_TENSORS | {name: scheme for name, scheme in GGUF.items() if name in MIXES}
"""By name; types of GGUF only those that are asked for by their names, and are not what rows get in place of them."""
GAP = 1e-6
"""Relative: a solution so near the best one is as good."""
ROUGH = 1e-3
"""The same for the report's curve."""
NODES = 20_000
"""Of the solver's tree at most; a count and not a time, so that every run ends alike."""
SWEPT = 24
"""Budgets from the smallest to the largest that the report's curve is made of."""


@dataclass(frozen=True)
class Candidate:
    """What a linear may become."""

    name: str
    """As it was asked for."""
    scheme: Scheme | None
    """None: it is left exact."""

    @classmethod
    def of(cls, name: str) -> Candidate:
        """Of `W4A16`, `W4A16:32` or `none`. Raises ValueError."""
        if name == EXACT:
            return cls(name, None)
        scheme, _, group = name.partition(":")
        if scheme not in CHOOSABLE:
            near = difflib.get_close_matches(scheme, [*CHOOSABLE, EXACT], n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(CHOOSABLE)}, {EXACT}"
            raise ValueError(f"{name!r} is not a scheme; {hint}")
        found = CHOOSABLE[scheme]
        if not group:
            return cls(name, found)
        if not found.choosable_groups:
            raise ValueError(f"{name!r}: the groups of {scheme} are fixed; leave {group} out")
        if re.fullmatch(r"-1|[1-9][0-9]{0,4}", group) is None:
            raise ValueError(f"{name!r}: behind the colon stands the group size, such as 32, or -1 for one scale a channel")
        return cls(name, found.with_group_size(int(group)))


@dataclass(frozen=True)
class SchemeGroup:
    """Linears that get the same scheme, because loaders hold them as one."""

    name: str
    linears: tuple[LinearLayout, ...]
    nbytes: tuple[int | None, ...]
    """By candidate: what they weigh in it; None: they cannot be stored so."""

    @property
    def weights(self) -> int:
        return sum(prod(x.shape) for x in self.linears)

    @property
    def routed(self) -> bool:
        """Whether these are experts of a mixture."""
        return is_routed_expert(self.linears[0].name)


def groups_of(layout: ModelLayout, linears: Sequence[LinearLayout], candidates: Sequence[Candidate], single: bool) -> list[SchemeGroup]:
    """In the model's order. `single`: every expert by itself. Raises UserError: a candidate that nothing can be stored in, linears without
    any."""
    members: dict[str, list[LinearLayout]] = {}
    for linear in linears:
        routed = is_routed_expert(linear.name)
        if routed and single:
            name = linear.name.rpartition(".")[0]
        else:  # a GGUF file fuses nothing but experts
            name = linear.fused if linear.fused and (routed or layout.file_format != "gguf") else linear.name
        members.setdefault(name, []).append(linear)
    reasons: dict[str, str] = {}
    groups = []
    for name, found in members.items():
        sizes: list[int | None] = []
        refused: list[str] = []
        for candidate in candidates:
            if candidate.scheme is not None and (reason := _refusal(layout, found, candidate.scheme)):
                reasons.setdefault(candidate.name, reason)
                refused.append(reason)
                sizes.append(None)
            else:
                sizes.append(sum(stored_bytes(linear, candidate.scheme) for linear in found))
        if len(refused) == len(candidates):
            raise UserError(f"autoScheme: no candidate fits {name}: {refused[0]}")
        groups.append(SchemeGroup(name, tuple(found), tuple(sizes)))
    for number, candidate in enumerate(candidates):
        if all(group.nbytes[number] is None for group in groups):
            raise UserError(f"autoScheme: candidate {candidate.name} fits no targeted linear: {reasons[candidate.name]}")
    return groups


def _refusal(layout: ModelLayout, linears: Sequence[LinearLayout], scheme: Scheme) -> str:
    try:
        check_shapes(layout, linears, scheme)
    except UserError as error:
        return str(error)
    return ""


def smallest(groups: Sequence[SchemeGroup]) -> int:
    return sum(min(size for size in group.nbytes if size is not None) for group in groups)


def largest(groups: Sequence[SchemeGroup]) -> int:
    return sum(max(size for size in group.nbytes if size is not None) for group in groups)


def filled(groups: Sequence[SchemeGroup], budget: int) -> list[int]:
    """Candidates by group, before anything is known of what they cost: the first groups get the largest that there is still room for."""
    sizes = [{c: size for c, size in enumerate(group.nbytes) if size is not None} for group in groups]
    chosen = [min(of, key=lambda c: (of[c], c)) for of in sizes]
    left = max(0, budget - sum(of[c] for of, c in zip(sizes, chosen, strict=True)))
    for number, of in enumerate(sizes):
        fitting = [c for c in of if of[c] - of[chosen[number]] <= left]
        best = max(fitting, key=lambda c: (of[c], -c))
        left -= of[best] - of[chosen[number]]
        chosen[number] = best
    return chosen


Costs = Sequence[Mapping[int, float]]
"""By group: candidate to what it costs; those that it cannot have are left out."""


@dataclass(frozen=True)
class Cut:
    """Choices that are too much like one that is known: with fewer than `groups` groups in another candidate than `chosen`."""

    chosen: Sequence[int]
    groups: int


def solved(costs: Costs, sizes: Sequence[Sequence[int | None]], budget: int, gap: float = GAP) -> list[int]:
    """Candidates by group: within `budget` bytes, and of all such choices one of least cost. `sizes` by group and candidate."""
    found = _solved(costs, sizes, budget, gap, ())
    assert found is not None, "nothing is cut"
    return found


def _solved(costs: Costs, sizes: Sequence[Sequence[int | None]], budget: int, gap: float, cuts: Sequence[Cut]) -> list[int] | None:
    """`solved`; None where the cuts leave nothing."""
    options = [undominated(cost, size) for cost, size in zip(costs, sizes, strict=True)]
    weigh = [[size for _, size in each] for each in options]
    price = [[cost[c] for c, _ in each] for cost, each in zip(costs, options, strict=True)]
    assert sum(min(each) for each in weigh) <= budget, "refused before"
    held = [[c for c, _ in each] for each in options]
    apart = [([at.index(c) if c in at else None for at, c in zip(held, cut.chosen, strict=True)], cut.groups) for cut in cuts]
    found = _program(price, weigh, budget, gap, apart)
    if found is None:
        return None
    chosen = ordered(price, weigh, brought_down(price, weigh, found, budget))
    return [each[at][0] for each, at in zip(options, chosen, strict=True)]


def undominated(cost: Mapping[int, float], size: Sequence[int | None]) -> list[tuple[int, int]]:
    """(candidate, bytes), smallest first: of those that weigh no less and cost no less than another one none is left."""
    kept: list[tuple[int, int]] = []
    held = [(nbytes, cost[c], c) for c in cost if (nbytes := size[c]) is not None]
    for nbytes, price, c in sorted(held):
        if not kept or price < cost[kept[-1][0]]:
            kept.append((c, nbytes))
    return kept


def ordered(price: Sequence[Sequence[float]], weigh: Sequence[Sequence[int]], chosen: Sequence[int]) -> list[int]:
    """Of groups that are alike in all, the first ones get the larger choices."""
    alike: dict[tuple[tuple[float, ...], tuple[int, ...]], list[int]] = {}
    for number, (prices, sizes) in enumerate(zip(price, weigh, strict=True)):
        alike.setdefault((tuple(prices), tuple(sizes)), []).append(number)
    result = list(chosen)
    for members in alike.values():
        for number, choice in zip(members, sorted((chosen[m] for m in members), reverse=True), strict=True):
            result[number] = choice
    return result


def _program(
    price: Sequence[Sequence[float]],
    weigh: Sequence[Sequence[int]],
    budget: int,
    gap: float,
    cuts: Sequence[tuple[Sequence[int | None], int]],
) -> list[int] | None:
    """Positions in `price` by group. `cuts`: positions, None where none of these is meant, of which so many groups must not be."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    counts = [len(each) for each in price]
    starts = np.cumsum([0, *counts])
    columns = np.arange(starts[-1])
    one = csr_array((np.ones(starts[-1]), (np.repeat(np.arange(len(counts)), counts), columns)), shape=(len(counts), starts[-1]))
    nbytes = np.concatenate([np.asarray(each, dtype=np.float64) for each in weigh])
    flat = np.concatenate([np.asarray(each, dtype=np.float64) for each in price])
    constraints = [LinearConstraint(one, 1, 1), LinearConstraint(csr_array(nbytes[None] / max(budget, 1)), -np.inf, 1)]
    for positions, apart in cuts:
        alike = np.zeros(len(flat))
        alike[[start + at for start, at in zip(starts, positions, strict=False) if at is not None]] = 1.0
        constraints.append(LinearConstraint(csr_array(alike[None]), -np.inf, len(counts) - apart))
    said = milp(
        flat / max(float(flat.max()), 1e-300),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": gap, "node_limit": NODES, "presolve": not cuts},
    )
    if said.x is None and cuts:
        return None
    assert said.x is not None, f"HiGHS: {said.message}"
    return [int(np.argmax(said.x[start:stop])) for start, stop in pairwise(starts)]


def brought_down(price: Sequence[Sequence[float]], weigh: Sequence[Sequence[int]], chosen: Sequence[int], budget: int) -> list[int]:
    """Within the budget to the byte: the solver's answer may be over it by its tolerance. What costs least a byte gives way."""
    result = list(chosen)
    while sum(each[at] for each, at in zip(weigh, result, strict=True)) > budget:
        steps = [((price[g][to] - price[g][at]) / (weigh[g][at] - weigh[g][to]), g, to) for g, at in enumerate(result) for to in range(at)]
        _, g, to = min(steps)
        result[g] = to
    return result


def shared_by_experts(candidates: Sequence[Candidate], groups: Sequence[SchemeGroup]) -> list[int]:
    """Candidates that all experts of the model can have."""
    return [c for c in range(len(candidates)) if all(g.nbytes[c] is not None for g in groups if g.routed)]


def within(groups: Sequence[SchemeGroup], only: int) -> list[SchemeGroup]:
    """With experts in this candidate alone."""
    return [replace(g, nbytes=tuple(x if c == only else None for c, x in enumerate(g.nbytes))) if g.routed else g for g in groups]


def best(costs: Costs, variants: Sequence[Sequence[SchemeGroup]], budget: int, gap: float = GAP) -> list[int]:
    """`solved` for each of these restrictions of the same groups that there is room for; the cheapest, of equals the first."""
    found = another(costs, variants, budget, (), gap)
    assert found is not None, "nothing is cut"
    return found


def another(
    costs: Costs, variants: Sequence[Sequence[SchemeGroup]], budget: int, cuts: Sequence[Cut], gap: float = GAP
) -> list[int] | None:
    """The same apart from what is known; None where nothing is left."""
    found: list[tuple[float, int, list[int]]] = []
    for number, groups in enumerate(variants):
        if smallest(groups) <= budget:
            possible = [{c: x for c, x in cost.items() if g.nbytes[c] is not None} for cost, g in zip(costs, groups, strict=True)]
            chosen = _solved(possible, [g.nbytes for g in groups], budget, gap, cuts)
            if chosen is not None:
                found.append((total(costs, chosen), number, chosen))
    return min(found)[2] if found else None


def weight_of(groups: Sequence[SchemeGroup], chosen: Sequence[int]) -> int:
    """Bytes."""
    return sum(group.nbytes[c] or 0 for group, c in zip(groups, chosen, strict=True))


def total(costs: Costs, chosen: Sequence[int]) -> float:
    return math.fsum(cost[c] for cost, c in zip(costs, chosen, strict=True))


def sweep(costs: Costs, groups: Sequence[SchemeGroup], variants: Sequence[Sequence[SchemeGroup]]) -> list[tuple[int, float]]:
    """(bytes, cost) of good choices for budgets from the smallest to the largest: more bytes, less cost."""
    low, high = min(map(smallest, variants)), max(map(largest, variants))
    found: list[tuple[int, float]] = []
    for step in range(SWEPT):
        chosen = best(costs, variants, low + (high - low) * step // (SWEPT - 1), ROUGH)
        point = weight_of(groups, chosen), total(costs, chosen)
        if not found or (point[0] > found[-1][0] and point[1] < found[-1][1]):
            found.append(point)
    return found
