"""Makes the judge of statuses: kstatus of cli-utils, the code that Flux and `kubectl wait`-like tools judge readiness with.

It is a Go module of its own (judges/), cached under its own digest, so that neither it nor the control plane is built again for the
other's sake. About a minute of CPU, once.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from binaries import BinaryError, Log, cache_root, go_command, go_environment, one_at_a_time

__all__ = ["kstatus_judge"]

SOURCE = Path(__file__).with_name("judges")


def kstatus_judge(log: Log = print) -> Path:
    """The binary: one JSON object a line in, one word a line out. Raises BinaryError where it cannot be built."""
    digest = hashlib.sha256(b"\0".join((SOURCE / name).read_bytes() for name in ("go.mod", "go.sum", "main.go")))
    judge = cache_root() / "bin" / f"judges-{digest.hexdigest()[:12]}" / "kstatus"
    if os.access(judge, os.X_OK):
        return judge
    with one_at_a_time(judge.parent.with_suffix(".lock"), log):
        if not os.access(judge, os.X_OK):
            log("building the kstatus judge (about a minute, once)")
            _build(judge, go_command(log))
    return judge


def _build(judge: Path, go: str) -> None:
    """Into a temporary folder, then one rename."""
    judge.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=judge.parent, prefix=".build-") as temporary:
        built = Path(temporary) / judge.name
        done = subprocess.run(
            [go, "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", str(built), "."],
            cwd=SOURCE,
            env=go_environment(Path(temporary)),
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            tail = "\n".join((done.stderr or done.stdout).splitlines()[-15:])
            raise BinaryError(f"{SOURCE}: `go build` failed; the modules that its go.mod names must be in reach of GOPROXY\n{tail}")
        built.replace(judge)


if __name__ == "__main__":
    try:
        print(kstatus_judge())
    except BinaryError as error:
        sys.exit(f"error: {error}")
