"""How many weights of each linear become zero, where only their number in all is given. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

LARGEST = 0.95
"""Of a linear's weights, at most so many become zero."""
STEPS = 95
SHARES = tuple(LARGEST * i / STEPS for i in range(STEPS + 1))
"""Those that an error curve has a value for."""
TRIED = 16
"""Calibration rows that a block with one kind of its linears pruned is tried on, at least; as many more as share a batch with them."""
KINDS = 7
"""Of linears in a block, and so many trials: q, k, v, o, gate, up and down; a mixture's experts share the last three."""


def trials(share: float) -> tuple[float, ...]:
    """At which shares each kind of linears is tried where `share` is asked for, ascending."""
    return tuple(sorted({share / 2, share, (share + LARGEST) / 2}))


def allocate(curves: Mapping[str, Sequence[float]], weights: Mapping[str, int], zeros: int) -> dict[str, int]:
    """Zeros by linear: `zeros` in all, and of all ways to have so many one of least error.

    `curves`: errors at SHARES, by linear; `weights`: how many it has. Between two of the shares a curve is a straight line, and where it
    is not convex its lower hull stands for it: then whatever is cheapest comes next (Fox 1966), and a linear's parts in their order."""
    most = {name: round(LARGEST * weights[name]) for name in curves}
    assert 0 <= zeros <= sum(most.values()), f"{zeros} zeros of {sum(most.values())} that there may be"
    parts = []
    for order, (name, errors) in enumerate(curves.items()):
        corners = hull([(most[name] * i // STEPS, error) for i, error in enumerate(errors)])
        for number, ((start, before), (stop, after)) in enumerate(pairwise(corners)):
            parts.append(((after - before) / (stop - start), order, number, name, stop - start))
    given = dict.fromkeys(curves, 0)
    for _, _, _, name, count in sorted(parts):
        taken = min(count, zeros)
        given[name] += taken
        zeros -= taken
    return given


def hull(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The lower convex hull of points (x, y), x ascending; of equal x the first."""
    corners: list[tuple[int, float]] = []
    for x, y in points:
        if corners and corners[-1][0] == x:
            continue
        while len(corners) > 1 and slope(corners[-2], corners[-1]) >= slope(corners[-1], (x, y)):
            corners.pop()
        corners.append((x, y))
    return corners


def slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
