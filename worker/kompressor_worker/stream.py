"""THE loop: embeddings, the blocks, the head, one after the other, each read, compressed, written and committed.

While a stage is compressed the next ones download and the last ones upload. A unit is committed in the background, but never more than one
is finished and uncommitted: that is all that a kill can cost.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import xxhash

from kompressor_worker import kernels
from kompressor_worker.block import Stage
from kompressor_worker.errors import Terminated
from kompressor_worker.formats import bitmask
from kompressor_worker.journal import Journal
from kompressor_worker.layout import LinearLayout, ModelLayout, SourceTensor, StageLayout, StoredTensor
from kompressor_worker.matrix_rows import RowCodes, matrix_rows, row_loads
from kompressor_worker.memory import keep_freed_memory
from kompressor_worker.passes import Pass
from kompressor_worker.pipeline import Limits, Load, Loaded, Prefetcher, Uploader
from kompressor_worker.schemes import Scheme
from kompressor_worker.shards import OutputPlan, PlacedTensor, row_by_row
from kompressor_worker.storage import Output, Source
from kompressor_worker.tensors import as_bytes, decode, float_view, refuse_nonfinite, slice_bytes, tensor
from kompressor_worker.unit_kinds import in_file_order
from kompressor_worker.writer import NOTHING, Carry, Writer

log = logging.getLogger(__name__)

Report = Callable[[int, int], None]
"""Called with (unit, source bytes done so far)."""
Step = Callable[[int], None]
"""Called with the source bytes of a stage that is done; raises Terminated when it is time to stop."""


@dataclass(frozen=True)
class Work:
    """All that the loop needs to know; decided before a weight is read."""

    layout: ModelLayout
    passes: Sequence[Pass]
    schemes: Mapping[str, Scheme]
    plan: OutputPlan
    limits: Limits = field(default_factory=Limits)


class Units(Protocol):
    """How units are worked on: tensor by tensor, or with activations flowing through them."""

    def first(self, journal: Journal) -> int:
        """Where to begin, so that everything is as it was before the first unit that is not committed."""

    def loads(self, unit: int) -> Iterator[Load]:
        """The reads of a unit, in the order in which they are consumed."""

    def replay(self, unit: int, incoming: Iterator[Loaded], step: Step) -> None:
        """A unit that is committed already: what it left in memory, made again."""

    def run(self, unit: int, incoming: Iterator[Loaded], writer: Writer, step: Step) -> Carry:
        """A unit from its reads to its writes."""

    @property
    def left(self) -> Sequence[str]:
        """Working objects that are there for a restart alone."""


def stream(work: Work, units: Units, source: Source, output: Output, journal: Journal, report: Report, stop: threading.Event) -> None:
    """Runs every unit that the journal does not count yet. Raises Terminated once `stop` is set and what was finished is committed."""
    keep_freed_memory()
    total, first = len(work.layout.units), units.first(journal)
    done = sum(u.source_bytes for u in work.layout.units[:first])
    with (
        Prefetcher(source, (load for number in range(first, total) for load in units.loads(number)), work.limits) as prefetched,
        Uploader(output, work.limits) as uploads,
        Writer(work.plan, output, journal, uploads) as writer,
    ):
        incoming, begun = iter(prefetched), journal.state.unit
        for number in range(first, total):

            def step(nbytes: int, number: int = number) -> None:
                nonlocal done
                done += nbytes
                report(number, done)
                if stop.is_set():
                    raise Terminated("told to stop; what was finished is committed")

            if number < begun:
                units.replay(number, incoming, step)
                continue
            writer.finish(number, units.run(number, incoming, writer, step))
            log.info("finished unit %d %s", number, work.layout.units[number].name)


@dataclass(frozen=True)
class DataFree:
    """Stage by stage, nothing flows: passes that work from weights alone."""

    work: Work

    def first(self, journal: Journal) -> int:
        return journal.state.unit

    def loads(self, unit: int) -> Iterator[Load]:
        for layout, placed in zip(self.work.layout.units[unit].stages, self.work.plan.stages[unit], strict=True):
            if not layout.dropped:
                yield from stage_loads(layout, placed, self.work)

    @property
    def left(self) -> Sequence[str]:
        return ()

    def replay(self, unit: int, incoming: Iterator[Loaded], step: Step) -> None:
        raise AssertionError("nothing flows, so nothing is made again")

    def run(self, unit: int, incoming: Iterator[Loaded], writer: Writer, step: Step) -> Carry:
        for layout, placed in zip(self.work.layout.units[unit].stages, self.work.plan.stages[unit], strict=True):
            if layout.dropped:
                pass  # nothing of it is read
            elif is_plain(layout, placed, self.work.schemes):
                copy(layout, placed, incoming, writer, self.work)
            elif (matrix := row_by_row(layout, self.work.schemes)) is not None:
                compress_rows(layout, matrix, placed, incoming, writer, self.work, step)
            else:
                compress(layout, placed, next(incoming), writer, self.work, step)
            step(layout.source_bytes)
        return NOTHING


def compress(layout: StageLayout, placed: Sequence[PlacedTensor], loaded: Loaded, writer: Writer, work: Work, step: Step) -> None:
    """One stage through all passes."""
    weights = {t.name: decode(t, loaded.views) for t in layout.tensors}
    schemes = {x.name: work.schemes[x.name] for x in layout.linears if x.name in work.schemes}
    stage = Stage(layout, weights, schemes, heard=lambda: step(0))
    for p in work.passes:
        p.apply(stage)
    made = {name: value for e in stage.encoded.values() for name, value in e.tensors.items()}
    for linear in layout.linears:
        if pruned := stage.pruned.get(linear.name):
            writer.record_pruned(linear, pruned)
        if encoded := stage.encoded.get(linear.name):
            writer.record_linear(linear, stage.schemes[linear.name], encoded)
            del weights[linear.weight]
    for name, weight in weights.items():
        refuse_nonfinite(name, kernels.nonfinite(weight))
        made[name] = weight.contiguous()
    bitmask.pack_linears(layout.linears, made)
    for t in placed:
        writer.write(t, as_bytes(made[t.name], t))


def compress_rows(
    layout: StageLayout,
    matrix: LinearLayout,
    placed: Sequence[PlacedTensor],
    incoming: Iterator[Loaded],
    writer: Writer,
    work: Work,
    step: Step,
) -> None:
    """Embeddings or head, slice by slice."""
    places = {t.name: t for t in placed}
    for source in in_file_order(layout, placed):
        if source.name != matrix.weight:
            value = decode(source, next(incoming).views)
            refuse_nonfinite(source.name, kernels.nonfinite(value))
            writer.write(places[source.name], as_bytes(value, places[source.name]))
            continue
        codes = RowCodes.of(matrix, work.schemes, placed)
        for _, rows in matrix_rows(source, incoming, work.limits):
            codes.write(codes.stored(rows), writer)
            step(0)
        codes.finish(writer)


def copy(layout: StageLayout, placed: Sequence[PlacedTensor], incoming: Iterator[Loaded], writer: Writer, work: Work) -> None:
    """Plain tensors pass through in slices: never whole in memory."""
    by_name = {t.name: t for t in layout.tensors}
    for t in placed:
        stored = by_name[t.name].stored[0]
        hasher = xxhash.xxh3_128()
        bad = 0
        for _ in slices(stored, work.limits):
            view = next(incoming).views[stored.name]
            bad += kernels.nonfinite(values) if (values := float_view(view, t.dtype)) is not None else 0
            data = view if t.form is None else slice_bytes(tensor(view, t.dtype, (-1,)), t)
            hasher.update(data)
            writer.append(t, data)
        refuse_nonfinite(t.name, bad)
        writer.record_digest(t.name, hasher.hexdigest())


def is_plain(stage: StageLayout, placed: Sequence[PlacedTensor], schemes: Mapping[str, Scheme]) -> bool:
    """Whether a stage's tensors pass through unchanged, or value by value."""
    untouched = not any(x.name in schemes or x.pruned for x in stage.linears) and all(t.encoding == "plain" for t in stage.tensors)
    return untouched and all(t.sliced for t in placed)


def stage_loads(layout: StageLayout, placed: Sequence[PlacedTensor], work: Work) -> Iterator[Load]:
    """Plain tensors in slices, embeddings and head that are quantised by rows too; others together."""
    matrix = row_by_row(layout, work.schemes)
    if is_plain(layout, placed, work.schemes):
        for source in in_file_order(layout, placed):
            yield from slices(source.stored[0], work.limits)
    elif matrix is not None:
        for source in in_file_order(layout, placed):
            yield from row_loads(source, work.limits) if source.name == matrix.weight else [loaded_whole(source)]
    else:
        yield whole(layout)


def loaded_whole(source: SourceTensor) -> Load:
    return Load(tuple((s, 0, s.nbytes) for s in source.stored))


def whole(layout: StageLayout) -> Load:
    """All tensors of a stage at once."""
    return Load(tuple((s, 0, s.nbytes) for t in layout.tensors for s in t.stored))


def slices(stored: StoredTensor, limits: Limits) -> Iterator[Load]:
    for start in range(0, stored.nbytes, limits.slice):
        yield Load(((stored, start, min(start + limits.slice, stored.nbytes)),))
