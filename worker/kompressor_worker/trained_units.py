"""Units whose tensors have been trained already: they are written as they are, and the evaluation's rows flow through them all the same.

What training has left behind is one object a unit of the result's layout (`distil.lesson.trained_object`), so a restart reads those again
and keeps no pieces of its own.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from kompressor_worker import kernels
from kompressor_worker.block import Encoded, Pruned
from kompressor_worker.calibrated_units import Calibrated
from kompressor_worker.distil.lesson import trained_object
from kompressor_worker.errors import StorageError
from kompressor_worker.formats import bitmask
from kompressor_worker.journal import Journal
from kompressor_worker.layout import LinearLayout, StageLayout, UnitLayout
from kompressor_worker.matrix_rows import RowCodes
from kompressor_worker.matrix_units import FinalNorm, MatrixUnits
from kompressor_worker.pipeline import Load, Loaded
from kompressor_worker.shards import PlacedTensor
from kompressor_worker.storage import Output
from kompressor_worker.stream import DataFree, Step, Work
from kompressor_worker.tensors import as_bytes, refuse_nonfinite
from kompressor_worker.unit_kinds import kind_of
from kompressor_worker.writer import NOTHING, Carry, Writer

BITMASK = ("compressed", "bitmask", "row_offsets", "shape")
CHECKED = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Trained:
    """What training has left behind, a unit at a time."""

    work: Work
    output: Output
    pruned: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By linear, what the student's report says of what was set to zero."""

    def __post_init__(self) -> None:
        units = enumerate(self.work.plan.stages)
        self._unit_of = {t.name: number for number, stages in units for placed in stages for t in placed}
        self._unit = -1
        self._tensors: dict[str, Tensor] = {}
        self._linears: dict[str, Mapping[str, Any]] = {}

    def tensor(self, name: str) -> Tensor:
        """By the name under which it is published, or that of a weight which is published by a bitmask."""
        if name not in self._tensors:
            self.take(self._unit_of[name])
        return self._tensors[name]

    def take(self, unit: int) -> None:
        """Holds this unit, and lets the one before it go."""
        if unit == self._unit:
            return
        name = trained_object(unit)
        found = self.output.read(name)
        if found is None:
            raise StorageError(f"{self.output.uri}: {name}, which training has left here, is gone; start again, and it is trained anew")
        data = found[0]
        self._unit, self._tensors = unit, safetensors.torch.load(data)
        (size,) = struct.unpack("<Q", data[:8])
        self._linears = json.loads(json.loads(data[8 : 8 + size]).get("__metadata__", {}).get("linears", "{}"))

    def stage(self, stage: StageLayout, placed: Sequence[PlacedTensor]) -> dict[str, Tensor]:
        """The tensors of a stage of the unit that is held: weights that are published by a bitmask whole."""
        by_bitmask = {f"{x.name}.{part}": x.weight for x in stage.linears if x.bitmask is not None for part in BITMASK}
        return {name: self._tensors[name] for name in dict.fromkeys(by_bitmask.get(t.name, t.name) for t in placed)}

    def encoded(self, linear: str, tensors: Mapping[str, Tensor]) -> Encoded:
        said = self._linears[linear]
        mine = {name: value for name, value in tensors.items() if name.rpartition(".")[0] == linear}
        return Encoded(mine, float(said["squaredError"]), float(said["squaredNorm"]), int(said.get("saturated", 0)))

    def zeros(self, linear: LinearLayout) -> Pruned:
        """The error is what it was when they became zero: what stays has been trained since then, to be something else."""
        error = float(self.pruned.get(linear.name, {}).get("relativeError", 0.0))
        return Pruned(int(self._linears[linear.name]["zeros"]), error**2, 1.0)

    def write(self, unit: UnitLayout, placed: Sequence[Sequence[PlacedTensor]], writer: Writer) -> None:
        """All of the unit that is held, and its records."""
        for stage, places in zip(unit.stages, placed, strict=True):
            made = self.stage(stage, places)
            self.record(stage, made, writer)
            bitmask.pack_linears(stage.linears, made)
            for place in places:
                writer.write(place, as_bytes(made[place.name].contiguous(), place))

    def record(self, stage: StageLayout, made: Mapping[str, Tensor], writer: Writer) -> None:
        for linear in stage.linears if made else ():
            if linear.pruned is not None:
                writer.record_pruned(linear, self.zeros(linear))
            if linear.name in self.work.schemes:
                writer.record_linear(linear, self.work.schemes[linear.name], self.encoded(linear.name, made))
        for name, value in made.items():
            if value.dtype in CHECKED:
                refuse_nonfinite(name, kernels.nonfinite(value))


@dataclass(frozen=True)
class Written:
    """Units for `stream`, where nothing is evaluated: what is trained is written, the rest of the model passes through."""

    work: Work
    trained: Trained

    @property
    def left(self) -> Sequence[str]:
        return ()

    def first(self, journal: Journal) -> int:
        return journal.state.unit

    def loads(self, unit: int) -> Iterator[Load]:
        if self._passes_through(unit):
            yield from DataFree(self.work).loads(unit)

    def replay(self, unit: int, incoming: Iterator[Loaded], step: Step) -> None:
        raise AssertionError("nothing flows, so nothing is made again")

    def run(self, unit: int, incoming: Iterator[Loaded], writer: Writer, step: Step) -> Carry:
        layout = self.work.layout.units[unit]
        if self._passes_through(unit):
            return DataFree(self.work).run(unit, incoming, writer, step)
        if not layout.dropped:
            self.trained.take(unit)
            self.trained.write(layout, self.work.plan.stages[unit], writer)
        step(layout.source_bytes)
        return NOTHING

    def _passes_through(self, unit: int) -> bool:
        return kind_of(self.work.layout.units[unit]) == "other"


@dataclass
class TrainedRows(RowCodes):
    """Rows of a matrix that training has left behind as the file holds them."""

    trained: Trained | None = None

    def stored(self, rows: Tensor) -> Tensor:
        return rows

    def finish(self, writer: Writer) -> None:
        assert self.trained is not None
        if self.scheme is not None:
            made = self.trained.encoded(self.matrix.name, {})
            self._error, self._norm = made.squared_error, made.squared_norm
        super().finish(writer)


@dataclass(frozen=True)
class TrainedMatrices(MatrixUnits):
    """Embeddings and head as they were trained, beside the source's."""

    trained: Trained

    def _codes(self, matrix: LinearLayout, placed: Sequence[PlacedTensor] = ()) -> RowCodes:
        codes = super()._codes(matrix, placed)
        return TrainedRows(matrix, codes.scheme, codes.place, trained=self.trained)

    def _changed(self, name: str, first: int, rows: Tensor, norms: Sequence[Tensor | None]) -> Tensor:
        return self.trained.tensor(name)[first : first + len(rows)]

    def _beside(self, name: str, value: Tensor) -> Tensor:
        return self.trained.tensor(name)

    def _change_norm(self, layout: UnitLayout, norm: FinalNorm) -> None:
        norm.changed |= {name: self.trained.tensor(name) for name in norm.stored}
        norm.met = [*norm.changed.values()][:1] * len(self.work.passes)

    def _encode_head(
        self, stage: StageLayout, matrix: LinearLayout, weights: dict[str, Tensor], norms: Sequence[Tensor], step: Step
    ) -> Encoded:
        number = next(n for n, unit in enumerate(self.work.layout.units) if stage in unit.stages)
        self.trained.take(number)
        placed = next(p for s, p in zip(self.work.layout.units[number].stages, self.work.plan.stages[number], strict=True) if s is stage)
        made = self.trained.stage(stage, placed)
        weights |= {name: value for name, value in made.items() if name in weights}
        return self.trained.encoded(matrix.name, made)


@dataclass
class Evaluated(Calibrated):
    """The same with the evaluation's rows: the original's through the source's weights, the result's through the trained ones."""

    trained: Trained

    def matrices(self) -> MatrixUnits:
        return TrainedMatrices(self.work, self.engine, self.trained)

    def replay(self, unit: int, incoming: Iterator[Loaded], step: Step) -> None:
        layout = self.work.layout.units[unit]
        if kind_of(layout) == "block" and not layout.dropped:
            self._through(unit, incoming, step)
        else:
            super().replay(unit, incoming, step)

    def _block(self, unit: int, incoming: Iterator[Loaded], writer: Writer, step: Step) -> Carry:
        began = time.monotonic()
        pieces = self.snapshots.pieces(unit, writer.submit)  # none is added: the trained tensors are what a restart reads
        self._through(unit, incoming, step)
        self.trained.write(self.work.layout.units[unit], self.work.plan.stages[unit], writer)
        return self.snapshots.carry(unit, {"block": {**self.engine.cost(began), **self.engine.met()}}, pieces)

    def _through(self, unit: int, incoming: Iterator[Loaded], step: Step) -> None:
        layout = self.work.layout.units[unit]
        placed = dict(zip((stage.name for stage in layout.stages), self.work.plan.stages[unit], strict=True))
        self.trained.take(unit)

        def published(stage: StageLayout) -> dict[str, Tensor]:
            return self.trained.stage(stage, placed[stage.name])

        self.engine.replay(self.place(unit), layout, self.reader(incoming), published, step)
