"""Compiles `kernels.cpp` for the CPU at hand, once, and loads it; an image brings it along compiled (`prebuilt`).

The compiler is $CXX, or the first of g++, clang++ and zig that works. The library is kept under
`${KOMPRESSOR_CACHE:-${XDG_CACHE_HOME:-~/.cache}/kompressor}/kernels`, named after everything that it depends on:
source, compiler, flags, CPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from kompressor_worker.kernels import prebuilt

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
SOURCES = (
    "kernels.cpp",
    "lanes.cpp",
    "quantize.cpp",
    "decode.cpp",
    "column_loop.cpp",
    "prune.cpp",
    "activations.cpp",
    "butterflies.cpp",
    "gram.cpp",
    "encode.cpp",
    "clip_search.cpp",
    "bitmask.cpp",
    "divergence.cpp",
    "gguf_blocks.cpp",
    "gguf_search.cpp",
    "gguf_encode.cpp",
    "gguf_mean.cpp",
)
# No fast-math and no contraction to FMA: results are to equal the eager reference bit for bit.
FLAGS = [
    "-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi",
    "-shared", "-fPIC", "-pthread",
]  # fmt: skip
NATIVE = ("-march=native",)
COMPILE_SECONDS = 300


class CannotCompile(Exception):
    """No compiler, or one that failed; the message says which and how."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, built if need be; None, with one warning, where they cannot be built."""
    if os.environ.get("KOMPRESSOR_KERNELS") == "eager":
        return None
    try:
        if brought := prebuilt.find(_digest()):
            return ctypes.CDLL(str(brought))
    except OSError as error:
        log.warning("kernels: %s; they are compiled here in place of it", error)
    try:
        return ctypes.CDLL(str(build()))
    except (CannotCompile, OSError) as error:
        log.warning(
            "kernels: %s. Quantisation runs in plain PyTorch: the same result, several times slower. Install g++ or clang++, or set CXX; "
            "KOMPRESSOR_KERNELS=eager silences this.",
            error,
        )
        return None


def build() -> Path:
    """The shared library for this CPU, compiled unless the cache has it. Raises CannotCompile."""
    return _first_that_works(NATIVE, lambda compiler: _place(f"{_key(compiler)}.so"))


def build_ahead() -> list[Path]:
    """Those for CPUs yet unknown, for `library` to find: what the build of an image runs. Raises CannotCompile."""

    def to(path: Path) -> Callable[[list[str]], Path]:
        return lambda compiler: path

    return [_first_that_works(level.flags, to(path)) for level, path in prebuilt.paths(_digest()).items()]


def _first_that_works(target: Sequence[str], place: Callable[[list[str]], Path]) -> Path:
    failures = []
    for compiler in _compilers():
        path = place(compiler)
        if path.exists():
            return path
        try:
            _compile([*compiler, *FLAGS, *target], path)
            return path
        except (CannotCompile, OSError, subprocess.TimeoutExpired) as error:
            failures.append(f"{shlex.join(compiler)}: {error}")
    raise CannotCompile("; ".join(failures) or "no C++ compiler found (looked for $CXX, g++, clang++, zig)")


def _compilers() -> Iterator[list[str]]:
    if chosen := os.environ.get("CXX"):
        yield shlex.split(chosen)
        return
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            yield [name]
    if shutil.which("zig"):
        yield ["zig", "c++"]
    if find_spec("ziglang") is not None:
        yield [sys.executable, "-m", "ziglang", "c++"]


def _compile(compiler: list[str], path: Path) -> None:
    """Writes beside the target and renames, so that a second process sees all of the library or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    os.close(descriptor)
    try:
        log.info("compiling the kernels with %s", compiler[0])
        command = [*compiler, str(HERE / SOURCES[0]), "-o", scratch]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
        if done.returncode != 0:
            raise CannotCompile(f"exit code {done.returncode}: {done.stderr.strip()[-500:]}")
        Path(scratch).chmod(0o755)  # some linkers keep what was there, which is its maker's alone: an image's user is another one
        Path(scratch).replace(path)
    finally:
        Path(scratch).unlink(missing_ok=True)


def source_digest() -> str:
    """Of the kernels' source: another one may round another way."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()[:16]


def _digest() -> str:
    return hashlib.sha256(repr((source_digest(), FLAGS)).encode()).hexdigest()[:16]


def _key(compiler: list[str]) -> str:
    parts = _digest(), compiler, _version(tuple(compiler)), NATIVE, _cpu()
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@cache
def _version(compiler: tuple[str, ...]) -> str:
    try:
        return subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _cpu() -> str:
    """What `-march=native` goes by: the model and its features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU part")
    return "\n".join(line for line in lines if line.partition(":")[0].strip() in wanted)


def _place(name: str) -> Path:
    """Where a library is, or where it is to go. A cache may be there to be read only, if it has it."""
    try:
        kept = _cache() / name
        if kept.exists():
            return kept
        kept.parent.mkdir(parents=True, exist_ok=True)
        if os.access(kept.parent, os.W_OK):
            return kept
    except (OSError, RuntimeError):
        pass
    return _private_directory() / name


def _cache() -> Path:
    if root := os.environ.get("KOMPRESSOR_CACHE"):
        path = Path(root)
    else:
        base = os.environ.get("XDG_CACHE_HOME")
        path = (Path(base) if base else Path.home() / ".cache") / "kompressor"
    return path / "kernels"


@cache
def _private_directory() -> Path:
    """Where no cache can be written (a read-only root): a directory of this process alone."""
    return Path(tempfile.mkdtemp(prefix="kompressor-kernels-"))
