"""The block-sequential engine: one decoder block through measuring, passes and propagation, and the evaluation beside it.

Within a block the steps go one after the other: a step's input is measured with everything before it already compressed, the passes
change its weights, and the output that reaches the next step is computed from what will be published. So one forward a block serves any
number of passes; only passes that fold scales across steps need the whole block measured first, and its forward a second time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kompressor_worker.activations import Activations
from kompressor_worker.batch import Batch
from kompressor_worker.block import Stage
from kompressor_worker.block_work import BlockWork, Finished, Place, Streams, batch_tokens, columns_of, output_error, size_of, size_of_unit
from kompressor_worker.decoder import Decoder
from kompressor_worker.decoder_block import Block, Cache, Step
from kompressor_worker.drift import compare
from kompressor_worker.formats.compressed_tensors import decode
from kompressor_worker.forward import KvObserver, Projection, Published, kv_rounding
from kompressor_worker.layout import UnitLayout
from kompressor_worker.memory import give_back_freed_memory, peak_bytes
from kompressor_worker.pace import Pace, unheard
from kompressor_worker.passes import Pass
from kompressor_worker.reshaping import Reshaper
from kompressor_worker.schemes import Scheme
from kompressor_worker.sites import join, sites_of
from kompressor_worker.statistics import Statistic, Statistics

KvHook = Callable[[Batch], Cache | None]
DRIFT_STATISTICS: tuple[Statistic, ...] = ("histogram", "range")


def effective(
    weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor], schemes: Mapping[str, Scheme], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    return {**weights, **{f"{name}.weight": decode(name, tensors, scheme, dtype).to(device) for name, scheme in schemes.items()}}


class Engine:
    """Runs blocks. Everything that lasts from one to the next is in the streams."""

    def __init__(
        self, decoder: Decoder, passes: Sequence[Pass], schemes: Mapping[str, Scheme], streams: Streams, source: Decoder | None = None
    ) -> None:
        """`source`: of the model as it was, where `decoder` is of one of other sizes."""
        self.decoder, self.passes, self.schemes, self.streams = decoder, passes, schemes, streams
        self.source = source or decoder
        self._drift = frozenset[Statistic](DRIFT_STATISTICS if streams.deployment is not None else ())
        self._wanted = frozenset(s for p in passes for s in p.statistics) | self._drift
        self._kv = any(p.kv for p in passes)
        self._whole = any(p.whole_block for p in passes)
        self._pace = Pace(0, 0, unheard)

    def block(self, at: Place, unit: UnitLayout, weights: dict[str, Tensor], tell: Callable[[int], None] = unheard) -> Finished:
        """`weights`: all tensors of the block by full name, model dtype; they are this call's to change. `tell` hears of the unit's source
        bytes, batch by batch, and may raise. Raises BadNumerics."""
        began = time.monotonic()
        block = Block(self.decoder, at.result, unit)
        self._pace = self._paced(block, unit, tell, replayed=False)
        self._original(at, unit, weights)
        stored = dict(weights)
        for p in self.passes:
            self._pace(0)
            p.transform(unit, weights)
        reduced = self._reshape(at, unit, stored, weights)
        schemes = {x.name: self.schemes[x.name] for stage in unit.stages for x in stage.linears if x.name in self.schemes}
        work = BlockWork(block, Finished(weights, {}, schemes), dict(weights), KvObserver(self.decoder.kv_heads, self.decoder.device))
        work.reduced = reduced
        for steps in [block.steps] if self._whole else [(step,) for step in block.steps]:
            self._compress(work, steps)
        self._evaluate(work)
        for stream in self.streams.through_compressed():
            stream.exclude_nonfinite(unit.name)
        self._pace.finish()
        give_back_freed_memory()
        return self._finish(work, began)

    def replay(
        self,
        at: Place,
        unit: UnitLayout,
        weights: dict[str, Tensor],
        published: Mapping[str, Tensor],
        tell: Callable[[int], None] = unheard,
    ) -> None:
        """The same for the streams, with a block that is done already: `published` tensors by full name."""
        block = Block(self.decoder, at.result, unit)
        self._pace = self._paced(block, unit, tell, replayed=True)
        self._original(at, unit, weights, reference=True)
        schemes = {x.name: self.schemes[x.name] for stage in unit.stages for x in stage.linears if x.name in self.schemes}
        plain = {name: tensor for name, tensor in published.items() if name in weights or name.endswith("_scale")}
        current = effective(plain, published, schemes, self.decoder.dtype, self.decoder.device)
        for stream in self.streams.through_compressed():
            self._flow(block, block.steps, stream, self._runtime(current))
        if self.streams.compressed is not None:
            self._flow(
                block, block.steps, self.streams.compressed, Published(current, schemes, published), kv_rounding(unit.name, published)
            )
        for stream in self.streams.through_compressed():
            stream.exclude_nonfinite(unit.name)
        self._pace.finish()

    def pass_by(self, at: Place, unit: UnitLayout, weights: dict[str, Tensor], tell: Callable[[int], None] = unheard) -> None:
        """A block that the result does not have: the original's rows alone go through it."""
        tokens = sum(t.numel() for s in self.streams.of_the_original() for t in s.tokens)
        self._pace = Pace(unit.source_bytes, size_of_unit(unit) * tokens, tell)
        self._original(at, unit, weights, reference=True)
        self._pace.finish()

    def _original(self, at: Place, unit: UnitLayout, weights: Mapping[str, Tensor], reference: bool = False) -> None:
        """Rows through the block as it was: the evaluation's, and the reference's unless they go along while it is reshaped."""
        block = Block(self.source, at.source, unit.as_stored())
        if self.streams.original is not None:
            self._flow(block, block.steps, self.streams.original, Projection(weights))
        if self.streams.reference is not None and reference:
            self._flow(block, block.steps, self.streams.reference, self._runtime(weights))

    def _reshape(self, at: Place, unit: UnitLayout, stored: Mapping[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Any]:
        """Fewer heads and neurons, where that is asked for: what there is to say of it, by linear."""
        if self.streams.calibration is None or not any(p.reduces for p in self.passes):
            return {}
        reshaper = Reshaper(self.source, self.passes, self.streams.calibration, self.streams.reference, self._pace)
        reshaper.block(at.source, unit, stored, weights)
        return reshaper.notes

    def _paced(self, block: Block, unit: UnitLayout, tell: Callable[[int], None], replayed: bool) -> Pace:
        """Work is counted in multiply-adds: a forward through a step is one a weight and token, a product with a Hessian one a weight and
        column."""
        tokens = [sum(t.numel() for t in stream.tokens) for stream in self.streams.all()]
        expected: float = sum(size_of(step.layout) for step in block.steps) * sum(tokens)
        if not replayed:
            expected += sum(p.products for p in self.passes) * sum(size_of(step.layout) * columns_of(step.layout) for step in block.steps)
            if any(p.reduces for p in self.passes) and self.streams.calibration is not None:
                expected += size_of_unit(unit.as_stored()) * sum(t.numel() for t in self.streams.calibration.tokens)
            if self._whole and self.streams.calibration is not None:
                expected += sum(size_of(step.layout) for step in block.steps[:-1]) * sum(t.numel() for t in self.streams.calibration.tokens)
        return Pace(unit.source_bytes, expected, tell)

    def _compress(self, work: BlockWork, steps: Sequence[Step]) -> None:
        """These steps through all passes, and the activations through what comes out."""
        stages = [self._stage(work, step) for step in steps]
        join([site for stage in stages for site in stage.sites])
        self._measure(work, steps, stages, self._wanted)
        for site in (site for stage in stages for site in stage.sites if site.children):
            work.expert_tokens = [child.statistics.rows for child in site.children if not child.same_as]
        for p in self.passes:
            for stage in stages if not p.kv else ():
                self._refresh(work, steps, stages, p)
                p.apply(stage)
                self._pace(p.products * size_of(stage.layout) * columns_of(stage.layout))
        for stage in stages:
            work.finished.encoded |= stage.encoded
            work.finished.pruned |= stage.pruned
            if stage.notes:
                work.notes[stage.layout.name] = stage.notes
            for name, encoded in stage.encoded.items():
                decoded = decode(name, encoded.tensors, work.finished.schemes[name], self.decoder.dtype).to(self.decoder.device)
                work.current[f"{name}.weight"] = decoded
        work.take_up()
        for stream in self.streams.through_compressed():
            observer = work.observer if stream is self.streams.calibration and self._kv else None
            self._flow(work.block, steps, stream, self._runtime(work.current), observer.of if observer else None)
        for name in () if self._whole else [name for stage in stages for name in stage.encoded]:
            del work.finished.weights[f"{name}.weight"]  # no other step looks at it
        for p in self.passes:
            for stage in stages if p.kv else ():  # now that keys and values have been seen as the published weights make them
                p.apply(stage)

    def _stage(self, work: BlockWork, step: Step) -> Stage:
        schemes = {x.name: self.schemes[x.name] for x in step.layout.linears if x.name in self.schemes}
        sites = sites_of(work.block, step, self._wanted) if self.streams.calibration is not None else ()
        kv = work.observer.seen if step.name == "o" and self._kv else {}
        return Stage(step.layout, work.finished.weights, schemes, sites=sites, kv=kv, heard=lambda: self._pace(0))

    def _measure(self, work: BlockWork, steps: Sequence[Step], stages: Sequence[Stage], wanted: Collection[Statistic]) -> None:
        """One forward through these steps but for the last one's linears."""
        if self.streams.calibration is None or not wanted:
            return
        sites = [{site.name: site.statistics for site in stage.sites} for stage in stages]
        self._observe(work, steps, self.streams.calibration, sites)
        if self.streams.deployment is not None:
            apart = [{site.name: site.statistics for site in sites_of(work.block, step, self._drift)} for step in steps]
            self._observe(work, steps, self.streams.deployment, apart)
            for calibrated, deployed in zip(sites, apart, strict=True):
                found = {name: compare(calibrated[name], seen) for name, seen in deployed.items()}
                work.drift |= {name: site for name, site in found.items() if site is not None}

    def _observe(self, work: BlockWork, steps: Sequence[Step], stream: Activations, sites: Sequence[Mapping[str, Statistics]]) -> None:
        project = self._runtime(work.current)
        for batch in stream.batches:
            shadow = Batch(batch.lengths, dict(batch.state), batch.excluded)
            for number, (step, seen) in enumerate(zip(steps, sites, strict=True)):
                for name, x in work.block.inputs(step, shadow, work.current).items():
                    seen[name].add(x)
                self._pace(0)
                if number + 1 < len(steps):
                    work.block.advance(step, shadow, work.current, project)
                    self._pace(size_of(step.layout) * batch_tokens(batch))

    def _refresh(self, work: BlockWork, steps: Sequence[Step], stages: Sequence[Stage], p: Pass) -> None:
        """Measures again what an earlier pass has made wrong and this one wants."""
        stale = frozenset(s for stage in stages for site in stage.sites for s in site.statistics.stale) & p.statistics
        if not stale or self.streams.calibration is None:
            return
        work.take_up()
        fresh = [{site.name: site.statistics for site in sites_of(work.block, step, stale)} for step in steps]
        self._observe(work, steps, self.streams.calibration, fresh)
        for stage, measured in zip(stages, fresh, strict=True):
            for site in stage.sites:
                site.statistics.renew(measured[site.name])

    def _evaluate(self, work: BlockWork) -> None:
        if self.streams.compressed is None:
            return
        tensors = {**work.finished.weights, **{n: t for e in work.finished.encoded.values() for n, t in e.tensors.items()}}
        rounding = kv_rounding(work.block.prefix[:-1], tensors)
        self._flow(work.block, work.block.steps, self.streams.compressed, Published(work.current, work.finished.schemes, tensors), rounding)

    def _runtime(self, weights: Mapping[str, Tensor]) -> Projection:
        return Projection.as_a_runtime(weights, self.decoder.dtype, self.decoder.device)

    def _flow(self, block: Block, steps: Sequence[Step], stream: Activations, project: Projection, kv: KvHook | None = None) -> None:
        """A stream through these steps, one step after the other, so that a step's weights are widened once."""
        for step in steps:
            for batch in stream.batches:
                block.advance(step, batch, project.weights, project, kv(batch) if kv and step.name == "qkv" else None)
                stream.spill.settle(batch)
                self._pace(size_of(step.layout) * batch_tokens(batch))
            project.forget()

    def _turned(self, hidden: Tensor) -> Tensor:
        """Hidden states [positions, hidden] of the original in the basis of what comes out."""
        for p in self.passes:
            hidden = p.turn(hidden)
        return hidden

    def _finish(self, work: BlockWork, began: float) -> Finished:
        finished = work.finished
        finished.record = {"cost": {"seconds": round(time.monotonic() - began, 3), "peakBytes": peak_bytes(self.decoder.device.type)}}
        if any(work.expert_tokens):
            finished.record["expertTokens"] = work.expert_tokens
        if work.notes:
            finished.record["notes"] = work.notes
        if work.reduced:
            finished.record["reduced"] = work.reduced
        if work.drift:
            finished.record["drift"] = work.drift
        if self.streams.original is not None and self.streams.compressed is not None:
            finished.record["outputError"] = output_error(self.streams.original, self.streams.compressed, self._turned)
        if self.streams.calibration is not None:
            finished.record["excludedRows"] = len(self.streams.calibration.excluded)
        return finished
