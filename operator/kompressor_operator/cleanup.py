"""deletionPolicy: what becomes of the output when the CompressionJob is deleted. Pure."""

from __future__ import annotations

from kompressor_operator.decide import NOTHING, Decision, View


def deleting(view: View) -> Decision | None:
    """Owner references clean up; there is nothing to do and no finalizer to remove."""
    return NOTHING if view.job.deleting else None


def guarded(view: View) -> Decision | None:
    """A finalizer before the first child, where the output is to be deleted too."""
    return None
