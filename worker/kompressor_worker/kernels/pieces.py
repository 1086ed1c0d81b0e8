"""Long work on a CPU cut into pieces: between two of them a worker that was told to stop hears it. On a GPU no work is that long."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

PIECE = 2e11
"""Multiply-adds of a piece at most: some three seconds on two cores, and so many that what is cut runs as fast as before."""
FEWEST = 512
"""Rows of a piece at least."""

Heard = Callable[[], None]
"""Called between two pieces; raises when it is time to stop."""


def unheard() -> None:
    """Where nobody listens."""


def row_pieces(matrix: Tensor, work: float) -> Iterator[slice]:
    """The rows of `matrix`, of `work` multiply-adds each, in pieces of whole multiples of FEWEST."""
    rows = len(matrix)
    size = max(1, int(PIECE / work) // FEWEST) * FEWEST if matrix.is_cpu else rows
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
