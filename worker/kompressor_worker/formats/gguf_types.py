"""The tensor types of a GGUF file as data: how many columns a block holds, in how many bytes, and where in them. Torch-free.

A row is whole blocks one after the other, so every type is local to a row. In a block lie half-precision scales, in some types small
integers by which these are multiplied, group by group, and the codes in planes of so many bits. ggml's `ggml-common.h` has the same as C
structs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kompressor_worker.schemes import Scheme


@dataclass(frozen=True)
class Plane:
    """Some bits of every code in a block. Each run of `width` bytes holds the bits of 8 / `bits` * `width` neighbours: of the first
    `width` of them in the lowest bits of each byte, of the next above them."""

    at: int
    bits: int
    width: int


@dataclass(frozen=True)
class GgufType:
    """A tensor type. Offsets in bytes from the start of a block."""

    name: str
    number: int
    """As tensor infos hold it."""
    block: int
    """Columns of a block."""
    nbytes: int
    fallback: str | None
    """What a row that is not made of whole blocks gets in its place."""
    group: int = 1
    """Columns that share a scale."""
    planes: tuple[Plane, ...] = ()
    """Lowest bits first."""
    scale: int = 0
    """Where the block's own scale lies: an fp16 number, or an exponent in one byte (MXFP4)."""
    minimum: int | None = None
    """Where the block's own minimum lies, fp16."""
    small: Literal["nibbles", "six", "signed six", "bytes"] | None = None
    """How the groups' integers are packed that the block's scale (and its minimum) are multiplied by."""
    small_at: int = 0
    levels: tuple[int, ...] = ()
    """What each code stands for, in scales."""

    @property
    def bits(self) -> int:
        return sum(plane.bits for plane in self.planes)

    @property
    def small_range(self) -> tuple[int, int]:
        """Of the groups' integers."""
        assert self.small is not None, self.name
        return {"nibbles": (0, 15), "six": (0, 63), "signed six": (-32, 31), "bytes": (-128, 127)}[self.small]

    @property
    def even(self) -> bool:
        """Whether the levels are integers one after the other: a grid that GPTQ can work on."""
        return self.levels == tuple(range(self.levels[0], self.levels[0] + len(self.levels))) if self.levels else False


def _signed(bits: int) -> tuple[int, ...]:
    return tuple(range(-(1 << (bits - 1)), 1 << (bits - 1)))


def _unsigned(bits: int) -> tuple[int, ...]:
    return tuple(range(1 << bits))


IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""E2M1 twice over, so that they are whole: the scale is half of what the exponent says."""

TYPES: dict[str, GgufType] = {
    t.name: t
    for t in (
        GgufType("F32", 0, 1, 4, None),
        GgufType("F16", 1, 1, 2, None),
        GgufType("BF16", 30, 1, 2, None),
        GgufType("Q8_0", 8, 32, 34, "F16", 32, (Plane(2, 8, 32),), levels=_signed(8)),
        GgufType(
            "Q6_K", 14, 256, 210, "Q8_0", 16, (Plane(0, 4, 64), Plane(128, 2, 32)), 208, small="bytes", small_at=192, levels=_signed(6)
        ),
        GgufType(
            "Q5_K", 13, 256, 176, "Q5_1", 32, (Plane(48, 4, 32), Plane(16, 1, 32)), 0, 2, small="six", small_at=4, levels=_unsigned(5)
        ),
        GgufType("Q4_K", 12, 256, 144, "Q5_0", 32, (Plane(16, 4, 32),), 0, 2, small="six", small_at=4, levels=_unsigned(4)),
        GgufType(
            "Q3_K",
            11,
            256,
            110,
            "IQ4_NL",
            16,
            (Plane(32, 2, 32), Plane(0, 1, 32)),
            108,
            small="signed six",
            small_at=96,
            levels=_signed(3),
        ),
        GgufType("Q2_K", 10, 256, 84, "IQ4_NL", 16, (Plane(16, 2, 32),), 80, 82, small="nibbles", small_at=0, levels=_unsigned(2)),
        GgufType("Q5_0", 6, 32, 22, "F16", 32, (Plane(6, 4, 16), Plane(2, 1, 1)), levels=_signed(5)),
        GgufType("Q5_1", 7, 32, 24, "F16", 32, (Plane(8, 4, 16), Plane(4, 1, 1)), 0, 2, levels=_unsigned(5)),
        GgufType("Q4_0", 2, 32, 18, "F16", 32, (Plane(2, 4, 16),), levels=_signed(4)),
        GgufType("IQ4_NL", 20, 32, 18, "F16", 32, (Plane(2, 4, 16),), levels=IQ4_NL_LEVELS),
        GgufType("MXFP4", 39, 32, 17, "F16", 32, (Plane(1, 4, 16),), levels=MXFP4_LEVELS),
    )
}


def type_of(scheme: Scheme) -> GgufType:
    """The tensor type of a scheme whose format is gguf."""
    assert scheme.format == "gguf", scheme.name
    return TYPES[scheme.name.removesuffix("_GGUF")]


def row_bytes(name: str, columns: int) -> int:
    """Bytes of a row of `columns` values; columns must be whole blocks."""
    found = TYPES[name]
    blocks, rest = divmod(columns, found.block)
    assert rest == 0, f"{columns} columns are no whole blocks of {name}"
    return blocks * found.nbytes


def fitting(name: str, columns: int) -> str:
    """The type itself, or the first of its fallbacks of whose blocks a row of `columns` can be made: llama.cpp's choice."""
    while columns % TYPES[name].block:
        fallback = TYPES[name].fallback
        assert fallback is not None, name
        name = fallback
    return name
