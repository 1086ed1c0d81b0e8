"""Embeddings and head of a model with activations flowing through it: row by row, slice by slice, and what the last block is tuned by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kompressor_worker import kernels
from kompressor_worker.block import Encoded, Stage
from kompressor_worker.calibrated import Engine
from kompressor_worker.ending import Ending, Reader
from kompressor_worker.formats.stored import decode as decode_linear
from kompressor_worker.forward import Projection
from kompressor_worker.last_hidden import LastHidden
from kompressor_worker.layout import LinearLayout, StageLayout, UnitLayout
from kompressor_worker.matrix_rows import RowCodes, matrix_rows, row_loads
from kompressor_worker.pace import Pace
from kompressor_worker.pipeline import Load, Loaded
from kompressor_worker.shards import PlacedTensor
from kompressor_worker.stream import Step, Work, loaded_whole, whole
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


@dataclass(frozen=True)
class MatrixUnits:
    """Units that are one large matrix, and the norm before the head."""

    work: Work
    engine: Engine

    @property
    def comparing(self) -> bool:
        """Whether there is an evaluation."""
        return self.engine.streams.original is not None

    def loads(self, unit: int) -> Iterator[Load]:
        layout = self.work.layout.units[unit]
        for stage, placed in zip(layout.stages, self.work.plan.stages[unit], strict=True):
            matrix = matrix_of(stage)
            if matrix is None or self._whole(matrix):
                yield from (whole(stage) for _ in [0] if any(t.stored for t in stage.tensors))
                continue
            for tensor in in_file_order(stage, placed):
                yield from row_loads(tensor, self.work.limits) if tensor.name == matrix.weight else [loaded_whole(tensor)]
        if kind_of(layout) == "head" and (tied := self._tied(layout)):
            yield from row_loads(matrix_tensor(*tied), self.work.limits)

    def embeddings(self, unit: int, incoming: Iterator[Loaded], writer: Writer | None, step: Step) -> None:
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
            codes = self._codes(matrix, placed)
            for first, rows in matrix_rows(source, incoming, self.work.limits):
                stored = codes.stored(self._changed(source.name, first, rows, norms))
                meet(first, rows, codes.seen(stored))
                if writer is not None:
                    codes.write(stored, writer)
            if writer is not None:
                codes.finish(writer)

    # ---- the head

    def head(self, unit: int, incoming: Iterator[Loaded], writer: Writer, step: Step) -> Carry:
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
            hidden, codes = self._last_hidden(norm, 0, step), self._codes(tied[1])
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

    def ending(self, stages: Sequence[StageLayout], incoming: Iterator[Loaded]) -> Ending:
        """The norm and the head behind the last block, for one that is tuned; `stages`: whose tensors come in."""
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

    # ---- what becomes of the source's values

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

    def _codes(self, matrix: LinearLayout, placed: Sequence[PlacedTensor] = ()) -> RowCodes:
        """What becomes of rows that `_changed` has made."""
        return RowCodes.of(matrix, self.work.schemes, placed)

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
