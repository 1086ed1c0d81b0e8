"""Builds one program of a Go module of its own (judges/, promtool/, kwok/), cached under its own digest.

So neither these nor the control plane (binaries.py) are built again for the others' sake.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from go_toolchain import BinaryError, Log, cache_root, go_command, go_environment, one_at_a_time

__all__ = ["built"]


def built(module: Path, name: str, package: str = ".", *, flags: Sequence[str] = (), takes: str, log: Log = print) -> Path:
    """The binary `name` of this module's folder. Raises BinaryError where it cannot be built."""
    parts = [file.read_bytes() for file in sorted(module.iterdir())] + [flag.encode() for flag in flags]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]
    binary = cache_root() / "bin" / f"{module.name}-{digest}" / name
    if os.access(binary, os.X_OK):
        return binary
    with one_at_a_time(binary.parent.with_suffix(".lock"), log):
        if not os.access(binary, os.X_OK):
            log(f"building {name} ({takes}, once)")
            _build(module, package, flags, binary, go_command(log))
    return binary


def _build(module: Path, package: str, flags: Sequence[str], binary: Path, go: str) -> None:
    """Into a temporary folder, then one rename."""
    binary.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=binary.parent, prefix=".build-") as temporary:
        fresh = Path(temporary) / binary.name
        done = subprocess.run(
            [go, "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", *flags, "-o", str(fresh), package],
            cwd=module,
            env=go_environment(Path(temporary)),
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            tail = "\n".join((done.stderr or done.stdout).splitlines()[-15:])
            raise BinaryError(f"{module}: `go build` failed; the modules that its go.mod names must be in reach of GOPROXY\n{tail}")
        fresh.replace(binary)
