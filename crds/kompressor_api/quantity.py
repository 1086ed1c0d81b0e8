"""Kubernetes quantities (500m, 24Gi, 2e3) as exact numbers, and bytes as quantities. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction

_QUANTITY = re.compile(r"^(?P<number>[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,2})?)(?P<suffix>[KMGTPE]i|[numkMGTPE])?$")
_SUFFIXES: Mapping[str | None, Fraction] = (
    {None: Fraction(1)}
    | {f"{letter}i": Fraction(1024**power) for power, letter in enumerate("KMGTPE", 1)}
    | {letter: Fraction(1000**power) for power, letter in enumerate("kMGTPE", 1)}
    | {letter: Fraction(1, 1000**power) for power, letter in enumerate("mun", 1)}
)


def parse(quantity: str | int | float) -> Fraction:
    """Exact value. Raises ValueError for what is no quantity."""
    found = _QUANTITY.match(str(quantity))
    if not found:
        raise ValueError(f"{quantity!r} is no quantity; give one such as 500m or 24Gi")
    return Fraction(found["number"]) * _SUFFIXES[found["suffix"]]


def rounded_up(amount: float, step: int) -> str:
    """Bytes as Mi, up to the next multiple of `step` bytes, itself a multiple of a Mi."""
    return f"{math.ceil(amount / step) * (step >> 20)}Mi"


def readable(amount: int) -> str:
    """Bytes for people: 512Mi, 3.2Gi."""
    return f"{amount / 2**30:.1f}Gi" if amount >= 2**30 else f"{math.ceil(amount / 2**20)}Mi"
