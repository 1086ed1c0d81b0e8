"""How much of a weight is to be zero, known from the spec alone. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Sparsity:
    """A share of all weights, or of every `of` neighbours in a row all but `keep`."""

    share: float
    keep: int = 0
    of: int = 0
    """0: unstructured."""

    @classmethod
    def of_pattern(cls, pattern: str) -> Sparsity:
        """Of "N:M": N weights are kept of every M neighbours."""
        keep, of = map(int, pattern.split(":"))
        return cls((of - keep) / of, keep, of)

    def zeros(self, shape: tuple[int, ...]) -> int:
        """At least so many of a weight of this shape."""
        return prod(shape) // self.of * (self.of - self.keep) if self.of else round(prod(shape) * self.share)

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" if self.of else f"{100 * self.share:.3g}%"
