"""Kubernetes quantities ("500m", "1.5Gi", "2e3") as exact numbers."""

import math
from fractions import Fraction

_SUFFIXES = {
    "n": Fraction(1, 10**9), "u": Fraction(1, 10**6), "m": Fraction(1, 1000), "": Fraction(1),
    "k": Fraction(10**3), "M": Fraction(10**6), "G": Fraction(10**9), "T": Fraction(10**12),
    "P": Fraction(10**15), "E": Fraction(10**18),
    "Ki": Fraction(2**10), "Mi": Fraction(2**20), "Gi": Fraction(2**30), "Ti": Fraction(2**40),
    "Pi": Fraction(2**50), "Ei": Fraction(2**60),
}  # fmt: skip


def parse(text: str | int | float) -> Fraction:
    """The exact value; ValueError for anything that is not a quantity."""
    digits = str(text).strip()
    for length in (2, 1):
        suffix = digits[-length:]
        if suffix in _SUFFIXES and len(digits) > length:
            return Fraction(digits[:-length]) * _SUFFIXES[suffix]
    return Fraction(digits)


def divided(quantity: str | int, divisor: str | int) -> str:
    """`quantity / divisor` rounded up, as resourceFieldRef shows it; a divisor of 0 or none counts as 1."""
    return str(math.ceil(parse(quantity) / (parse(divisor) or 1)))
