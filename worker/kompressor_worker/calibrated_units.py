"""Units of a model with activations flowing through them: embeddings row by row, blocks by the engine, the head slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from kompressor_worker import kernels
from kompressor_worker.block import Encoded, Stage
from kompressor_worker.block_work import Finished, Place
from kompressor_worker.calibrated import Engine
from kompressor_worker.ending import Ending, Reader, stages_of_ending
from kompressor_worker.formats import bitmask
from kompressor_worker.formats.stored import decode as decode_linear
from kompressor_worker.forward import Projection
from kompressor_worker.journal import Journal
from kompressor_worker.last_hidden import LastHidden
from kompressor_worker.layout import LinearLayout, StageLayout, UnitLayout
from kompressor_worker.matrix_rows import RowCodes, matrix_rows, row_loads
from kompressor_worker.pace import Pace
from kompressor_worker.pipeline import Load, Loaded
from kompressor_worker.shards import PlacedTensor
from kompressor_worker.snapshots import Snapshots
from kompressor_worker.stream import DataFree, Step, Work, loaded_whole, whole
from kompressor_worker.tensors import as_bytes, decode, refuse_nonfinite
from kompressor_worker.unit_kinds import final_norm, in_file_order, kind_of, matrix_of, matrix_tensor
from kompressor_worker.writer import NOTHING, Carry, Writer

Meet = Callable[[int, Tensor, Tensor], None]
"""(first row, rows as they were, rows as they are published) of the embeddings or the head."""


@dataclass
class FinalNorm:
    """The norm before the head, by full name."""

    stored: dict[str, Tensor] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    """As it is published."""
    met: list[Tensor] = field(default_factory=list)
    """Its weight as each pass finds it, which the earlier ones have changed."""


@dataclass
class Calibrated:
    """Units for `stream`."""

    work: Work
    engine: Engine
    snapshots: Snapshots
    _plain: DataFree = field(init=False)

    def __post_init__(self) -> None:
        self._plain = DataFree(self.work)
        self._places: dict[int, Place] = {}
        dropped = 0
        for number in (n for n, unit in enumerate(self.work.layout.units) if kind_of(unit) == "block"):
            self._places[number] = Place(len(self._places), len(self._places) - dropped)
            dropped += self.work.layout.units[number].dropped

    @property
    def comparing(self) -> bool:
        """Whether there is an evaluation."""
        return self.engine.streams.original is not None

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
        for stage, placed in zip(layout.stages, self.work.plan.stages[unit], strict=True):
            if kind == "block":
                yield from [whole(stage)] if self._read(stage) else []
                continue
            matrix = matrix_of(stage)
            if matrix is None or self._whole(matrix):
                yield from (whole(stage) for _ in [0] if any(t.stored for t in stage.tensors))
                continue
            for tensor in in_file_order(stage, placed):
                yield from row_loads(tensor, self.work.limits) if tensor.name == matrix.weight else [loaded_whole(tensor)]
        if kind == "head" and (tied := self._tied(layout)):
            yield from row_loads(matrix_tensor(*tied), self.work.limits)
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

    def _find_ending(self, stages: Sequence[StageLayout], incoming: Iterator[Loaded]) -> Ending:
        """As `loads` asked for it."""
        norm, engine = FinalNorm(), self.engine
        heads: list[Tensor] = []
        for stage in stages:
            views, matrix = next(incoming).views, matrix_of(stage)
            found = {t.name: decode(t, views) for t in stage.tensors}
            if matrix is None:
                norm.stored, norm.changed = dict(found), dict(found)
                self._change_norm(next(unit for unit in self.work.layout.units if stage in unit.stages), norm)
                continue
            head = found[matrix.weight]
            heads = [head, self._changed(matrix.weight, 0, head, norm.met if matrix.kind == "head" else [None for _ in self.work.passes])]
        device = engine.decoder.device
        sides = zip((engine.source, engine.decoder), (norm.stored, norm.changed), heads, strict=True)
        original, result = (Reader(decoder, final_norm(x).to(device), head.to(device)) for decoder, x, head in sides)
        return Ending(original, result, Projection.as_a_runtime({}, engine.decoder.dtype, device).dtype)

    def _whole(self, matrix: LinearLayout) -> bool:
        """Whether it is quantised in one go."""
        scheme = self.work.schemes.get(matrix.name)
        return scheme is not None and scheme.format != "gguf"

    def _tied(self, layout: UnitLayout) -> tuple[StageLayout, LinearLayout] | None:
        """The embeddings, where they are the head and evaluation needs one."""
        if not self.comparing or any(m.kind == "head" for s in layout.stages for m in s.linears):
            return None
        found = [(s, m) for u in self.work.layout.units for s in u.stages for m in s.linears if m.kind == "embedding"]
        return found[0] if found else None

    # ---- units

    def replay(self, unit: int, incoming: Iterator[Loaded], step: Step) -> None:
        layout = self.work.layout.units[unit]
        match kind_of(layout):
            case "embeddings":
                self._embeddings(unit, incoming, None, step)
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
                self._embeddings(unit, incoming, writer, step)
                return NOTHING
            case "block" if layout.dropped:
                pieces = self.snapshots.pieces(unit, writer.submit)
                self._pass_by(unit, incoming, step)
                return self.snapshots.carry(unit, {}, pieces)
            case "block":
                return self._block(unit, incoming, writer, step)
            case "head":
                return self._head(unit, incoming, writer, step)
            case _:
                return self._plain.run(unit, incoming, writer, step)

    def _embeddings(self, unit: int, incoming: Iterator[Loaded], writer: Writer | None, step: Step) -> None:
        layout, streams, decoder = self.work.layout.units[unit], self.engine.streams, self.engine.decoder

        def meet(first: int, rows: Tensor, published: Tensor) -> None:
            for original in streams.of_the_original():
                original.embed(first, self.engine.source.embed(rows))
            for stream in (streams.calibration, streams.compressed, streams.deployment):
                if stream is not None:
                    stream.embed(first, decoder.embed(published))
            pace(len(rows))

        for stage, placed in zip(layout.stages, self.work.plan.stages[unit], strict=True):
            matrix = matrix_of(stage)
            assert matrix is not None, f"{stage.name}: no embeddings"
            pace = Pace(stage.source_bytes, matrix.shape[0], step)
            self._matrix(stage, matrix, placed, incoming, writer, [None for _ in self.work.passes], meet)
            pace.finish()

    def _matrix(
        self,
        stage: StageLayout,
        matrix: LinearLayout,
        placed: Sequence[PlacedTensor],
        incoming: Iterator[Loaded],
        writer: Writer | None,
        norms: Sequence[Tensor | None],
        meet: Meet,
    ) -> None:
        """Embeddings or head from reads to writes, row by row. `norms`: before the head, by pass."""
        places = {place.name: place for place in placed}
        for source in in_file_order(stage, placed):
            if source.name != matrix.weight:
                value = self._beside(source.name, decode(source, next(incoming).views))
                if writer is not None:
                    writer.write(places[source.name], as_bytes(value.contiguous(), places[source.name]))
                continue
            codes = RowCodes.of(matrix, self.work.schemes, placed)
            for first, rows in matrix_rows(source, incoming, self.work.limits):
                stored = codes.stored(self._changed(source.name, first, rows, norms))
                meet(first, rows, codes.seen(stored))
                if writer is not None:
                    codes.write(stored, writer)
            if writer is not None:
                codes.finish(writer)

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
        find = partial(self._find_ending, stages, incoming) if stages else None
        record = self.engine.block(self._places[unit], layout, self.reader(incoming), write, step, self._beyond(unit), find)
        return self.snapshots.carry(unit, {"block": record}, pieces)

    # ---- the head

    def _head(self, unit: int, incoming: Iterator[Loaded], writer: Writer, step: Step) -> Carry:
        layout = self.work.layout.units[unit]
        norm = FinalNorm()
        hidden: LastHidden | None = None
        for stage, placed in zip(layout.stages, self.work.plan.stages[unit], strict=True):
            matrix = matrix_of(stage)
            if matrix is None:
                self._final_norm(layout, stage, placed, norm, next(incoming), writer)
                step(stage.source_bytes)
            else:
                hidden = self._last_hidden(norm, stage.source_bytes, step)
                if self._whole(matrix):
                    self._encoded_head(stage, matrix, placed, norm.met, next(incoming), writer, hidden.add, step)
                else:
                    self._matrix(stage, matrix, placed, incoming, writer, norm.met, hidden.add)
                hidden.pace.finish()
        if tied := self._tied(layout):
            hidden, codes = self._last_hidden(norm, 0, step), RowCodes.of(tied[1], self.work.schemes)
            for first, rows in matrix_rows(matrix_tensor(*tied), incoming, self.work.limits):
                changed = self._changed(tied[1].weight, first, rows, [None for _ in self.work.passes])
                hidden.add(first, rows, codes.seen(codes.stored(changed)))
        return Carry({"evaluation": hidden.result()}) if hidden is not None and hidden.comparing else NOTHING

    def _final_norm(
        self,
        layout: UnitLayout,
        stage: StageLayout,
        placed: Sequence[PlacedTensor],
        norm: FinalNorm,
        loaded: Loaded,
        writer: Writer,
    ) -> None:
        found = {t.name: decode(t, loaded.views) for t in stage.tensors}
        norm.stored |= found
        norm.changed |= found
        self._change_norm(layout, norm)
        for place in placed:
            refuse_nonfinite(place.name, kernels.nonfinite(norm.changed[place.name]))
            writer.write(place, as_bytes(norm.changed[place.name].contiguous(), place))

    def _encoded_head(
        self,
        stage: StageLayout,
        matrix: LinearLayout,
        placed: Sequence[PlacedTensor],
        norms: Sequence[Tensor],
        loaded: Loaded,
        writer: Writer,
        meet: Meet,
        step: Step,
    ) -> None:
        """A head that is quantised because it was asked for by name: whole, and without statistics."""
        weights = {t.name: decode(t, loaded.views) for t in stage.tensors}
        original, scheme = weights[matrix.weight], self.work.schemes[matrix.name]
        encoded = self._encode_head(stage, matrix, weights, norms, step)
        writer.record_linear(matrix, scheme, encoded)
        meet(0, original, decode_linear(matrix.name, encoded.tensors, scheme, original.dtype))
        made = {**weights, **encoded.tensors}
        for place in placed:
            writer.write(place, as_bytes(made[place.name].contiguous(), place))

    def _last_hidden(self, norm: FinalNorm, nbytes: int, step: Step) -> LastHidden:
        return LastHidden(self.engine, final_norm(norm.stored), final_norm(norm.changed), nbytes, step)

    # ---- what becomes of the source's values

    def _changed(self, name: str, first: int, rows: Tensor, norms: Sequence[Tensor | None]) -> Tensor:
        """Rows of the embeddings or the head as they are published; `norms`: before the head, by pass."""
        for p, norm in zip(self.work.passes, norms, strict=True):
            rows = p.transform_rows(name, rows, norm)
        return rows

    def _beside(self, name: str, value: Tensor) -> Tensor:
        """A tensor that stands beside one of these matrices."""
        return value

    def _change_norm(self, layout: UnitLayout, norm: FinalNorm) -> None:
        for p in self.work.passes:
            norm.met.append(final_norm(norm.changed))
            p.transform(layout, norm.changed)

    def _encode_head(
        self, stage: StageLayout, matrix: LinearLayout, weights: dict[str, Tensor], norms: Sequence[Tensor], step: Step
    ) -> Encoded:
        """`weights` become those that are published beside the codes."""
        scheme = self.work.schemes[matrix.name]
        for p, norm in zip(self.work.passes, norms, strict=True):
            weights[matrix.weight] = p.transform_rows(matrix.weight, weights[matrix.weight], norm)
        worked = Stage(stage, weights, {matrix.name: scheme}, heard=lambda: step(0))
        for p in self.work.passes:
            p.apply(worked)
        return worked.encoded[matrix.name]
