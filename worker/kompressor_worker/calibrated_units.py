"""Units of a model with activations flowing through them: blocks by the engine, embeddings and head as `matrix_units` has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from kompressor_worker import kernels
from kompressor_worker.block_work import Finished, Place
from kompressor_worker.calibrated import Engine
from kompressor_worker.ending import stages_of_ending
from kompressor_worker.formats import bitmask
from kompressor_worker.journal import Journal
from kompressor_worker.layout import StageLayout, UnitLayout
from kompressor_worker.matrix_units import MatrixUnits
from kompressor_worker.pipeline import Load, Loaded
from kompressor_worker.snapshots import Snapshots
from kompressor_worker.stream import DataFree, Step, Work, whole
from kompressor_worker.tensors import as_bytes, decode, refuse_nonfinite
from kompressor_worker.unit_kinds import kind_of
from kompressor_worker.writer import NOTHING, Carry, Writer


@dataclass
class Calibrated:
    """Units for `stream`."""

    work: Work
    engine: Engine
    snapshots: Snapshots

    def __post_init__(self) -> None:
        self._plain, self._matrices = DataFree(self.work), self.matrices()
        self._places: dict[int, Place] = {}
        dropped = 0
        for number in (n for n, unit in enumerate(self.work.layout.units) if kind_of(unit) == "block"):
            self._places[number] = Place(len(self._places), len(self._places) - dropped)
            dropped += self.work.layout.units[number].dropped

    def matrices(self) -> MatrixUnits:
        return MatrixUnits(self.work, self.engine)

    def place(self, unit: int) -> Place:
        return self._places[unit]

    @property
    def left(self) -> Sequence[str]:
        return self.snapshots.left

    def first(self, journal: Journal) -> int:
        done = journal.state.unit
        return self.snapshots.restore(journal.state) if 0 < done < len(self.work.layout.units) else done

    # ---- reads

    def loads(self, unit: int) -> Iterator[Load]:
        layout = self.work.layout.units[unit]
        kind = kind_of(layout)
        if layout.dropped:
            yield from (whole(stage) for stage in layout.stages if self.engine.streams.of_the_original() and self._read(stage))
            return
        if kind == "other":
            yield from self._plain.loads(unit)
            return
        if kind != "block":
            yield from self._matrices.loads(unit)
            return
        yield from (whole(stage) for stage in layout.stages if self._read(stage))
        for _, gone in self._beyond(unit):
            yield from (whole(stage) for stage in gone.stages if self._read(stage))
        yield from (whole(stage) for stage in self._ending(unit))

    def _beyond(self, unit: int) -> list[tuple[Place, UnitLayout]]:
        """The blocks behind this one that the result lacks, where blocks are tuned, so that it says what they have said."""
        units, found = self.work.layout.units, list[tuple[Place, UnitLayout]]()
        if self._tuned(unit):
            for number in range(unit + 1, len(units)):
                if not units[number].dropped:
                    break
                found.append((self._places[number], units[number]))
        return found

    def _tuned(self, unit: int) -> bool:
        layout = self.work.layout.units[unit]
        return self.engine.tunes and self.engine.streams.reference is not None and kind_of(layout) == "block" and not layout.dropped

    def _ending(self, unit: int) -> list[StageLayout]:
        """Of the norm and the head, where this is the last block that is tuned."""
        if not self._tuned(unit) or any(self._tuned(later) for later in range(unit + 1, len(self.work.layout.units))):
            return []
        return stages_of_ending(self.work.layout)

    # ---- units

    def replay(self, unit: int, incoming: Iterator[Loaded], step: Step) -> None:
        layout = self.work.layout.units[unit]
        match kind_of(layout):
            case "embeddings":
                self._matrices.embeddings(unit, incoming, None, step)
            case "block":
                if layout.dropped:
                    self._pass_by(unit, incoming, step)
                    return
                self.engine.replay(self._places[unit], layout, self.reader(incoming), self.snapshots.reader(unit, layout), step)
                for _, gone in self._beyond(unit):
                    for _ in filter(self._read, gone.stages):
                        next(incoming)
                for _ in self._ending(unit):
                    next(incoming)
            case _:
                for _ in self._plain.loads(unit):
                    next(incoming)
                step(layout.source_bytes)

    def run(self, unit: int, incoming: Iterator[Loaded], writer: Writer, step: Step) -> Carry:
        layout = self.work.layout.units[unit]
        match kind_of(layout):
            case "embeddings":
                self._matrices.embeddings(unit, incoming, writer, step)
                return NOTHING
            case "block" if layout.dropped:
                pieces = self.snapshots.pieces(unit, writer.submit)
                self._pass_by(unit, incoming, step)
                return self.snapshots.carry(unit, {}, pieces)
            case "block":
                return self._block(unit, incoming, writer, step)
            case "head":
                return self._matrices.head(unit, incoming, writer, step)
            case _:
                return self._plain.run(unit, incoming, writer, step)

    def reader(self, incoming: Iterator[Loaded]) -> Callable[[StageLayout], dict[str, Tensor]]:
        """The stages of a block as `loads` asked for them, one after the other."""

        def load(stage: StageLayout) -> dict[str, Tensor]:
            if not self._read(stage):
                return {}
            views = next(incoming).views
            weights = {t.name: decode(t, views) for t in stage.tensors if t.stored}
            for name, value in weights.items():
                refuse_nonfinite(name, kernels.nonfinite(value))
            return {name: value.to(self.engine.decoder.device) for name, value in weights.items()}

        return load

    def _read(self, stage: StageLayout) -> bool:
        """Whether anything of it is wanted: of an expert that goes, where the original's rows flow, or a pass changes weights by others."""
        wanted = not stage.dropped or self.engine.streams.of_the_original() or any(p.transforms for p in self.work.passes)
        return bool(wanted) and any(t.stored for t in stage.tensors)

    def _pass_by(self, unit: int, incoming: Iterator[Loaded], step: Step) -> None:
        layout = self.work.layout.units[unit]
        if not self.engine.streams.of_the_original():
            step(layout.source_bytes)
        else:
            self.engine.pass_by(self._places[unit], layout, self.reader(incoming), step)

    def _block(self, unit: int, incoming: Iterator[Loaded], writer: Writer, step: Step) -> Carry:
        layout, placed = self.work.layout.units[unit], self.work.plan.stages[unit]
        pieces = self.snapshots.pieces(unit, writer.submit)

        def write(number: int, finished: Finished) -> None:
            stage = layout.stages[number]
            made = {name: value.cpu().contiguous() for name, value in finished.weights.items()}
            for linear in stage.linears:
                if pruned := finished.pruned.get(linear.name):
                    writer.record_pruned(linear, pruned)
                if encoded := finished.encoded.get(linear.name):
                    made |= encoded.tensors
                    writer.record_linear(linear, finished.schemes[linear.name], encoded)
            bitmask.pack_linears(stage.linears, made)
            for place in placed[number]:
                writer.write(place, as_bytes(made[place.name], place))
            if pieces is not None:
                pieces.add(number, {place.name: made[place.name] for place in placed[number]})

        stages = self._ending(unit)
        find = partial(self._matrices.ending, stages, incoming) if stages else None
        record = self.engine.block(self._places[unit], layout, self.reader(incoming), write, step, self._beyond(unit), find)
        return self.snapshots.carry(unit, {"block": record}, pieces)
