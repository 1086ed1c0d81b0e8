"""A small Job that looks at everything before the worker's is created. Pure."""

from __future__ import annotations

from kompressor_operator.decide import Decision, View


def preflight(view: View) -> Decision | None:
    """Nothing yet: the worker checks for itself."""
    return None
