"""Which sets of layers with full attention are worth trying together, by what each layer loses alone. No torch.

Two layers that do the same are each missed little while the other is there, and one that is missed much may be of no use without another.
So beside the layers of the highest scores stand those where one of them makes way for another, and evenly spaced ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SETS = 16
"""At most."""
EVEN = 4
"""Offsets of evenly spaced ones, at most."""


def sets(scores: Mapping[int, float], count: int) -> list[tuple[int, ...]]:
    """Of `count` layers each, ascending; none twice. First those of the highest scores, of equals the first layers, then evenly spaced
    ones, then as many swaps of one layer as there is room for, those first that lose least of the scores' sum."""
    order = sorted(scores, key=lambda layer: (-scores[layer], layer))
    best, others = order[:count], order[count:]
    found = dict.fromkeys([tuple(sorted(best)), *even(sorted(scores), count)])
    swaps = sorted((scores[out] - scores[into], out, into) for out in best for into in others)
    for _, out, into in swaps:
        if len(found) < SETS:
            found[tuple(sorted({*best, into} - {out}))] = None
    return list(found)


def even(layers: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Every k-th of these, from each of the first k on, or from EVEN of them."""
    step = len(layers) // count
    offsets = range(step) if step <= EVEN else [i * (step - 1) // (EVEN - 1) for i in range(EVEN)]
    return [tuple(layers[first + i * len(layers) // count] for i in range(count)) for first in offsets]
