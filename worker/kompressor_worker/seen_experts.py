"""The experts of a mixture one by one, as surveys see them: what each gets and says, and what it would say to a sample of all tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kompressor_worker.batch import Batch
from kompressor_worker.decoder_block import Block, RoutedExpert
from kompressor_worker.forward import Projection, trial
from kompressor_worker.layout import LinearLayout
from kompressor_worker.mixture import Routing
from kompressor_worker.passes.surveyor import SAMPLE, Routed, SeenExpert
from kompressor_worker.schemes import Scheme


@dataclass(frozen=True)
class Sample:
    """Of a mixture's tokens, which all its experts are compared on."""

    block: Block
    inputs: Tensor
    """[s, hidden], model dtype."""

    @classmethod
    def of(cls, block: Block, batches: Sequence[Batch]) -> Sample:
        """`batches` have met the router."""
        normed = [batch.state["normed"] for batch in batches]
        return cls(block, torch.cat([x[at] for x, at in zip(normed, spread([len(x) for x in normed]), strict=True)]))

    def expert(
        self, expert: RoutedExpert, batches: Sequence[Batch], weights: Mapping[str, Tensor], heard: Callable[[float], None]
    ) -> SeenExpert:
        """What it gets and says. `weights`: with its own, by full name; `heard` of multiply-adds, and may raise."""
        own = (*expert.gate_up, expert.down)
        size = sum(x.shape[0] * x.shape[1] for x in own)
        project = Projection.as_a_runtime(weights, self.block.decoder.dtype, self.block.decoder.device)
        parts = []
        for number, batch in enumerate(batches):
            tokens, gates = Routing.of(batch.state).of_expert(expert.number)
            if len(tokens):
                x = batch.state["normed"][tokens]
                parts.append(Routed(x, gates, _outputs(self.block, own, x, project), number, positions(batch, tokens)))
            heard(size * len(tokens))
        held = {name: w for name, w in weights.items() if name.rpartition(".")[0] in {x.name for x in own}}
        said = _outputs(self.block, own, self.inputs, project)

        def products(x: Tensor) -> Tensor:
            return _product(self.block, own, x, project)

        def says(x: Tensor, other: Mapping[str, Tensor], schemes: Mapping[str, Scheme]) -> Tensor:
            return _outputs(self.block, own, x, trial({**weights, **other}, schemes, self.block.decoder))

        return SeenExpert(self.block.layer, expert.number, self.block.experts, held, parts, self.inputs, said, products, says)


def positions(batch: Batch, tokens: Tensor) -> Tensor:
    """Of these among the positions that count, where they stand among all."""
    hidden = batch.state["hidden"]
    valid = batch.valid(hidden.shape[1], hidden.device)
    return tokens if valid is None else valid.flatten().nonzero()[:, 0][tokens]


def _outputs(block: Block, linears: Sequence[LinearLayout], x: Tensor, project: Projection) -> Tensor:
    """fp32 [n, hidden] of x [n, hidden]."""
    return project(linears[-1].name, _product(block, linears, x, project)).float()


def _product(block: Block, linears: Sequence[LinearLayout], x: Tensor, project: Projection) -> Tensor:
    *gate_up, _ = linears
    said = [project(linear.name, x.to(project.dtype)) for linear in gate_up]
    gate, up = said if len(said) == 2 else said[0].chunk(2, dim=-1)
    return block.decoder.activate(gate, up).to(block.decoder.dtype)


def spread(counts: Sequence[int]) -> list[Tensor]:
    """By batch of so many tokens, int64, ascending: which of them are among SAMPLE that are evenly spread over all."""
    total = sum(counts)
    chosen = torch.arange(min(total, SAMPLE)) * total // max(1, min(total, SAMPLE))
    found, start = [], 0
    for count in counts:
        found.append(chosen[(chosen >= start) & (chosen < start + count)] - start)
        start += count
    return found
