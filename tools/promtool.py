"""Makes promtool, Prometheus' own judge of alert rules and queries. Without service discovery, which is most of what it would build."""

from __future__ import annotations

import sys
from pathlib import Path

from binaries import BinaryError, Log
from go_module import built

__all__ = ["promtool"]

PACKAGE = "github.com/prometheus/prometheus/cmd/promtool"
FLAGS = ("-tags", "remove_all_sd")


def promtool(log: Log = print) -> Path:
    """The binary. Raises BinaryError where it cannot be built."""
    return built(Path(__file__).with_name("promtool"), "promtool", PACKAGE, flags=FLAGS, takes="about 2 minutes on 2 idle cores", log=log)


if __name__ == "__main__":
    try:
        print(promtool())
    except BinaryError as error:
        sys.exit(f"error: {error}")
