"""Makes KWOK, which plays nodes and pods by rules: benchmarks/kwok_stages.yaml has ours."""

from __future__ import annotations

import sys
from pathlib import Path

from binaries import BinaryError, Log
from go_module import built

__all__ = ["kwok"]

PACKAGE = "sigs.k8s.io/kwok/cmd/kwok"


def kwok(log: Log = print) -> Path:
    """The binary. Raises BinaryError where it cannot be built."""
    return built(Path(__file__).with_name("kwok"), "kwok", PACKAGE, takes="about 2 minutes on 2 idle cores", log=log)


if __name__ == "__main__":
    try:
        print(kwok())
    except BinaryError as error:
        sys.exit(f"error: {error}")
