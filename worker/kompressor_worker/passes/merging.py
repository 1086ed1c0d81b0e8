"""Which experts are alike, and one expert of several: clusters by outputs, neurons matched, weights averaged, router rows joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from kompressor_worker.layout import LinearLayout


def clusters(products: Tensor, tokens: Tensor, kept: int, groups: int) -> list[list[int]]:
    """As many clusters of each group; a cluster's most frequent member first, clusters by that one's number.

    `products` [experts, experts] of outputs, `tokens` [experts] routed to each."""
    within, found = len(tokens) // groups, list[list[int]]()
    for start in range(0, len(tokens), within):
        part = slice(start, start + within)
        some = [[start + n for n in members] for members in agglomerated(products[part, part], tokens[part], kept // groups)]
        ordered = [sorted(members, key=lambda expert: (-float(tokens[expert]), expert)) for members in some]
        found += sorted(ordered)
    return found


def agglomerated(products: Tensor, tokens: Tensor, kept: int) -> list[list[int]]:
    """Ward's: of all pairs of clusters those become one next whose members' outputs, weighted with their tokens, lose least when the mean
    stands for them."""
    weight = tokens.double() + 1.0  # an expert that no token goes to loses little, and is still told from another
    squares = products.double().diagonal()
    distance = squares[:, None] + squares[None, :] - 2 * products.double()
    cost = distance * weight[:, None] * weight[None, :] / (weight[:, None] + weight[None, :])
    cost.fill_diagonal_(float("inf"))
    members = {n: [n] for n in range(len(weight))}
    while len(members) > kept:
        a, b = sorted(divmod(int(cost.argmin()), len(weight)))
        sums = weight[a] + weight[b] + weight
        joint = ((weight[a] + weight) * cost[a] + (weight[b] + weight) * cost[b] - weight * cost[a, b]) / sums  # Lance and Williams 1967
        joint[[a, *(n for n in range(len(weight)) if n not in members)]] = float("inf")
        cost[a], cost[:, a] = joint, joint
        cost[b], cost[:, b] = float("inf"), float("inf")
        weight[a] += weight[b]
        members[a] += members.pop(b)
    return list(members.values())


def joined(found: Sequence[Sequence[int]], tokens: Tensor) -> Tensor:
    """fp32 [clusters, experts]: by what the router's rows are multiplied, so that each cluster has one."""
    rows = torch.zeros(len(found), len(tokens))
    for new, members in enumerate(found):
        rows[new, list(members)] = shares(tokens[list(members)])
    return rows


def shares(tokens: Tensor) -> Tensor:
    """fp32, of one; alike where no token goes to any."""
    weight = tokens.float() if float(tokens.sum()) else torch.ones(len(tokens))
    return weight / weight.sum()


class Average:
    """One expert of those that are added, the first of which is the one that the others' neurons are matched to.

    Held are the first one's weights and a sum, however many come."""

    def __init__(self) -> None:
        self._first: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._biases: list[Tensor | None] = []
        self._tokens = 0.0

    def add(self, linears: Sequence[LinearLayout], weights: Mapping[str, Tensor], tokens: int) -> None:
        parts, biases = neurons(linears, weights)
        share = float(tokens) or 1e-6  # nobody's weights are averaged if no token goes to any
        if not self._first:
            self._first, order = parts, torch.arange(parts[0].shape[0], device=parts[0].device)
            self._sums = [torch.zeros_like(part, dtype=torch.float32) for part in parts]
            self._biases = [None if bias is None else torch.zeros_like(bias, dtype=torch.float32) for bias in biases]
        else:
            order = matched(self._first, parts)
        for total, part in zip(self._sums, parts, strict=True):
            total.add_(part[order].float(), alpha=share)
        for held, bias, last in zip(self._biases, biases, [False] * (len(biases) - 1) + [True], strict=True):
            if held is not None and bias is not None:
                held.add_(bias.float() if last else bias[order].float(), alpha=share)
        self._tokens += share

    def result(self, linears: Sequence[LinearLayout], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By full name, in the dtype and shape of the last one."""
        sums = [total / self._tokens for total in self._sums]
        *rows, columns = sums
        made = {linears[-1].weight: columns.T}
        biased = {f"{linears[-1].name}.bias": self._biases[-1]}
        each = len(rows) // (len(linears) - 1)
        for at, linear in enumerate(linears[:-1]):
            own = slice(at * each, (at + 1) * each)
            made[linear.weight] = torch.cat(rows[own])
            parts = [bias for bias in self._biases[:-1][own] if bias is not None]
            biased[f"{linear.name}.bias"] = torch.cat(parts) if parts else None
        made |= {name: bias / self._tokens for name, bias in biased.items() if bias is not None}
        return {name: value.to(weights[name].dtype).contiguous() for name, value in made.items()}


def neurons(linears: Sequence[LinearLayout], weights: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """[neurons, hidden] of gate, up and down, and their biases; gate and up may be one weight, one after the other."""
    *before, down = linears
    columns = weights[down.weight].T
    parts, biases = list[Tensor](), list[Tensor | None]()
    for linear in before:
        bias = weights.get(f"{linear.name}.bias")
        pieces = torch.split(weights[linear.weight], len(columns))
        parts += pieces
        biases += [None] * len(pieces) if bias is None else list(torch.split(bias, len(columns)))
    return [*parts, columns], [*biases, weights.get(f"{down.name}.bias")]


def matched(first: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """int64: which neuron of the other one is most like each of the first's, every one taken once: of all permutations the one that leaves
    the least squared distance between the weights (Kuhn 1955)."""
    likeness = sum(a.float() @ b.float().T for a, b in zip(first, other, strict=True))
    assert isinstance(likeness, Tensor)
    _, order = linear_sum_assignment(likeness.cpu().numpy(), maximize=True)
    return torch.from_numpy(order).to(first[0].device)
