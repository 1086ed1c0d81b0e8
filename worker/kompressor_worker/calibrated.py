"""The block-sequential engine: one decoder block through measuring, passes and propagation, and the evaluation beside it.

A block goes part by part (parts.py): the original's rows through the part as it was, then passes, then the result's rows through what came
out; then it is written, and the next one is read. Within a part the steps go one after the other: a step's input is measured with
everything before it already compressed, the passes change its weights, and the output that reaches the next step is computed from what will
be published. So one forward a block serves any number of passes; only passes that fold scales across steps need the whole block, measured
first, and its forward a second time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kompressor_worker.activations import Activations
from kompressor_worker.batch import Batch
from kompressor_worker.block_work import (
    BlockWork,
    Finished,
    PartWork,
    Place,
    Streams,
    expected_work,
    output_error,
    size_of_unit,
)
from kompressor_worker.compressing import Compressing, KvHook, flow, runtime_of, turned
from kompressor_worker.decoder import Decoder
from kompressor_worker.decoder_block import Block, Step
from kompressor_worker.ending import FindEnding
from kompressor_worker.formats.stored import decode
from kompressor_worker.forward import KvObserver, Projection, Published, kv_rounding
from kompressor_worker.layout import StageLayout, UnitLayout
from kompressor_worker.measuring import Measuring
from kompressor_worker.memory import give_back_freed_memory, peak_bytes
from kompressor_worker.pace import Pace, unheard
from kompressor_worker.parts import Part, held, parts_of, plain, together
from kompressor_worker.passes import Pass
from kompressor_worker.reshaping import Reshaper
from kompressor_worker.schemes import Scheme

GIVEN_BACK = 32 << 20
"""Bytes of source after which freed memory goes back to the system: experts are often small, and it takes a while."""


def effective(
    weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor], schemes: Mapping[str, Scheme], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    return {**weights, **{f"{name}.weight": decode(name, tensors, scheme, dtype).to(device) for name, scheme in schemes.items()}}


Load = Callable[[StageLayout], dict[str, Tensor]]
"""The tensors of a stage by full name, on the device; called once for each, in order, and they are the caller's to change."""
Beyond = tuple[Place, UnitLayout]
Write = Callable[[int, Finished], None]
"""Takes a stage (its number in the block) that is done."""


class Engine:
    """Runs blocks, part by part. Everything that lasts from one block to the next is in the streams."""

    def __init__(
        self,
        decoder: Decoder,
        passes: Sequence[Pass],
        schemes: Mapping[str, Scheme],
        streams: Streams,
        source: Decoder | None = None,
        least_tokens: int = 0,
    ) -> None:
        """`source`: of the model as it was, where `decoder` is of one of other sizes. `least_tokens`: experts that get fewer of the
        calibration data's are measured on all of them."""
        self.decoder, self.passes, self.schemes, self.streams = decoder, passes, schemes, streams
        self.source, self.least_tokens = source or decoder, least_tokens
        self._pace = Pace(0, 0, unheard)
        measuring = Measuring(streams, decoder, least_tokens, lambda work: self._pace(work))
        self._compressing = Compressing(decoder, passes, streams, measuring, lambda work: self._pace(work))
        self.tunes = self._compressing.tunes

    def block(
        self,
        at: Place,
        unit: UnitLayout,
        load: Load,
        write: Write,
        tell: Callable[[int], None] = unheard,
        beyond: Sequence[Beyond] = (),
        find_ending: FindEnding | None = None,
    ) -> dict[str, Any]:
        """Takes a block from `load` to `write`; what there is to say of it. `tell` hears of the unit's source bytes, batch by batch, and
        may raise. `beyond`: where it is tuned, the blocks behind it that the result lacks; they are loaded after it. `find_ending`: of
        the last one that is tuned, called after that. Raises BadNumerics."""
        began = time.monotonic()
        block = Block(self.decoder, at.result, unit, self.together(unit))
        self._pace = self._paced(block, unit, tell, replayed=False)
        work = BlockWork(block, KvObserver(self.decoder.kv_heads, self.decoder.device))
        reshaper = self._reshaper(at, unit)
        original, norms = Block(self.source, at.source, unit.as_stored()), dict[str, Tensor]()
        parts, passed = parts_of(unit, self.passes, self.schemes), 0
        for part in parts:
            stored = self._loaded(unit, part, load, norms)
            aims = self._aims(original, stored, beyond, load)
            work.ending = find_ending() if find_ending is not None else None
            self._original(original, part, stored, reference=reshaper is None)
            self._part(work, unit, part, stored, reshaper, aims, write)
            passed += sum(unit.stages[number].source_bytes for number in part.stages)
            del stored  # before the next part is read
            if passed >= GIVEN_BACK or part is parts[-1]:
                give_back_freed_memory()
                passed = 0
        for stream in self.streams.through_compressed():
            stream.exclude_nonfinite(unit.name)
        self._pace.finish()
        return self._record(work, began)

    def replay(self, at: Place, unit: UnitLayout, load: Load, published: Load, tell: Callable[[int], None] = unheard) -> None:
        """The same for the streams, with a block that is done already: `published` as `load`, of what was written."""
        block = Block(self.decoder, at.result, unit, self.together(unit))
        self._pace = self._paced(block, unit, tell, replayed=True)
        original, norms = Block(self.source, at.source, unit.as_stored()), dict[str, Tensor]()
        made: dict[str, Tensor] = {}
        for part in parts_of(unit, self.passes, self.schemes):
            self._original(original, part, self._loaded(unit, part, load, norms), reference=True)
            self._replayed(block, unit, part, self._loaded(unit, part, published, made, dropped=False))
        for stream in self.streams.through_compressed():
            stream.exclude_nonfinite(unit.name)
        self._pace.finish()

    def _replayed(self, block: Block, unit: UnitLayout, part: Part, made: Mapping[str, Tensor]) -> None:
        schemes, steps = self._schemes_of(unit, part), steps_in(block, part)
        made = {name: tensor.to(self.decoder.device) for name, tensor in made.items()}
        names = {t.name for stage in (*plain(unit), *part.of(unit)) for t in stage.tensors}
        exact = {name: tensor for name, tensor in made.items() if name in names}
        current = effective(exact, made, schemes, self.decoder.dtype, self.decoder.device)
        for stream in self.streams.through_compressed():
            self._flow(block, steps, stream, self._runtime(current))
        if self.streams.compressed is not None:
            rounding = kv_rounding(unit.name, made)
            self._flow(block, steps, self.streams.compressed, Published(current, schemes, made), rounding)

    def pass_by(self, at: Place, unit: UnitLayout, load: Load, tell: Callable[[int], None] = unheard) -> None:
        """A block that the result does not have: the original's rows alone go through it."""
        tokens = sum(t.numel() for s in self.streams.of_the_original() for t in s.tokens)
        self._pace = Pace(unit.source_bytes, size_of_unit(unit) * tokens, tell)
        original, norms = Block(self.source, at.source, unit.as_stored()), dict[str, Tensor]()
        for part in parts_of(unit):
            self._original(original, part, self._loaded(unit, part, load, norms), reference=True)
        self._pace.finish()

    def together(self, unit: UnitLayout) -> bool:
        """Whether all experts of a mixture are in memory at once."""
        return held(self.passes) is not None or together(unit, self.schemes) is not None

    def _loaded(self, unit: UnitLayout, part: Part, load: Load, norms: dict[str, Tensor], dropped: bool = True) -> dict[str, Tensor]:
        """A part's tensors, and what of the block belongs to no linear, which `norms` gathers."""
        weights: dict[str, Tensor] = {}
        for stage in part.of(unit):
            if dropped or not stage.dropped:
                found = load(stage)
                weights |= found
                norms |= found if not stage.linears else {}
        return {**norms, **weights}

    def _schemes_of(self, unit: UnitLayout, part: Part) -> dict[str, Scheme]:
        return {x.name: self.schemes[x.name] for stage in part.of(unit) for x in stage.linears if x.name in self.schemes}

    def _original(self, block: Block, part: Part, weights: Mapping[str, Tensor], reference: bool) -> None:
        """Rows through a part as it was: the evaluation's, and the reference's unless they go along while it is reshaped."""
        steps = steps_in(block, part)
        if self.streams.original is not None:
            self._flow(block, steps, self.streams.original, Projection(weights))
        if self.streams.reference is not None and reference:
            self._flow(block, steps, self.streams.reference, self._runtime(weights))

    def _reshaper(self, at: Place, unit: UnitLayout) -> Reshaper | None:
        """Fewer heads and neurons, where that is asked for."""
        if self.streams.calibration is None or not any(p.reduces for p in self.passes):
            return None
        streams = self.streams.calibration, self.streams.reference
        return Reshaper(self.source, self.decoder, self.passes, *streams, self._pace, self.least_tokens, at.source, unit)

    def _part(
        self,
        work: BlockWork,
        unit: UnitLayout,
        part: Part,
        stored: dict[str, Tensor],
        reshaper: Reshaper | None,
        aims: Sequence[Tensor] | None,
        write: Write,
    ) -> None:
        """From the weights as they were, which are used up, to those that are published, and the streams of the result through them.
        `aims`: as of `_aims`."""
        weights = stored if reshaper is None else dict(stored)
        for p in self.passes:
            self._pace(0)
            p.transform(unit, weights)
        if reshaper is not None:
            reshaper.part(part, stored, weights)
            work.reduced |= reshaper.notes
        done = PartWork(weights, self._schemes_of(unit, part), dict(weights))
        steps = steps_in(work.block, part)
        self._compressing.through(work, done, steps, aims)
        if self.streams.compressed is not None:
            tensors = done.published()
            rounding = kv_rounding(work.block.prefix[:-1], tensors)
            self._flow(work.block, steps, self.streams.compressed, Published(done.current, done.schemes, tensors), rounding)
        for number in part.stages:
            if not unit.stages[number].dropped:
                write(number, done.of(unit.stages[number]))

    def _paced(self, block: Block, unit: UnitLayout, tell: Callable[[int], None], replayed: bool) -> Pace:
        return Pace(unit.source_bytes, expected_work(self.streams, () if replayed else self.passes, block, unit), tell)

    def _aims(self, block: Block, stored: Mapping[str, Tensor], beyond: Sequence[Beyond], load: Load) -> list[Tensor] | None:
        """The reference's rows behind those blocks that the result lacks, which this one stands in for; None: there are none of them."""
        if not beyond or self.streams.reference is None:
            return None
        rows = [Batch(batch.lengths, dict(batch.state), batch.excluded) for batch in self.streams.reference.batches]
        ahead = replace(self.streams.reference, batches=rows)
        self._flow(block, block.steps, ahead, self._runtime(stored))
        for place, unit in beyond:
            gone, norms = Block(self.source, place.source, unit.as_stored()), dict[str, Tensor]()
            for part in parts_of(unit):
                self._flow(gone, steps_in(gone, part), ahead, self._runtime(self._loaded(unit, part, load, norms)))
        return [batch.state["hidden"] for batch in rows]

    def _flow(self, block: Block, steps: Sequence[Step], stream: Activations, project: Projection, kv: KvHook | None = None) -> None:
        flow(block, steps, stream, project, self._pace, kv)

    def _runtime(self, weights: Mapping[str, Tensor]) -> Projection:
        return runtime_of(self.decoder, weights)

    def _turned(self, hidden: Tensor) -> Tensor:
        return turned(self.passes, hidden)

    def _record(self, work: BlockWork, began: float) -> dict[str, Any]:
        return {**self.cost(began), **work.record(), **self.met()}

    def cost(self, began: float) -> dict[str, Any]:
        return {"cost": {"seconds": round(time.monotonic() - began, 3), "peakBytes": peak_bytes(self.decoder.device.type)}}

    def met(self) -> dict[str, Any]:
        """What is to be said of the streams behind a block."""
        record: dict[str, Any] = {}
        if self.streams.original is not None and self.streams.compressed is not None:
            record["outputError"] = output_error(self.streams.original, self.streams.compressed, self._turned)
        if self.streams.calibration is not None:
            record["excludedRows"] = len(self.streams.calibration.excluded)
        return record


def steps_in(block: Block, part: Part) -> list[Step]:
    return [step for step in block.steps if step.stages[-1] in part.stages]
