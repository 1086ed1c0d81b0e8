"""Waiting for what must happen, for tests and benchmarks that look at other processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["PATIENCE", "eventually"]

T = TypeVar("T")

PATIENCE = 180.0
"""Seconds until something that must happen is given up. Long, since it says nothing: these tests share the cores with others."""


def eventually(look: Callable[[], T | None], seconds: float = PATIENCE) -> T:
    """The first truthy answer."""
    deadline = time.monotonic() + seconds
    while not (answer := look()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)
    return answer
