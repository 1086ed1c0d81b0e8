"""On which kind of device which units were made: on one, unless the job allowed another to go on (`worker.allowDeviceChange`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Span:
    first: int
    """The unit from which on `device` made them; up to the next span's, or all that follow."""
    device: str
    """As in the fingerprint."""


def spans(known: Sequence[Span], unit: int, old: str, new: str) -> tuple[Span, ...]:
    """`known` (none: all by `old`) where `unit` and those after it are made by `new`; none where all are one device's."""
    made = [span for span in known or (Span(0, old),) if span.first < unit]
    if not made or made[-1].device != new:
        made.append(Span(unit, new))
    return tuple(made) if len(made) > 1 else ()


def facts(made: Sequence[Span], units: Sequence[str]) -> list[dict[str, Any]]:
    """For kompressor.json: each device, the names of the first and the last unit that it made, and how many they are."""
    ends = [*(span.first for span in made[1:]), len(units)]
    return [
        {"device": span.device, "first": units[span.first], "last": units[end - 1], "units": end - span.first}
        for span, end in zip(made, ends, strict=True)
    ]


def warning(found: Sequence[Mapping[str, Any]]) -> str:
    """What a reader of the result should know."""
    parts = "; ".join(f"{each['first']} to {each['last']} on {each['device']}" for each in found)
    return f"made on more than one kind of device, as worker.allowDeviceChange let it: {parts}. One device alone makes other bytes"
