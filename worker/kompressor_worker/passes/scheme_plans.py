"""Whole plans, a candidate for each group, that are worth trying together: the integer program's, and what else a budget could be spent on.
No torch.

Costs of single groups add up nearly, not quite, and are measured on few rows. So beside the program's answer stand the next best ones, and
what one would choose without measuring: the same for all, and more bits in the first and the last blocks. `plan_trials` runs them all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kompressor_worker.passes.scheme_choice import Candidate, Costs, Cut, SchemeGroup, another, best, total, weight_of

KINDS = ("program", "next best", "uniform", "first and last")
NEXT = 3
"""Of the program's next best answers."""
PLANS = 1 + NEXT + 2
"""At most."""
APART = 8
"""In one of so many groups each of them is another one than those before."""


@dataclass(frozen=True)
class Plan:
    kind: str
    """Of KINDS."""
    chosen: tuple[int, ...]
    """Candidates by group."""


def plans(costs: Costs, variants: Sequence[Sequence[SchemeGroup]], layers: Sequence[int], budget: int) -> list[Plan]:
    """The program's first; of each other kind those of least cost, none twice. `layers`: of the groups, counted from 0."""
    found = [Plan("program", tuple(best(costs, variants, budget)))]

    def add(kind: str, chosen: Sequence[int]) -> None:
        if all(plan.chosen != tuple(chosen) for plan in found):
            found.append(Plan(kind, tuple(chosen)))

    for kind, made in (("uniform", uniform), ("first and last", outer)):
        fitting = [each for groups in variants for each in made(groups, layers, budget)]
        if fitting:
            add(kind, min(fitting, key=lambda each: total(costs, each)))
    cuts = [Cut(found[0].chosen, math.ceil(len(costs) / APART))]
    for _ in range(NEXT):
        chosen = another(costs, variants, budget, cuts)
        if chosen is None:
            break
        add("next best", chosen)
        cuts.append(Cut(tuple(chosen), cuts[0].groups))
    return found


def uniform(groups: Sequence[SchemeGroup], layers: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Each candidate everywhere, within the budget; groups that cannot have it get the smallest that they can."""
    for c in range(len(groups[0].nbytes)):
        chosen = [_or_smallest(group, c) for group in groups]
        if weight_of(groups, chosen) <= budget:
            yield chosen


def outer(groups: Sequence[SchemeGroup], layers: Sequence[int], budget: int) -> Iterator[list[int]]:
    """One candidate in so many blocks at both ends, and a smaller one between: for each two as many as there is room for."""
    count = max(layers) + 1
    for low, high in ((a, b) for a in range(len(groups[0].nbytes)) for b in range(len(groups[0].nbytes)) if a != b):
        fitting: list[int] | None = None
        for depth in range(1, (count + 1) // 2):
            ends = [layer < depth or layer >= count - depth for layer in layers]
            chosen = [_or_smallest(group, high if end else low) for group, end in zip(groups, ends, strict=True)]
            if weight_of(groups, chosen) > budget:
                break
            fitting = chosen
        if fitting is not None:
            yield fitting


def _or_smallest(group: SchemeGroup, candidate: int) -> int:
    if group.nbytes[candidate] is not None:
        return candidate
    return min((size, c) for c, size in enumerate(group.nbytes) if size is not None)[1]


def named(plan: Plan, groups: Sequence[SchemeGroup], layers: Sequence[int], candidates: Sequence[Candidate]) -> str:
    """What the report calls it."""
    if plan.kind not in ("uniform", "first and last"):
        return plan.kind
    ends, between = Counter[int](), Counter[int]()
    for group, layer, c in zip(groups, layers, plan.chosen, strict=True):
        (ends if layer in (0, max(layers)) else between)[c] += group.weights
    low, high = (candidates[max(of, key=lambda c: (of[c], -c))].name for of in (between or ends, ends))
    if plan.kind == "uniform":
        return f"{high} everywhere"
    return f"{high} in the first and last blocks, {low} between"
