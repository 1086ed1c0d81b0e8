"""How jobs that train are doing, by what their workers write into status.progress. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kompressor_operator.conditions import Phase

__all__ = ["Training", "training_of"]


@dataclass(frozen=True, slots=True)
class Training:
    """Of one job, as last told."""

    step: int
    steps: int
    loss: float | None
    tokens_per_second: int


def training_of(status: Mapping[str, Any]) -> Training | None:
    """None for a job that does not train now. Anything may have been written there."""
    progress = status.get("progress") or {}
    if status.get("phase") != Phase.COMPRESSING or not isinstance(progress.get("step"), int):
        return None
    return Training(
        progress["step"], _count(progress.get("stepsTotal")), _number(progress.get("loss")), _count(progress.get("tokensPerSecond"))
    )


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None
