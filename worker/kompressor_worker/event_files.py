"""How a training went, as TensorBoard reads it: one event file beside the result."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from kompressor_worker.checkpoint import EVENTS
from kompressor_worker.distil.lesson import History

__all__ = ["event_file"]

NAME = f"{EVENTS}events.out.tfevents.0.kompressor"
"""By its second part TensorBoard knows such a file; the rest is the same in every run, so that one that is cut off leaves no other."""
TAGS = {
    "loss": "training/loss",
    "divergence": "training/divergence",
    "crossEntropy": "training/crossEntropy",
    "learningRate": "training/learningRate",
    "gradientNorm": "training/gradientNorm",
}
HELD_OUT = {"kl": "heldOut/kl", "crossEntropy": "heldOut/crossEntropy", "agreement": "heldOut/agreement"}


def event_file(history: History) -> dict[str, bytes]:
    """By name. Its header has the time of writing, so two runs do not write the same bytes; times of steps are seconds of training."""
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import scalar

    with tempfile.TemporaryDirectory(prefix="kompressor-events-") as folder:
        writer = EventsWriter(str(Path(folder) / "events"))
        for tag, step, value in points(history):
            passed = history.seconds * step / max(1, history.steps)
            writer.write_event(Event(wall_time=passed, step=step, summary=scalar(tag, value)))
        writer.close()
        (written,) = Path(folder).iterdir()
        return {NAME: written.read_bytes()}


def points(history: History) -> Iterator[tuple[str, int, float]]:
    """(tag, step, value)."""
    for curve, tags in ((history.curve, TAGS), (history.evaluations, HELD_OUT)):
        for point in curve:
            yield from ((tag, int(point["step"]), float(point[key])) for key, tag in tags.items() if key in point)
