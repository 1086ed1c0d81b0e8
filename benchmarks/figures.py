"""What is made of measurements: percentiles, the slope of a line, a table. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["percentile", "slope", "table"]


def percentile(values: Iterable[float], percent: float) -> float:
    """Linear between the two nearest ranks. Raises ValueError without values."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values: nothing has been measured")
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the least-squares line through (x, y): units of y for one of x. Raises ValueError where all x are the same."""
    count = len(points)
    mean_x, mean_y = (sum(point[axis] for point in points) / max(count, 1) for axis in (0, 1))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if not spread:
        raise ValueError(f"{count} points at one x have no slope: measure for longer")
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """In Markdown. Floats with three significant digits, larger ones whole."""
    lines = [heads, ["---"] * len(heads), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
