"""Blocks made smaller before anything else is measured of them: heads and neurons go where the calibration rows miss them least.

The rows flow through the block as it was, but for what is taken away on the way; they are measured where a linear is to lose input columns.
Then the block is an ordinary smaller one, and the engine goes on from its input as with any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kompressor_worker.activations import Activations
from kompressor_worker.batch import Batch
from kompressor_worker.block import Reduction, Site
from kompressor_worker.decoder import Decoder
from kompressor_worker.decoder_block import Block, Step, expert_linears
from kompressor_worker.forward import Projection
from kompressor_worker.layout import LinearLayout, UnitLayout
from kompressor_worker.passes import Pass
from kompressor_worker.sites import BEFORE, sites_of
from kompressor_worker.statistics import Statistic

HESSIAN: tuple[Statistic, ...] = ("hessian",)
STATE = {"o": "attention", "down": "product", "shared_down": "shared_product"}
"""Where that input waits between the two."""


@dataclass
class Reshaper:
    """Of one job."""

    decoder: Decoder
    """Of the source: with the heads that blocks have before."""
    passes: Sequence[Pass]
    """All of the job, in their order."""
    stream: Activations
    """Calibration rows, at the input of the block that comes."""
    reference: Activations | None
    """The same rows through the original model, where a pass corrects; they are taken to the block's output."""
    heard: Callable[[float], None]
    """Hears of multiply-adds, and may raise."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Of the block that came last, by linear."""

    def block(self, layer: int, unit: UnitLayout, source: Mapping[str, Tensor], weights: dict[str, Tensor]) -> None:
        """Changes a block's weights (full names); `source`: as they were. `layer` counts in the source. Raises BadNumerics."""
        self.notes = {}
        original = Block(self.decoder, layer, unit.as_stored())
        wanted = {step.name for step in original.steps if any(step.name in p.reduces for p in self.passes)}
        last = max((number for number, step in enumerate(original.steps) if step.name in wanted), default=-1)
        rows = [Batch(batch.lengths, dict(batch.state), batch.excluded) for batch in self.stream.batches]
        for number, step in enumerate(original.steps):
            for p in self.passes if step.name in wanted else ():
                if step.name in p.reduces:
                    block = Block(self.decoder, layer, unit.with_shapes({name: tuple(w.shape) for name, w in weights.items()}))
                    self._reduce(p, block, block.steps[number], rows, weights, original.steps[number], source)
            if number < last:
                self._advance(self.stream, rows, Block(self.decoder, layer, unit.as_stored()), step, weights)
            if self.reference is not None:
                self._advance(self.reference, self.reference.batches, original, step, source)

    def _reduce(
        self,
        p: Pass,
        block: Block,
        step: Step,
        rows: Sequence[Batch],
        weights: dict[str, Tensor],
        stored: Step,
        source: Mapping[str, Tensor],
    ) -> None:
        sites = {site.name: site for site in sites_of(block, step, HESSIAN)}
        targets = {name: Target(len(weights[site.linears[0].weight]), site.statistics.columns) for name, site in sites.items()}
        project = Projection.as_a_runtime(source, self.decoder.dtype, self.decoder.device)
        for number, batch in enumerate(rows):
            inputs = block.inputs(step, batch, weights)
            for name, x in inputs.items():
                sites[name].statistics.add(x)
            if p.corrects and self.reference is not None:
                same = Batch(batch.lengths, self.reference.batches[number].state, batch.excluded)  # the positions that count here
                theirs = block.inputs(step, same, source)
                for name, x in inputs.items():
                    targets[name].add(self._wanted(stored, project, theirs[name]), x)
            self.heard(sum(site.statistics.columns**2 / 2 for site in sites.values()) * sum(batch.lengths))
        for number, (name, site) in enumerate(sites.items()):
            reduction = self._reduction(block, step, number, site, weights)
            if p.corrects and self.reference is not None:
                reduction.cross, reduction.wanted_square = targets[name].cross, targets[name].square
            p.reduce(reduction)
            self.notes |= reduction.notes
            if reduction.kept is not None and step.name in STATE:
                for batch in rows:
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

    def _reduction(self, block: Block, step: Step, number: int, site: Site, weights: dict[str, Tensor]) -> Reduction:
        decoder, before = self.decoder, next(s for s in block.steps if s.name == BEFORE[step.name])
        producers: tuple[LinearLayout, ...] = before.layout.linears
        if step.name == "experts_out":
            producers = expert_linears(producers, 2)[number]
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
