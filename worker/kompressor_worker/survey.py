"""Surveys: the calibration rows through the whole source, before the stream begins, for passes that no single block can decide for.

Nothing is written but what they find. A survey goes on where it stopped: its rows and what has been gathered are saved now and then, and
the journal says how far that is. What a finished survey has found is an object that the journal counts, and every restart decides by it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import safetensors.torch
from torch import Tensor

from kompressor_worker.assignment import Assignment
from kompressor_worker.batch import Batch
from kompressor_worker.block import Site
from kompressor_worker.block_work import batch_tokens, size_of
from kompressor_worker.calibrated import steps_in
from kompressor_worker.calibrated_units import Calibrated
from kompressor_worker.decoder import Decoder
from kompressor_worker.decoder_block import Block
from kompressor_worker.decoder_block import Step as BlockStep
from kompressor_worker.errors import Terminated
from kompressor_worker.forward import Projection, trial
from kompressor_worker.journal import Journal
from kompressor_worker.layout import ModelLayout, SourceTensor, StageLayout, UnitLayout
from kompressor_worker.matrix_rows import matrix_rows, row_loads
from kompressor_worker.pace import Pace
from kompressor_worker.parts import parts_of, whole_block
from kompressor_worker.passes import Pass
from kompressor_worker.passes.surveyor import SeenBlock, Surveyed
from kompressor_worker.pipeline import Load, Loaded, Prefetcher
from kompressor_worker.schemes import Scheme
from kompressor_worker.seen_experts import Sample
from kompressor_worker.sites import sites_of
from kompressor_worker.snapshots import object_names, restored, snapshot_objects
from kompressor_worker.storage import WORK, Output, Source
from kompressor_worker.stream import Report, Step
from kompressor_worker.tensors import decode
from kompressor_worker.unit_kinds import final_norm, kind_of, matrix_of, matrix_tensor

log = logging.getLogger(__name__)


def rounds(passes: Sequence[Pass]) -> int:
    """How many surveys a job takes."""
    return max((p.surveys for p in passes), default=0)


def recalled(output: Output, done: int, assigned: Assignment) -> Assignment:
    """By what earlier surveys have found, `done` of them."""
    for number in range(done):
        found = output.read(found_name(number))
        assert found is not None, f"the journal counts on {found_name(number)}, which is missing"
        tell(assigned.passes, number, safetensors.torch.load(found[0]))
    return assigned.renewed() if done else assigned


def tell(passes: Sequence[Pass], number: int, found: Mapping[str, Tensor]) -> None:
    for index, p in enumerate(passes):
        if number < p.surveys:
            mine = {name.partition(":")[2]: value for name, value in found.items() if name.startswith(f"{index}:")}
            p.decide(mine)


@dataclass
class Survey:
    """One of a job's surveys: number `number`, over the source's layout."""

    number: int
    units: Calibrated
    passes: Sequence[Pass]
    journal: Journal

    def __post_init__(self) -> None:
        self.layout: ModelLayout = self.units.work.layout
        self.surveyors = {i: p.surveyor(self.layout) for i, p in enumerate(self.passes) if self.number < p.surveys}
        stream = self.units.engine.streams.calibration
        assert stream is not None, "a pass that surveys measures"
        self.stream, self.decoder = stream, self.units.engine.decoder
        self.wanted = frozenset(s for surveyor in self.surveyors.values() for s in surveyor.statistics)
        self.of_experts = frozenset(s for surveyor in self.surveyors.values() if surveyor.measures_experts for s in surveyor.statistics)
        self._saved = time.monotonic()

    def run(self, source: Source, report: Report, stop: threading.Event) -> None:
        """Raises Terminated once `stop` is set; what is saved by then is not done again."""
        for surveyor in self.surveyors.values():
            surveyor.begin(self._surveyed())
        first = self._restore()
        done = sum(u.source_bytes for u in self.layout.units[:first])
        loads = (load for number in range(first, len(self.layout.units)) for load in self._loads(number))
        with Prefetcher(source, loads, self.units.work.limits) as prefetched:
            incoming = iter(prefetched)
            for number in range(first, len(self.layout.units)):

                def step(nbytes: int, number: int = number) -> None:
                    nonlocal done
                    done += nbytes
                    report(number, done)
                    if stop.is_set():
                        raise Terminated("told to stop; what the survey has saved is kept")

                self._unit(number, incoming, step)
                self._save(number + 1)
        self._finish()

    def _surveyed(self) -> Surveyed:
        decoder = self.decoder
        return Surveyed(
            decoder.device,
            int(decoder.config.vocab_size),
            decoder.final_softcap,
            lambda hidden, norm: decoder.norm(hidden, norm).to(hidden.dtype),
            self.stream.batches,
            self.stream.tokens,
        )

    # ---- units

    def _loads(self, number: int) -> Iterator[Load]:
        unit = self.layout.units[number]
        match kind_of(unit):
            case "embeddings" | "block":
                yield from self.units.loads(number)
            case "head" if any(s.reads_head for s in self.surveyors.values()):
                for stage in unit.stages:
                    matrix = matrix_of(stage)
                    for tensor in stage.tensors:
                        if matrix is not None and tensor.name == matrix.weight:
                            yield from row_loads(tensor, self.units.work.limits)
                        else:
                            yield Load(tuple((s, 0, s.nbytes) for s in tensor.stored))
                if (tied := self._tied(unit)) is not None:
                    yield from row_loads(tied, self.units.work.limits)

    def _tied(self, unit: UnitLayout) -> SourceTensor | None:
        """The embeddings, where they are the head."""
        if any(m.kind == "head" for s in unit.stages for m in s.linears):
            return None
        found = [(s, m) for u in self.layout.units for s in u.stages for m in s.linears if m.kind == "embedding"]
        return matrix_tensor(*found[0]) if found else None

    def _unit(self, number: int, incoming: Iterator[Loaded], step: Step) -> None:
        unit = self.layout.units[number]
        match kind_of(unit):
            case "embeddings":
                self.units.replay(number, incoming, step)
            case "block":
                self._block(number, unit, self.units.reader(incoming), step)
            case "head" if any(s.reads_head for s in self.surveyors.values()):
                self._head(unit, incoming, step)
            case _:
                step(unit.source_bytes)

    def _block(self, number: int, unit: UnitLayout, load: Callable[[StageLayout], dict[str, Tensor]], step: Step) -> None:
        place = self.units.place(number).source
        block = Block(self.decoder, place, unit)
        tokens = sum(t.numel() for t in self.stream.tokens)
        pace = Pace(unit.source_bytes, sum(size_of(s.layout) for s in block.steps) * tokens, step)
        before, middle = self.stream.snapshot(), list[Tensor]()
        whole = any(surveyor.whole_block for surveyor in self.surveyors.values())
        sites: list[Site] = []
        norms: dict[str, Tensor] = {}
        routers: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        sample: Sample | None = None
        for part in whole_block(unit) if whole else parts_of(unit):
            weights = dict(norms)
            for stage in part.of(unit):
                weights |= (found := load(stage))
                norms |= found if not stage.linears else {}
                routers |= found if any(x.kind == "router" for x in stage.linears) else {}
            for each in steps_in(block, part):
                if each is block.steps[-1]:
                    middle = self.stream.snapshot()
                if each.name == "experts_in" and any(s.wants_experts for s in self.surveyors.values()):
                    sample = sample or Sample.of(block, self.stream.batches)
                    self._expert(sample, each, weights, pace)
                sites += self._step(block, each, weights, pace)
            for surveyor in self.surveyors.values():
                surveyor.part(weights)
        self.stream.exclude_nonfinite(unit.name)

        def forward(rows: Sequence[Batch], model: ModelLayout | None = None, schemes: Mapping[str, Scheme] | None = None) -> None:
            assert whole, "whole_block says that a surveyor takes other rows through blocks"
            through = block if model is None else Block(Decoder(model, self.decoder.device), block.layer, unit)
            other = trial(weights, schemes or {}, through.decoder)
            for each in through.steps:
                for batch in rows:
                    through.advance(each, batch, weights, other)
                    pace(0)
                other.forget()

        valid = [batch.valid(h.shape[1], h.device) for batch, h in zip(self.stream.batches, before, strict=True)]
        held = weights if whole else norms | routers
        seen = SeenBlock(place, block.prefix, held, tuple(sites), before, middle, self.stream.snapshot(), valid, forward)
        for surveyor in self.surveyors.values():
            surveyor.block(seen)
            pace(0)
        pace.finish()

    def _step(self, block: Block, step: BlockStep, weights: Mapping[str, Tensor], pace: Pace) -> Sequence[Site]:
        """The rows through a step, and what was measured of its inputs."""
        wanted = self.of_experts if step.name.startswith("experts") else self.wanted
        found = sites_of(block, step, wanted)
        by_name = {site.name: site.statistics for site in found}
        project = Projection.as_a_runtime(weights, self.decoder.dtype, self.decoder.device)
        for batch in self.stream.batches:
            for name, x in block.inputs(step, batch, weights) if wanted else ():
                by_name[name].add(x)
            block.advance(step, batch, weights, project)
            self.stream.spill.settle(batch)
            pace(size_of(step.layout) * batch_tokens(batch))
        return found

    def _expert(self, sample: Sample, step: BlockStep, weights: Mapping[str, Tensor], pace: Pace) -> None:
        seen = sample.expert(step.experts[0], self.stream.batches, weights, pace)
        for surveyor in (s for s in self.surveyors.values() if s.wants_experts):
            surveyor.expert(seen)
            pace(0)

    def _head(self, unit: UnitLayout, incoming: Iterator[Loaded], step: Step) -> None:
        norms: dict[str, Tensor] = {}
        for stage in unit.stages:
            matrix = matrix_of(stage)
            for tensor in stage.tensors:
                if matrix is not None and tensor.name == matrix.weight:
                    self._head_rows(tensor, incoming, final_norm(norms), step)
                else:
                    norms |= {tensor.name: decode(tensor, next(incoming).views)}
        if (tied := self._tied(unit)) is not None:
            self._head_rows(tied, incoming, final_norm(norms), step)
        step(unit.source_bytes)

    def _head_rows(self, tensor: SourceTensor, incoming: Iterator[Loaded], norm: Tensor, step: Step) -> None:
        for first, rows in matrix_rows(tensor, incoming, self.units.work.limits):
            for surveyor in (s for s in self.surveyors.values() if s.reads_head):
                surveyor.head(first, rows, norm)
            step(0)

    # ---- what is kept

    def _save(self, unit: int) -> None:
        """Before this unit, where it is due and nothing is between two blocks."""
        due = time.monotonic() - self._saved > self.units.work.limits.snapshot_seconds
        inside = 0 < unit < len(self.layout.units) and kind_of(self.layout.units[unit]) == "block"
        if not due or not inside or not all(s.resting for s in self.surveyors.values()):
            return
        self._saved = time.monotonic()
        place, output = self._place(unit), self.journal.output
        gathered = {f"{i}:{name}": value.cpu().contiguous() for i, s in self.surveyors.items() for name, value in s.tensors.items()}
        output.write(f"{place}gathered", safetensors.torch.save(gathered))
        excluded = [list(batch.excluded) for batch in self.stream.batches]
        for name, data in snapshot_objects(place, [(self.stream, self.stream.snapshot(), excluded, list(self.stream.excluded))]):
            output.write(name, data)
        before = self.journal.state.survey
        self.journal.commit(replace(self.journal.state, survey=unit))
        if before is not None:
            output.delete(self._objects(before))

    def _restore(self) -> int:
        unit = self.journal.state.survey
        if unit is None:
            return 0
        restored(self._place(unit), [self.stream], self._read)
        gathered = safetensors.torch.load(self._read(f"{self._place(unit)}gathered"))
        for i, surveyor in self.surveyors.items():
            for name, value in gathered.items():
                if name.startswith(f"{i}:"):
                    surveyor.tensors[name.partition(":")[2]] = value.to(self.decoder.device)
        log.info("survey %d goes on at unit %d", self.number + 1, unit)
        return unit

    def _finish(self) -> None:
        """What was found, and then the commit that counts it."""
        found = {f"{i}:{name}": value.cpu().contiguous() for i, s in self.surveyors.items() for name, value in s.found().items()}
        output, before = self.journal.output, self.journal.state.survey
        output.write(found_name(self.number), safetensors.torch.save(found))
        self.journal.commit(replace(self.journal.state, surveys=self.number + 1, survey=None))
        if before is not None:
            output.delete(self._objects(before))
        tell(self.passes, self.number, found)

    def _place(self, unit: int) -> str:
        return f"{WORK}survey-{self.number}-{unit:05d}/"

    def _objects(self, unit: int) -> list[str]:
        place = self._place(unit)
        return [*object_names(place, self.stream), f"{place}index.json", f"{place}gathered"]

    def _read(self, name: str) -> bytes:
        found = self.journal.output.read(name)
        assert found is not None, f"the journal counts on {name}, which is missing"
        return found[0]


def found_name(number: int) -> str:
    return f"{WORK}found-{number}.safetensors"
