"""How far a job is, told to whoever listens: a terminal, a log, the resource."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from kompressor_worker.layout import ModelLayout

PUBLISHING = "publishing"
"""What the unit is called when all of them are done."""


@dataclass(frozen=True)
class Snapshot:
    unit: str
    units_done: int
    units_total: int
    bytes_done: int
    bytes_total: int
    bytes_per_second: float
    phase: str = "Compressing"
    resumed_from: str | None = None
    """The unit at which this worker went on; None if it began at the first."""
    plan: str = ""
    """With a target: which of its plans is being carried out."""
    tries: int = 1
    """How many of them have been begun, this one included."""

    @property
    def percent(self) -> int:
        return int(100 * self.bytes_done / self.bytes_total) if self.bytes_total else 100

    @property
    def eta_seconds(self) -> int | None:
        left = self.bytes_total - self.bytes_done
        return round(left / self.bytes_per_second) if self.bytes_per_second else None

    def status(self) -> dict[str, Any]:
        """As it stands in `status.progress`."""
        return {
            "percent": self.percent,
            "unit": self.unit,
            "unitsDone": self.units_done,
            "unitsTotal": self.units_total,
            "bytesRead": self.bytes_done,
            "bytesTotal": self.bytes_total,
            "bytesPerSecond": round(self.bytes_per_second),
            "etaSeconds": self.eta_seconds,
            "resumedFrom": self.resumed_from,  # null takes away what an earlier worker wrote
            **({"plan": self.plan, "tries": self.tries} if self.plan else {}),
            "updatedAt": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }


Listener = Callable[[Snapshot], None]


class Progress:
    """Measures the stream and tells listeners after every stage; they throttle themselves."""

    def __init__(self, listeners: Sequence[Listener] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self._listeners = listeners
        self._clock = clock
        self._layout: ModelLayout | None = None
        self._began = 0.0
        self._total = self._skipped = self._first = self._behind = 0
        self._resumed: str | None = None
        self._survey = self._plan = ""
        self._try = 1

    def trying(self, number: int, plan: str) -> None:
        """Before `start`: the plan of a target that is carried out, counted from 1."""
        self._try, self._plan, self._resumed = number, plan, None

    def start(self, layout: ModelLayout, first_unit: int, surveys: int = 0, surveyed: int = 0) -> None:
        """`surveys`: how many times the source is read before the stream, `surveyed` of these are done."""
        self._layout = layout
        self._began = self._clock()
        source = layout.source_bytes  # a sum over all tensors: once, not at every stage
        self._total = (1 + surveys) * source
        self._first = first_unit
        if first_unit:
            self._resumed = [*(unit.name for unit in layout.units), PUBLISHING][first_unit]
        self._behind = surveyed * source
        done = sum(u.source_bytes for u in layout.units[:first_unit])
        self._skipped = self._behind + done
        if first_unit < len(layout.units) and surveys == surveyed:
            self.done(first_unit, done)

    def surveying(self, number: int, layout: ModelLayout) -> None:
        """The source is read for survey `number`, counted from 0."""
        self._layout, self._survey = layout, f"survey {number + 1}: "
        self._behind = number * layout.source_bytes

    def streaming(self, layout: ModelLayout, surveys: int) -> None:
        """Surveys are done; `layout` is what they have decided."""
        self._layout, self._survey = layout, ""
        self._behind = surveys * layout.source_bytes

    def done(self, unit: int, done: int) -> None:
        """`done` source bytes are behind the stream, which is in unit number `unit`. Units that are committed and only made again to go on
        take nothing back of what is done."""
        assert self._layout is not None
        done = max(done + self._behind, self._skipped)
        elapsed = max(1e-6, self._clock() - self._began)
        self._tell(
            Snapshot(
                f"{self._survey}{self._layout.units[unit].name}",
                max(unit, self._first),
                len(self._layout.units),
                done,
                self._total,
                (done - self._skipped) / elapsed,
                resumed_from=self._resumed,
                plan=self._plan,
                tries=self._try,
            )
        )

    def publishing(self) -> None:
        assert self._layout is not None
        total, units = self._total, len(self._layout.units)
        elapsed = max(1e-6, self._clock() - self._began)
        rate = (total - self._skipped) / elapsed
        self._tell(Snapshot(PUBLISHING, units, units, total, total, rate, "Publishing", self._resumed, self._plan, self._try))

    def _tell(self, snapshot: Snapshot) -> None:
        for listener in self._listeners:
            listener(snapshot)
