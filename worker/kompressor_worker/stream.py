"""THE loop: embeddings, the blocks, the head, one after the other, each read, compressed, written and committed.

While a stage is compressed the next ones download and the last ones upload. A unit is committed in the background, but never more than one
is finished and uncommitted: that is all that a kill can cost.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import xxhash

from kompressor_worker import kernels
from kompressor_worker.block import Encoded, Stage
from kompressor_worker.errors import BadNumerics, Terminated
from kompressor_worker.journal import Journal, Upload
from kompressor_worker.layout import LinearLayout, ModelLayout, StageLayout, StoredTensor
from kompressor_worker.memory import keep_freed_memory
from kompressor_worker.passes import Pass
from kompressor_worker.pipeline import Limits, Load, Loaded, Prefetcher, Uploader, results
from kompressor_worker.schemes import Scheme
from kompressor_worker.shards import OutputPlan, PlacedTensor
from kompressor_worker.storage import Output, Source
from kompressor_worker.tensors import as_bytes, decode, float_view

log = logging.getLogger(__name__)

Report = Callable[[int, int], None]
"""Called with (unit, source bytes done so far, committed or not)."""


@dataclass(frozen=True)
class Work:
    """All that the loop needs to know; decided before a weight is read."""

    layout: ModelLayout
    passes: Sequence[Pass]
    schemes: Mapping[str, Scheme]
    plan: OutputPlan
    limits: Limits = field(default_factory=Limits)


def stream(work: Work, source: Source, output: Output, journal: Journal, report: Report, stop: threading.Event) -> None:
    """Runs every unit that the journal does not count yet. Raises Terminated once `stop` is set and what was finished is committed."""
    keep_freed_memory()
    first = journal.state.unit
    units = work.layout.units[first:]
    done = sum(u.source_bytes for u in work.layout.units[:first])
    loads = (load for number in range(first, len(work.layout.units)) for load in unit_loads(number, work))
    with (
        Prefetcher(source, loads, work.limits) as prefetched,
        Uploader(output, work.limits) as uploads,
        Writer(work, output, journal, uploads) as writer,
    ):
        incoming = iter(prefetched)
        for number, unit in enumerate(units, first):
            for stage_number, layout in enumerate(unit.stages):
                if stop.is_set():
                    raise Terminated("told to stop; what was finished is committed")
                placed = work.plan.stages[number][stage_number]
                if is_plain(layout, work.schemes):
                    copy(layout, placed, incoming, writer, work)
                else:
                    compress(layout, placed, next(incoming), writer, work)
                done += layout.source_bytes
                report(number, done)
            writer.finish(number)
            log.info("finished unit %d %s", number, unit.name)


def compress(layout: StageLayout, placed: Sequence[PlacedTensor], loaded: Loaded, writer: Writer, work: Work) -> None:
    """One stage through all passes."""
    weights = {t.name: decode(t, loaded.views) for t in layout.tensors}
    stage = Stage(layout, weights, {x.name: work.schemes[x.name] for x in layout.linears if x.name in work.schemes})
    for p in work.passes:
        p.apply(stage)
    made = {name: tensor for e in stage.encoded.values() for name, tensor in e.tensors.items()}
    for linear in layout.linears:
        if encoded := stage.encoded.get(linear.name):
            writer.record_linear(linear, stage.schemes[linear.name], encoded)
            del weights[linear.weight]
    for name, tensor in weights.items():
        refuse_nonfinite(name, kernels.nonfinite(tensor))
        made[name] = tensor.contiguous()
    for t in placed:
        writer.write(t, as_bytes(made[t.name], t))


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
            hasher.update(view)
            writer.append(t, view)
        refuse_nonfinite(t.name, bad)
        writer.record_digest(t.name, hasher.hexdigest())


def refuse_nonfinite(name: str, count: int) -> None:
    if count:
        raise BadNumerics(f"{name}: {count} values are NaN or Inf; the checkpoint is damaged or its training diverged, fetch it again")


def is_plain(stage: StageLayout, schemes: Mapping[str, Scheme]) -> bool:
    """Whether a stage's tensors pass through unchanged."""
    return not any(x.name in schemes for x in stage.linears) and all(t.encoding == "plain" for t in stage.tensors)


def unit_loads(number: int, work: Work) -> Iterator[Load]:
    """The reads of a unit, in the order in which the loop consumes them."""
    for layout, placed in zip(work.layout.units[number].stages, work.plan.stages[number], strict=True):
        if is_plain(layout, work.schemes):
            by_name = {t.name: t for t in layout.tensors}
            for t in placed:
                yield from slices(by_name[t.name].stored[0], work.limits)
        else:
            yield Load(tuple((s, 0, s.nbytes) for t in layout.tensors for s in t.stored))


def slices(stored: StoredTensor, limits: Limits) -> Iterator[Load]:
    for start in range(0, stored.nbytes, limits.slice):
        yield Load(((stored, start, min(start + limits.slice, stored.nbytes)),))


class Writer:
    """Puts encoded tensors into shards, opens and closes these, and commits finished units in order, one in the background."""

    def __init__(self, work: Work, output: Output, journal: Journal, uploads: Uploader) -> None:
        self._work, self._output, self._journal, self._uploads = work, output, journal, uploads
        self._commits = ThreadPoolExecutor(1, "commit")
        self._committing: Future[None] | None = None
        self._uploaded = list(journal.state.uploads)
        """Uploads with the parts that are certain; `_parts` are those still on their way, by upload."""
        self._parts: list[tuple[int, list[Future[Any]]]] = []
        self._digests: dict[str, str | Future[str]] = {}
        self._linears: dict[str, dict[str, Any]] = {}
        self._shard = -1

    def __enter__(self) -> Writer:
        position = self._work.plan.position(self._journal.state.unit)
        if position.offset and self._journal.state.unit < len(self._work.layout.units):
            self._shard = position.shard
            upload = self._uploaded[-1]
            assert upload.name == self._work.plan.shards[position.shard].name
            self._uploads.open(upload.name, upload.id, upload.parts, self._journal.read_tail())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self._committing and (error is None or isinstance(error, Terminated)):
                self._committing.result()
        finally:
            self._commits.shutdown(wait=True, cancel_futures=True)

    def write(self, tensor: PlacedTensor, data: memoryview) -> None:
        self._digests[tensor.name] = self._uploads.submit(digest, data)
        self.append(tensor, data)

    def append(self, tensor: PlacedTensor, data: memoryview) -> None:
        if tensor.shard != self._shard:
            self._open(tensor.shard)
        self._uploads.write(data)

    def record_digest(self, tensor: str, value: str) -> None:
        self._digests[tensor] = value

    def record_linear(self, linear: LinearLayout, scheme: Scheme, encoded: Encoded) -> None:
        self._linears[linear.name] = {
            "scheme": scheme.name,
            "shape": list(linear.shape),
            "dtype": linear.dtype,
            "squaredError": encoded.squared_error,
            "squaredNorm": encoded.squared_norm,
            **({"groupSize": scheme.group_size or -1} if scheme.choosable_groups else {}),
            **({"saturated": encoded.saturated} if encoded.saturated else {}),
        }

    def finish(self, unit: int) -> None:
        """Commits the unit in the background, after the one before it."""
        following = self._work.plan.position(unit + 1)
        futures, tail = self._uploads.cut(last=following.offset == 0 or unit + 1 == len(self._work.layout.units))
        if futures:
            self._parts.append((len(self._uploaded) - 1, futures))
        parts, self._parts = self._parts, []
        digests, self._digests = self._digests, {}
        linears, self._linears = self._linears, {}
        if self._committing:
            self._committing.result()
        # The next unit may open another shard before this commit runs: it counts the uploads of now.
        self._committing = self._commits.submit(self._commit, unit, len(self._uploaded), parts, tail, digests, linears)

    def _open(self, shard: int) -> None:
        if self._shard >= 0:
            self._parts.append((len(self._uploaded) - 1, self._uploads.cut(last=True)[0]))
        planned = self._work.plan.shards[shard]
        upload = Upload(planned.name, self._output.begin(planned.name, planned.size))
        self._uploaded.append(upload)
        self._shard = shard
        self._uploads.open(upload.name, upload.id, (), b"")
        self._uploads.write(memoryview(planned.header))

    def _commit(
        self,
        unit: int,
        uploads: int,
        parts: Sequence[tuple[int, list[Future[Any]]]],
        tail: bytes,
        digests: Mapping[str, str | Future[str]],
        linears: Mapping[str, Any],
    ) -> None:
        for number, futures in parts:
            upload = self._uploaded[number]
            self._uploaded[number] = replace(upload, parts=(*upload.parts, *results(futures)))
        record = {
            "digests": {k: v if isinstance(v, str) else v.result() for k, v in digests.items()},
            "linears": dict(linears),
        }
        self._journal.write_record(unit, record)
        before = self._journal.state.tail
        state = replace(
            self._journal.state, unit=unit + 1, uploads=tuple(self._uploaded[:uploads]), tail=self._journal.write_tail(unit, tail)
        )
        self._journal.commit(state)
        if before and before != state.tail:
            self._output.delete([before])


def digest(data: memoryview) -> str:
    """xxh3-128 of a tensor's bytes: faster than the memory bus, so that it costs nothing beside the copy. It finds damage, not malice."""
    return xxhash.xxh3_128(data).hexdigest()
