"""How far a job is, told to whoever listens: a terminal, a log, the resource."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from kompressor_worker.layout import ModelLayout

if TYPE_CHECKING:
    from kompressor_worker.distil.lesson import TrainingStep

PUBLISHING = "publishing"
"""What the unit is called when all of them are done."""
TRAINING = "training"
"""And while a student is trained."""
BEGUN, TRAINED = 0.1, 0.9
"""Of a job that trains, the share that is done when its training begins, and when that is over: how long each takes is not known before."""
MEASURING = "measuring"
"""The same while an engine serves the result."""


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
    share: float | None = None
    """Of all work, with a training; None: that of the bytes."""
    step: TrainingStep | None = None
    """The training step that is done, in phase TRAINING."""

    @property
    def done(self) -> float:
        """Share of all work."""
        if self.share is not None:
            return self.share
        return self.bytes_done / self.bytes_total if self.bytes_total else 1.0

    @property
    def percent(self) -> int:
        return int(100 * self.done + 1e-9)

    @property
    def eta_seconds(self) -> int | None:
        """To the end; of a job that trains to that of its training, and unknown before that has begun."""
        if self.step is not None:
            return round(self.step.eta_seconds)
        if self.share is not None and self.share < TRAINED:
            return None
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
            **({} if self.share is None else self._training()),
            **({"plan": self.plan, "tries": self.tries} if self.plan else {}),
            "updatedAt": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }

    def _training(self) -> dict[str, Any]:
        """Null takes away what is over."""
        step = self.step
        if step is None:
            return {"step": None, "stepsTotal": None, "tokensPerSecond": None, "loss": None}
        speed = {"tokensPerSecond": round(step.tokens_per_second), "loss": f"{step.loss:.4g}"}
        return {"step": step.step, "stepsTotal": step.steps, **speed}


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
        self._trains = False
        self._ahead = 0
        self._trained = 0.0

    def trying(self, number: int, plan: str) -> None:
        """Before `start`: the plan of a target that is carried out, counted from 1."""
        self._try, self._plan, self._resumed = number, plan, None

    def start(
        self, layout: ModelLayout, first_unit: int, surveys: int = 0, surveyed: int = 0, student: bool = False, trains: bool = False
    ) -> None:
        """`surveys`: how many times the source is read before the stream, `surveyed` of these are done. `student`: whether it is read once
        more then, for a student that is trained."""
        self._layout = layout
        self._began = self._clock()
        self._trains, self._trained = trains, 0.0
        source = layout.source_bytes  # a sum over all tensors: once, not at every stage
        self._ahead = (surveys + student) * source
        self._total = self._ahead + source
        self._first = first_unit
        if first_unit:
            self._resumed = [*(unit.name for unit in layout.units), PUBLISHING][first_unit]
        self._behind = surveyed * source
        done = sum(u.source_bytes for u in layout.units[:first_unit])
        self._skipped = self._behind + done
        if first_unit < len(layout.units) and surveys == surveyed and not trains:
            self.done(first_unit, done)

    def surveying(self, number: int, layout: ModelLayout) -> None:
        """The source is read for survey `number`, counted from 0."""
        self._layout, self._survey = layout, f"survey {number + 1}: "
        self._behind = number * layout.source_bytes

    def making(self, layout: ModelLayout, first_unit: int) -> None:
        """Surveys are done; the student is made, from this unit on."""
        self._layout, self._survey = layout, "student: "
        self._behind = self._ahead - layout.source_bytes
        self._skipped = max(self._skipped, self._behind + sum(u.source_bytes for u in layout.units[:first_unit]))

    def training(self, layout: ModelLayout) -> None:
        """The student is there, and trained."""
        self._layout, self._survey, self._behind = layout, "", self._ahead
        self._training(None)

    def trained(self, step: TrainingStep) -> None:
        self._trained = step.step / max(1, step.steps)
        self._training(step)

    def _training(self, step: TrainingStep | None) -> None:
        assert self._layout is not None
        units = len(self._layout.units)
        self._tell(
            Snapshot(
                TRAINING, 0, units, self._ahead, self._total, 0.0, "Training", self._resumed, share=self._share(self._ahead), step=step
            )
        )

    def streaming(self, layout: ModelLayout) -> None:
        """Surveys are done, and a training; `layout` is what they have decided."""
        self._layout, self._survey = layout, ""
        self._behind = self._ahead
        if self._trains:
            self._trained, self._began = 1.0, self._clock()
            self._skipped = max(self._skipped, self._behind)
            if self._first < len(layout.units):  # else only publishing is left
                self.done(self._first, sum(u.source_bytes for u in layout.units[: self._first]))

    def _share(self, done: int) -> float | None:
        """Of all work, once so many bytes are done."""
        if not self._trains:
            return None
        if done < self._ahead:
            return BEGUN * done / self._ahead
        if self._trained < 1:
            return BEGUN + (TRAINED - BEGUN) * self._trained
        return TRAINED + (1 - TRAINED) * (done - self._ahead) / max(1, self._total - self._ahead)

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
                share=self._share(done),
            )
        )

    def measuring(self) -> None:
        """All units are done, and the result is served to be measured."""
        self._ended(MEASURING, "Measuring")

    def publishing(self) -> None:
        self._ended(PUBLISHING, "Publishing")

    def _ended(self, unit: str, phase: str) -> None:
        assert self._layout is not None
        total, units = self._total, len(self._layout.units)
        elapsed = max(1e-6, self._clock() - self._began)
        rate = (total - self._skipped) / elapsed
        last = Snapshot(unit, units, units, total, total, rate, phase, self._resumed, self._plan, self._try)
        self._tell(replace(last, share=self._share(total)))

    def _tell(self, snapshot: Snapshot) -> None:
        for listener in self._listeners:
            listener(snapshot)
