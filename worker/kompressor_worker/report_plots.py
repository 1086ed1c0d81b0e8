"""Plots of the report: plain SVG, coloured by the page's style, so that light and dark are the style's affair."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from html import escape

WIDTH = 960
LEFT = 64
"""Of a plot's area, where the numbers of the axis stand."""
Say = Callable[[float], str]


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def columns(
    points: Sequence[tuple[str, float]],
    say: Say,
    *,
    limit: float | None = None,
    over: Sequence[str] = (),
    kind: str = "",
    height: int = 190,
) -> str:
    """One column a point (name, value >= 0); those in `over` in the colour of what is wrong, `limit` as a dashed line."""
    points = [(name, value) for name, value in points if math.isfinite(value)]
    if not points:
        return ""
    ticks = _ticks(max([value for _, value in points] + [limit or 0.0]))
    top, step = ticks[-1] or 1.0, (WIDTH - LEFT) / len(points)
    thick = min(46.0, step * 0.72)
    parts = [_axis(ticks, top, height, say)]
    for number, (name, value) in enumerate(points):
        x, size = LEFT + step * (number + 0.5), height * value / top
        tone = "bad" if name in over else kind
        parts.append(
            f'<rect class="mark {tone}" x="{x - thick / 2:.1f}" y="{height - size:.1f}" width="{thick:.1f}" height="{max(size, 0.8):.1f}" '
            f'rx="{min(3.0, thick / 3):.1f}"><title>{escape(name)}: {escape(say(value))}</title></rect>'
        )
    if limit is not None:
        y = height * (1 - limit / top)
        parts.append(f'<line class="limit-line" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="limit" x="{WIDTH}" y="{y - 5:.1f}" text-anchor="end">threshold {escape(say(limit))}</text>')
    parts.append(_names([short(name) for name, _ in points], step, height + 17))
    return _svg(height + 26, parts, top=12)


def pairs(points: Sequence[tuple[str, float, float]], say: Say) -> str:
    """Two bars a point (name, before >= 0, after >= 0), one below the other, with what they say at their ends."""
    points = [(name, before, after) for name, before, after in points if math.isfinite(before) and math.isfinite(after)]
    largest = max((max(before, after) for _, before, after in points), default=0.0)
    if not largest:
        return ""
    left, room, tall = 110, WIDTH - 110 - 110, 16
    parts = []
    for number, (name, *values) in enumerate(points):
        top = number * (2 * tall + 14)
        parts.append(f'<text x="{left - 10}" y="{top + tall + 4}" text-anchor="end">{escape(name)}</text>')
        for line, (value, tone) in enumerate(zip(values, ("second", ""), strict=True)):
            y, wide = top + line * (tall + 2), room * value / largest
            parts.append(f'<rect class="mark {tone}" x="{left}" y="{y}" width="{max(wide, 0.8):.1f}" height="{tall}" rx="3"/>')
            parts.append(f'<text x="{left + wide + 8:.1f}" y="{y + 12}">{escape(say(value))}</text>')
    return _svg(len(points) * (2 * tall + 14), parts)


def heat(
    cells: Mapping[tuple[str, str], tuple[float, str]],
    rows: Sequence[str],
    across: Sequence[str],
    say: Say,
    *,
    framed: Collection[tuple[str, str]] = (),
) -> str:
    """A cell for each (row, column) that has a value, and a text to show with it: pale for the smallest, full colour for the largest;
    those in `framed` in a frame in the colour of what is wrong."""
    values = [value for value, _ in cells.values() if math.isfinite(value)]
    if not values:
        return ""
    low, high = min(values), max(values)
    low = min(low, high * 0.9)  # where all are equal, no difference is made up
    left = min(260.0, 14 + 7.0 * max(len(row) for row in rows))
    step, tall = min(74.0, (WIDTH - left) / len(across)), 24
    parts = []
    for y, row in enumerate(rows):
        parts.append(f'<text x="{left - 10:.0f}" y="{y * tall + 16}" text-anchor="end">{escape(row)}</text>')
        for x, column in enumerate(across):
            value, text = cells.get((row, column), (math.nan, ""))
            wide, corner = step - min(2, step / 5), min(4.0, step / 4)
            box = f'x="{left + x * step:.1f}" y="{y * tall}" width="{wide:.1f}" height="{tall - 2}" rx="{corner:.1f}"'
            if not math.isfinite(value):
                parts.append(f'<rect class="none" {box} opacity="0.5"/>')
                continue
            strength = 0.1 + 0.9 * (value - low) / (high - low) if high > low else 0.1
            frame = " framed" if (row, column) in framed else ""
            parts.append(
                f'<rect class="cell{frame}" {box} fill-opacity="{strength:.2f}"><title>{escape(text)}: {escape(say(value))}</title></rect>'
            )
            if step >= 52:
                middle = left + (x + 0.5) * step - 1
                tone = "over" if strength > 0.6 else "in"
                parts.append(f'<text class="{tone}" x="{middle:.1f}" y="{y * tall + 15}" text-anchor="middle">{escape(say(value))}</text>')
    bottom = len(rows) * tall
    parts.append(_names([short(name) for name in across], step, bottom + 15, left))
    parts.append(_scale(say(min(values)), say(high), max(left + 270, left + step * len(across)), bottom + 22))
    return _svg(bottom + 36, parts)


def curve(points: Sequence[tuple[float, float]], marks: Sequence[tuple[float, float, str, str]], say_x: Say, say_y: Say) -> str:
    """A line through points (x, y), y > 0 on a logarithmic scale, and marked ones (x, y, tone, text)."""
    points = [(x, y) for x, y in points if y > 0 and math.isfinite(y)]
    marks = [mark for mark in marks if mark[1] > 0 and math.isfinite(mark[1])]
    if len(points) < 2:
        return ""
    height, xs = 220, [x for x, _ in points] + [x for x, *_ in marks]
    logs = [math.log10(y) for _, y in points] + [math.log10(y) for _, y, *_ in marks]
    left, right, low, high = min(xs), max(xs), math.floor(min(logs)), math.ceil(max(logs))
    high += high == low

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + 12 + (WIDTH - LEFT - 24) * (x - left) / ((right - left) or 1), height * (high - math.log10(y)) / (high - low)

    parts = []
    for power in range(low, high + 1):
        _, y = place(left, 10.0**power)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 9}" y="{y + 4:.1f}" text-anchor="end">{escape(say_y(10.0**power))}</text>')
    path = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(place(*point) for point in sorted(points)))
    parts.append(f'<path class="curve" d="{path}"/>')
    for x, y in points:
        parts.append(_dot(*place(x, y), 3, "", f"{say_x(x)}: {say_y(y)}"))
    for x, y, tone, text in marks:
        parts.append(_dot(*place(x, y), 6, tone, text))
    for part, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        x, _ = place(left + part * (right - left), 10.0**low)
        parts.append(f'<text x="{x:.1f}" y="{height + 17}" text-anchor="{anchor}">{escape(say_x(left + part * (right - left)))}</text>')
    return _svg(height + 26, parts, top=12)


def lines(series: Mapping[str, Sequence[tuple[float, float]]], say_x: Say, say_y: Say, *, marked: float | None = None) -> str:
    """A line for each name through its points (x, y >= 0), drawn one over the other and named above; `marked`: the x of a point to stand
    out."""
    drawn = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if len(points) > 1}
    if not drawn:
        return ""
    height, every = 200, [point for points in drawn.values() for point in points]
    left, right = min(x for x, _ in every), max(x for x, _ in every)
    ticks = _ticks(max(y for _, y in every))

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + 8 + (WIDTH - LEFT - 16) * (x - left) / ((right - left) or 1), height * (1 - max(y, 0.0) / ticks[-1])

    parts, named = [_axis(ticks, ticks[-1], height, say_y)], list[str]()
    for number, (name, points) in enumerate(drawn.items()):
        tone = ("", "second", "third")[number % 3]
        path = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(place(*point) for point in points))
        parts.append(f'<path class="curve {tone}" d="{path}"/>')
        apart = ' dx="18"' if named else ""
        named.append(f'<tspan class="{tone}"{apart}>{escape(name)}: last {escape(say_y(points[-1][1]))}</tspan>')
        if marked is not None and (at := next((point for point in points if point[0] == marked), None)):
            parts.append(_dot(*place(*at), 5, "second", f"{say_x(at[0])}: {say_y(at[1])}"))
    parts.append(f'<text x="{LEFT + 8}" y="-4">{"".join(named)}</text>')
    for part, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        x, _ = place(left + part * (right - left), 0.0)
        parts.append(f'<text x="{x:.1f}" y="{height + 17}" text-anchor="{anchor}">{escape(say_x(left + part * (right - left)))}</text>')
    return _svg(height + 26, parts, top=20)


def _dot(x: float, y: float, radius: float, tone: str, text: str) -> str:
    return f'<circle class="mark {tone}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"><title>{escape(text)}</title></circle>'


def short(name: str) -> str:
    """A block by its number, anything else by its last word."""
    last = name.rsplit(".", 1)[-1]
    return last if len(last) < 14 else last[:12] + "…"


def _scale(low: str, high: str, right: float, y: int) -> str:
    """From pale to full, with what both ends stand for."""
    start = right - 128 - 7 * len(high)
    boxes = (
        f'<rect class="cell" x="{start + 12 * i:.1f}" y="{y}" width="12" height="10" fill-opacity="{0.1 + 0.1 * i:.1f}"/>'
        for i in range(10)
    )
    before = f'<text x="{start - 8:.1f}" y="{y + 9}" text-anchor="end">{escape(low)}</text>'
    return f'{before}{"".join(boxes)}<text x="{start + 128:.1f}" y="{y + 9}">{escape(high)}</text>'


def _names(names: Sequence[str], step: float, y: int, left: float = LEFT) -> str:
    """Under the columns: words first, then numbers, every second, fifth, tenth ... where all have no room."""
    room = 9 + 7 * max((len(name) for name in names if name.isdecimal()), default=1)
    every = next((n for n in (1, 2, 5, 10, 20, 50) if n * step >= room), 100)
    taken: list[tuple[float, float]] = []
    written: list[str] = []
    for i, name in sorted(enumerate(names), key=lambda item: item[1].isdecimal()):
        middle, half = left + (i + 0.5) * step, 3.6 * len(name) + 4
        if (name.isdecimal() and int(name) % every) or any(middle - half < end and middle + half > start for start, end in taken):
            continue
        taken.append((middle - half, middle + half))
        written.append(f'<text x="{middle:.1f}" y="{y}" text-anchor="middle">{escape(name)}</text>')
    return "".join(written)


def _axis(ticks: Sequence[float], top: float, height: int, say: Say) -> str:
    lines = []
    for tick in ticks:
        y = height * (1 - tick / top)
        kind = "grid" if tick else "axis"
        lines.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{LEFT - 9}" y="{y + 4:.1f}" text-anchor="end">{escape(say(tick))}</text>')
    return "".join(lines)


def _ticks(largest: float) -> list[float]:
    """From 0 by 1, 2 or 5 times a power of ten, the last one not below `largest`; two to six of them."""
    if largest <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(largest / 4))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * 5 >= largest)
    return [step * i for i in range(math.ceil(largest / step - 1e-9) + 1)]


def _svg(height: float, parts: Sequence[str], top: int = 0) -> str:
    return f'<svg viewBox="0 {-top} {WIDTH} {height + top:.0f}" role="img">{"".join(parts)}</svg>'
