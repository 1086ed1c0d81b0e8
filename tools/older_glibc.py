"""Lets the shared libraries of a wheel load where glibc is older than where they were built.

A compiler with glibc 2.38 turns `strtol` and its relatives into `__isoc23_strtol`, which older ones do not have, and the file then asks for
2.38 as a whole. Where nothing else is new in what a library takes from glibc, its symbols get their old names and the old version back; all
that changes is that numbers such as 0b101 are not read as binary. A library that needs more than that is left as it is, and says so itself.
"""

from __future__ import annotations

import os
import platform
import struct
from collections.abc import Iterator
from pathlib import Path

NEW = b"__isoc23_"
DYNSYM, VERNEED, VERSYM = 11, 0x6FFFFFFE, 0x6FFFFFFF
"""Types of ELF sections."""


def older(folder: Path) -> list[str]:
    """Makes every shared library in `folder` load with this machine's glibc, where that can be done; the names of those that changed."""
    here = version(platform.libc_ver()[1])
    if platform.libc_ver()[0] != "glibc" or not folder.is_dir():
        return []
    changed = []
    for path in sorted(folder.glob("*.so*")):
        data = bytearray(path.read_bytes())
        if data[:5] == b"\x7fELF\x02" and _relabel(data, here):
            fresh = path.with_name(f".{path.name}")
            fresh.write_bytes(data)  # a file of its own: packages may be hard links into a cache
            fresh.chmod(path.stat().st_mode)
            os.replace(fresh, path)  # noqa: PTH105
            changed.append(path.name)
    return changed


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _relabel(data: bytearray, here: tuple[int, ...]) -> bool:
    """Whether it asks for a newer glibc, and now no longer does."""
    sections = {kind: (at, size, link) for kind, at, size, link in _sections(data)}
    if not sections.keys() >= {DYNSYM, VERNEED, VERSYM}:
        return False
    strings = next(at for number, (_, at, _, _) in enumerate(_sections(data)) if number == sections[DYNSYM][2])

    def name(offset: int) -> bytes:
        return bytes(data[strings + offset : data.index(0, strings + offset)])

    wanted = {at: name(struct.unpack_from("<I", data, at + 8)[0]) for at in _needs(data, sections[VERNEED])}
    glibc = {at: version(found.removeprefix(b"GLIBC_").decode()) for at, found in wanted.items() if found.startswith(b"GLIBC_2.")}
    newer = [at for at, found in glibc.items() if found > here]
    if not newer:
        return False
    numbers = {struct.unpack_from("<H", data, at + 6)[0] for at in newer}
    symbols, size, _ = sections[DYNSYM]
    new = [
        symbols + 24 * i for i in range(size // 24) if struct.unpack_from("<H", data, sections[VERSYM][0] + 2 * i)[0] & 0x7FFF in numbers
    ]
    if not all(name(struct.unpack_from("<I", data, at)[0]).startswith(NEW) for at in new):
        return False
    for at in new:
        struct.pack_into("<I", data, at, struct.unpack_from("<I", data, at)[0] + len(NEW))
    oldest = min(glibc, key=lambda at: glibc[at])  # in which all of these have been from the beginning
    for at in newer:
        data[at : at + 4], data[at + 8 : at + 12] = data[oldest : oldest + 4], data[oldest + 8 : oldest + 12]
    return True


def _sections(data: bytearray) -> Iterator[tuple[int, int, int, int]]:
    """Kind, offset, size and link of each."""
    at, (size, count) = struct.unpack_from("<Q", data, 0x28)[0], struct.unpack_from("<HH", data, 0x3A)
    for number in range(count):
        _, kind, _, _, offset, length, link = struct.unpack_from("<IIQQQQI", data, at + number * size)
        yield kind, offset, length, link


def _needs(data: bytearray, section: tuple[int, int, int]) -> Iterator[int]:
    """Where each version lies that is asked for, of whatever library."""
    at = section[0]
    while True:
        _, count, _, first, following = struct.unpack_from("<HHIII", data, at)
        entry = at + first
        for _ in range(count):
            yield entry
            entry += struct.unpack_from("<I", data, entry + 12)[0]
        if not following:
            return
        at += following
