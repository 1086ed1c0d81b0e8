"""Libraries that ask for a newer glibc than there is, for nothing but new names of old functions, load after all; others are left alone."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from pathlib import Path

import pytest

from older_glibc import older

OLDEST = {"x86_64": "GLIBC_2.2.5", "aarch64": "GLIBC_2.17"}
pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or platform.machine() not in OLDEST, reason="a glibc whose first version is known here"
)
FUTURE = """
unsigned long strlen(const char *text) {{ return 0; }}
long __isoc23_strtol(const char *text, char **end, int base) {{ return 0; }}
int brand_new(void) {{ return 0; }}
"""
VERSIONS = "{oldest} {{ global: strlen; }}; GLIBC_2.99 {{ global: __isoc23_strtol; brand_new; local: *; }};"
NAMES = """
unsigned long strlen(const char *);
long __isoc23_strtol(const char *, char **, int);
long number(const char *text) { return 100 * strlen(text) + __isoc23_strtol(text, 0, 10); }
"""
MORE = NAMES + "int brand_new(void); int more(void) { return brand_new(); }"


def compiled(folder: Path, name: str, code: str, *flags: str) -> Path:
    (folder / "code.c").write_text(code)
    made = folder / name
    subprocess.run(["gcc", "-shared", "-fPIC", "-fno-builtin", "-nostdlib", "-o", made, folder / "code.c", *flags], check=True)
    return made


@pytest.fixture
def libraries(tmp_path: Path) -> Path:
    """A folder with two that were linked with a glibc of the future."""
    (tmp_path / "versions").write_text(VERSIONS.format(oldest=OLDEST[platform.machine()]))
    future = compiled(tmp_path, "future.so", FUTURE.format(), "-Wl,-soname,libc.so.6", f"-Wl,--version-script={tmp_path / 'versions'}")
    folder = tmp_path / "package"
    folder.mkdir()
    for name, code in (("libnames.so", NAMES), ("libmore.so", MORE)):
        compiled(tmp_path, name, code, str(future)).rename(folder / name)
    return folder


def test_new_names_become_old_ones_and_what_is_really_new_stays(libraries: Path) -> None:
    for name in ("libnames.so", "libmore.so"):
        with pytest.raises(OSError, match=r"GLIBC_2\.99"):
            ctypes.CDLL(str(libraries / name))
    before = (libraries / "libmore.so").read_bytes()
    inode = (libraries / "libnames.so").stat().st_ino
    assert older(libraries) == ["libnames.so"]
    assert ctypes.CDLL(str(libraries / "libnames.so")).number(b"42") == 242
    assert (libraries / "libnames.so").stat().st_ino != inode, "what shares its data with a cache is replaced, not written to"
    assert (libraries / "libmore.so").read_bytes() == before
    assert older(libraries) == []
