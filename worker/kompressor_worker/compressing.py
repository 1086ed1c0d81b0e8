"""A part of a block through its passes, segment by segment (`segments`): measured step by step, each step with everything before it already
compressed, and tuned as a whole behind a segment that asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from kompressor_worker.activations import Activations
from kompressor_worker.batch import Batch
from kompressor_worker.block import Encoded, Stage
from kompressor_worker.block_work import BlockWork, PartWork, Streams, batch_tokens, columns_of, size_of
from kompressor_worker.decoder import Decoder
from kompressor_worker.decoder_block import Block, Cache, Step
from kompressor_worker.formats.stored import decode
from kompressor_worker.forward import Projection
from kompressor_worker.measuring import Measuring
from kompressor_worker.passes import Pass
from kompressor_worker.recovering import Judge, Recovery, Rows
from kompressor_worker.segments import Segment, segments_of
from kompressor_worker.sites import join, sites_of
from kompressor_worker.statistics import Statistic

KvHook = Callable[[Batch], Cache | None]
Heard = Callable[[float], None]
"""Hears of multiply-adds, and may raise."""


class Compressing:
    """Of an engine; what lasts from one part to the next is in the streams."""

    def __init__(self, decoder: Decoder, passes: Sequence[Pass], streams: Streams, measuring: Measuring, heard: Heard) -> None:
        self.decoder, self.passes, self.streams, self.measuring, self.heard = decoder, passes, streams, measuring, heard
        self.segments = segments_of(passes)
        self.tunes = len(self.segments) > 1
        self._kv = any(p.kv for p in passes)

    def through(self, work: BlockWork, part: PartWork, steps: Sequence[Step], aims: Sequence[Tensor] | None) -> None:
        """All passes. What is tuned flows from the part's input again, once it has been."""
        pruned = {x.weight for step in steps for x in step.layout.linears if x.pruned is not None}
        before = {name: weight for name, weight in part.weights.items() if name in pruned} if self.tunes else {}
        through = self.streams.through_compressed() if self.tunes else []  # else what has flowed on is not held
        streams = [(stream, [dict(batch.state) for batch in stream.batches]) for stream in through]
        for number, segment in enumerate(self.segments):
            if number:
                for stream, states in streams:
                    for batch, state in zip(stream.batches, states, strict=True):
                        batch.state = dict(state)
            for bunch in [steps] if any(p.whole_block for p in segment.passes) else [(step,) for step in steps]:
                self._compress(work, part, bunch, segment)
            if segment.recover is not None:
                self._recover(work, part, segment, streams[0][1], aims, before)

    def _recover(
        self,
        work: BlockWork,
        part: PartWork,
        segment: Segment,
        states: Sequence[Mapping[str, Tensor]],
        aims: Sequence[Tensor] | None,
        before: Mapping[str, Tensor],
    ) -> None:
        """`states`: of the calibration rows, at the block's input."""
        calibration, reference = self.streams.calibration, self.streams.reference
        assert calibration is not None and reference is not None and segment.recover is not None
        inputs = [state["hidden"] for state in states]
        rows = Rows(calibration.batches, inputs, aims or [batch.state["hidden"] for batch in reference.batches])
        seed = work.block.layer * len(self.segments) + self.segments.index(segment)
        judge = Judge(lambda hidden: turned(self.passes, hidden), work.ending)
        recovery = Recovery(segment.recover.params, work.block, part, rows, self.decoder, judge, self.heard, seed)
        work.note(work.block.prefix[:-1], {"recover": [recovery.run(before)]})
        for name, encoded in part.encoded.items():
            self._take(part, name, encoded)
        part.take_up()

    def _compress(self, work: BlockWork, part: PartWork, steps: Sequence[Step], segment: Segment) -> None:
        """These steps through the passes of a segment, and the activations through what comes out; behind a block's end in the last one."""
        last = segment is self.segments[-1]
        wanted = frozenset(s for p in segment.passes for s in p.statistics) | (self.measuring.drift if last else frozenset())
        stages = [self._stage(work, part, step, wanted) for step in steps]
        join([site for stage in stages for site in stage.sites])
        self.measuring.measure(work, part, steps, stages)
        for p in segment.passes:
            for stage in stages if not p.kv else ():
                self.measuring.refresh(work, part, steps, stages, p.statistics)
                p.apply(stage)
                self.heard(p.products * size_of(stage.layout) * columns_of(stage.layout))
        for stage in stages:
            part.encoded |= stage.encoded
            part.pruned |= stage.pruned
            if stage.notes:
                work.note(stage.layout.name, stage.notes)
            for name, encoded in stage.encoded.items():
                self._take(part, name, encoded)
        part.take_up()
        for stream in self.streams.through_compressed() if last or steps[-1] is not work.block.steps[-1] else ():
            observer = work.observer if last and stream is self.streams.calibration and self._kv else None
            flow(work.block, steps, stream, runtime_of(self.decoder, part.current), self.heard, observer.of if observer else None)
        if any(step.name == "router" for step in steps) and wanted:
            self.measuring.count(work)
        keeps = self.tunes or any(p.whole_block for p in segment.passes)
        for name in () if keeps else [name for stage in stages for name in stage.encoded]:
            del part.weights[f"{name}.weight"]  # no other step looks at it
        for p in self.passes:
            for stage in stages if p.kv and last else ():  # now that keys and values have been seen as the published weights make them
                p.apply(stage)

    def _take(self, part: PartWork, name: str, encoded: Encoded) -> None:
        part.current[f"{name}.weight"] = decode(name, encoded.tensors, part.schemes[name], self.decoder.dtype).to(self.decoder.device)

    def _stage(self, work: BlockWork, part: PartWork, step: Step, wanted: frozenset[Statistic]) -> Stage:
        schemes = {x.name: part.schemes[x.name] for x in step.layout.linears if x.name in part.schemes}
        wanted = self.measuring.drift if step.name == "router" else wanted  # passes look at its input only in whole blocks
        sites = sites_of(work.block, step, wanted) if self.streams.calibration is not None else ()
        kv = work.observer.seen if step.name == "o" and self._kv else {}
        return Stage(step.layout, part.weights, schemes, sites=sites, kv=kv, heard=lambda: self.heard(0))


def flow(block: Block, steps: Sequence[Step], stream: Activations, project: Projection, heard: Heard, kv: KvHook | None = None) -> None:
    """A stream through these steps, one step after the other, so that a step's weights are widened once."""
    for step in steps:
        for batch in stream.batches:
            block.advance(step, batch, project.weights, project, kv(batch) if kv and step.name == "qkv" else None)
            stream.spill.settle(batch)
            heard(size_of(step.layout) * batch_tokens(batch))
        project.forget()


def runtime_of(decoder: Decoder, weights: Mapping[str, Tensor]) -> Projection:
    return Projection.as_a_runtime(weights, decoder.dtype, decoder.device)


def turned(passes: Sequence[Pass], hidden: Tensor) -> Tensor:
    """Hidden states [positions, hidden] of the original in the basis of what comes out."""
    for p in passes:
        hidden = p.turn(hidden)
    return hidden
