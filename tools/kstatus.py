"""Makes the judge of statuses: kstatus of cli-utils, the code that Flux and `kubectl wait`-like tools judge readiness with."""

from __future__ import annotations

import sys
from pathlib import Path

from binaries import BinaryError, Log
from go_module import built

__all__ = ["kstatus_judge"]


def kstatus_judge(log: Log = print) -> Path:
    """The binary: one JSON object a line in, one word a line out. Raises BinaryError where it cannot be built."""
    return built(Path(__file__).with_name("judges"), "kstatus", takes="about a minute", log=log)


if __name__ == "__main__":
    try:
        print(kstatus_judge())
    except BinaryError as error:
        sys.exit(f"error: {error}")
