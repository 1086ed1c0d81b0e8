"""Blocks made smaller before anything else is measured of them: heads and neurons go where the calibration rows miss them least.

The rows flow through the block as it was, but for what is taken away on the way; they are measured where a linear is to lose input columns.
Then the block is an ordinary smaller one, and the engine goes on from its input as with any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kompressor_worker.activations import Activations
from kompressor_worker.batch import Batch
from kompressor_worker.block import Reduction, Site
from kompressor_worker.decoder import Decoder
from kompressor_worker.decoder_block import MIXTURE, Block, Step
from kompressor_worker.forward import Projection
from kompressor_worker.layout import UnitLayout
from kompressor_worker.mixture import Routing
from kompressor_worker.parts import Part
from kompressor_worker.passes import Pass
from kompressor_worker.sites import BEFORE, sites_of
from kompressor_worker.statistics import Statistic

HESSIAN: tuple[Statistic, ...] = ("hessian",)
STATE = {"o": "attention", "down": "product"}
"""Where a step's input waits."""
SAID = {"shared_down": "shared_product", "experts_out": "product"}
"""The same where what the step says reaches no other step of the block."""


class Reshaper:
    """Of one block, part by part."""

    def __init__(
        self,
        decoder: Decoder,
        result: Decoder,
        passes: Sequence[Pass],
        stream: Activations,
        reference: Activations | None,
        heard: Callable[[float], None],
        least_tokens: int,
        layer: int,
        unit: UnitLayout,
    ) -> None:
        """`decoder`: of the source, with the heads that blocks have before; `result`: of what comes out. `passes`: all of the job, in their
        order. `stream`: calibration rows, at the block's input; `reference`: the same rows through the original model, where a pass
        corrects; they are taken to the block's output. `heard` hears of multiply-adds, and may raise. `least_tokens`: experts that get
        fewer are measured on all. `layer` counts in the source."""
        self.decoder, self.passes, self.stream, self.reference, self.heard = decoder, passes, stream, reference, heard
        self.result, self.layer, self.unit, self.least_tokens = result, layer, unit, least_tokens
        self.notes: dict[str, Any] = {}
        """By linear."""
        self._original = Block(decoder, layer, unit.as_stored())
        self._block = Block(decoder, layer, unit.with_stored_shapes(), routed_as=result)
        self._wanted_in = {step.name for step in self._block.steps if any(step.name in p.reduces for p in passes)}
        self._last = max((number for number, step in enumerate(self._block.steps) if step.name in self._wanted_in), default=-1)
        self._rows = [Batch(batch.lengths, dict(batch.state), batch.excluded) for batch in stream.batches]
        self._unrouted: frozenset[int] = frozenset()

    def part(self, part: Part, source: Mapping[str, Tensor], weights: dict[str, Tensor]) -> None:
        """Changes a part's weights (full names, with the block's norms); `source`: as they were. Raises BadNumerics."""
        for number, step in enumerate(self._block.steps):
            if step.stages[-1] not in part.stages:
                continue
            for p in self.passes if step.name in self._wanted_in else ():
                if step.name in p.reduces:
                    shapes = {name: tuple(w.shape) for name, w in weights.items()}
                    block = Block(self.decoder, self.layer, self.unit.with_shapes(shapes), routed_as=self.result)
                    self._reduce(p, block, block.steps[number], weights, source)
            if step.name in SAID:
                for batch in self._rows:
                    batch.state.pop(SAID[step.name], None)
            elif number < self._last:
                self._advance(self.stream, self._rows, self._block, step, weights)
                if step.name == "router":
                    self._count()
            if step.name not in MIXTURE:
                self._refer(step, source)
        for step in self._original.steps:
            if step.name in MIXTURE and step.stages[-1] in part.stages:
                self._refer(step, source)

    def _refer(self, step: Step, source: Mapping[str, Tensor]) -> None:
        if self.reference is not None:
            self._advance(self.reference, self.reference.batches, self._original, step, source)

    def _count(self) -> None:
        counts = torch.stack([Routing.of(batch.state).counts(self._block.experts) for batch in self._rows]).sum(0).tolist()
        self._unrouted = frozenset(number for number, count in enumerate(counts) if count < self.least_tokens)

    def _reduce(self, p: Pass, block: Block, step: Step, weights: dict[str, Tensor], source: Mapping[str, Tensor]) -> None:
        sites = {site.name: site for site in sites_of(block, step, HESSIAN)}
        targets = {name: Target(len(weights[site.linears[0].weight]), site.statistics.columns) for name, site in sites.items()}
        project = Projection.as_a_runtime(source, self.decoder.dtype, self.decoder.device)
        current = Projection.as_a_runtime(weights, self.decoder.dtype, self.decoder.device)
        for number, batch in enumerate(self._rows):
            theirs: dict[str, Tensor] = {}
            if p.corrects and self.reference is not None:
                same = Batch(batch.lengths, self.reference.batches[number].state, batch.excluded)  # the positions that count here
                theirs = dict(block.inputs(step, same, source))
            for name, x in block.inputs(step, batch, weights, current, self._unrouted):
                sites[name].statistics.add(x)
                if name in theirs:
                    targets[name].add(self._wanted(step, project, theirs[name]), x)
            self.heard(sum(site.statistics.columns**2 / 2 for site in sites.values()) * sum(batch.lengths))
        for name, site in sites.items():
            reduction = self._reduction(block, step, site, weights)
            if p.corrects and self.reference is not None:
                reduction.cross, reduction.wanted_square = targets[name].cross, targets[name].square
            p.reduce(reduction)
            self.notes |= reduction.notes
            if reduction.kept is not None and step.name in STATE:
                for batch in self._rows:
                    state = STATE[step.name]
                    batch.state[state] = self.stream.spill.keep(batch.state[state][..., reduction.kept].contiguous())

    def _wanted(self, step: Step, project: Projection, x: Tensor) -> Tensor:
        """What the original's linear says to x [n, columns], in the basis of the result."""
        (linear,) = step.layout.linears
        said = project(linear.name, x).float()
        if (bias := project.weights.get(f"{linear.name}.bias")) is not None:
            said = said - bias.float()
        for p in self.passes:
            said = p.turn_output(linear.name, said)
        return said

    def _reduction(self, block: Block, step: Step, site: Site, weights: dict[str, Tensor]) -> Reduction:
        decoder = self.decoder
        if step.name == "experts_out":
            producers = next(expert.gate_up for expert in step.experts if expert.name == site.name)
        else:
            producers = next(s for s in block.steps if s.name == BEFORE[step.name]).layout.linears
        return Reduction(step.name, site, producers, weights, decoder.head_dim, decoder.kv_heads, lambda: self.heard(0))

    def _advance(self, stream: Activations, rows: Sequence[Batch], block: Block, step: Step, weights: Mapping[str, Tensor]) -> None:
        project = Projection.as_a_runtime(weights, self.decoder.dtype, self.decoder.device)
        for batch in rows:
            block.advance(step, batch, weights, project)
            stream.spill.settle(batch)
            self.heard(sum(x.shape[0] * x.shape[1] for x in step.layout.linears) * len(batch.lengths) * max(batch.lengths))


class Target:
    """Sums over positions of y^T x and y^2, of what a linear is wanted to say."""

    def __init__(self, rows: int, columns: int) -> None:
        self._shape, self.square = (rows, columns), 0.0
        self.cross: Tensor | None = None

    def add(self, y: Tensor, x: Tensor) -> None:
        """y fp32 [n, rows] to x [n, columns]."""
        if self.cross is None:
            self.cross = torch.zeros(self._shape, device=y.device)
        self.cross += y.T @ x.float()
        self.square += float(y.square().sum(dtype=torch.float64))
