"""Where a pass that trains looks: places inside its parameters, which are otherwise the worker's alone to judge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kompressor_api.names import TRAINING_PASS, Role

__all__ = ["PLACES", "training_locations"]

PLACES: Mapping[Role, tuple[str, ...]] = {
    Role.TEACHER: ("teacher", "source"),
    Role.STUDENT: ("student", "source"),
    Role.TRAINING: ("dataset",),
    Role.LOGITS: ("teacher", "offline", "location"),
}
"""By what it is for: the path to it."""


def training_locations(passes: Iterable[Any]) -> list[tuple[Role, Mapping[str, Any]]]:
    """Those that the passes of a spec name; what is no location at all is left for the worker to refuse."""
    found: list[tuple[Role, Mapping[str, Any]]] = []
    for entry in passes:
        params = entry.get(TRAINING_PASS) if isinstance(entry, Mapping) else None
        for role, path in PLACES.items():
            place: Any = params
            for name in path:
                place = place.get(name) if isinstance(place, Mapping) else None
            if isinstance(place, Mapping) and isinstance(place.get("uri"), str):
                found.append((role, place))
    return found
