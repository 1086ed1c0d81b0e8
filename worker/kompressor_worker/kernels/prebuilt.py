"""Libraries compiled before the CPU is known: an image brings them along, so that no pod begins by compiling.

`build.build_ahead` puts one for each level of x86-64 that the kernels make a difference between into a folder beside this file. The best
that the CPU has instructions for is taken: there it has the same vectors as one compiled for that very CPU, and gives the same bits. Its
name holds the digest of source and flags, so one made of another source is not found; where none is, the kernels are compiled at first use.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from kompressor_worker import processor

FOLDER = Path(__file__).with_name("prebuilt")


@dataclass(frozen=True)
class Level:
    """What CPUs have in common, named after the psABI's levels of x86-64."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]
    """As /proc/cpuinfo names them, which lists only what the kernel lets programs use."""


V3 = frozenset(
    ["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"]
)
V4 = V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
LEVELS = (
    Level("v4-bf16", ("-march=x86-64-v4", "-mavx512bf16"), V4 | {"avx512_bf16"}),
    Level("v4", ("-march=x86-64-v4",), V4),
    Level("v3", ("-march=x86-64-v3",), V3),
)
"""Best first."""


def paths(digest: str) -> dict[Level, Path]:
    """Where the libraries of this source go, whatever this CPU has; none on other architectures."""
    return {level: _path(level, digest) for level in LEVELS} if platform.machine() == "x86_64" else {}


def find(digest: str) -> Path | None:
    """The library of this source for this CPU, if an image brought it along."""
    features = processor.features()
    level = next((level for level in LEVELS if level.needs <= features), None)
    if level is None or not _path(level, digest).exists():
        return None
    return _path(level, digest)


def _path(level: Level, digest: str) -> Path:
    return FOLDER / f"{level.name}-{digest}.so"
