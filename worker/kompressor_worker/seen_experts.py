"""The experts of a mixture one by one, as surveys see them: what each gets and says, and what it would say to a sample of all tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kompressor_worker.batch import Batch
from kompressor_worker.decoder_block import Block, RoutedExpert
from kompressor_worker.forward import Projection
from kompressor_worker.layout import LinearLayout
from kompressor_worker.mixture import Routing
from kompressor_worker.passes.surveyor import SAMPLE, Routed, SeenExpert


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
        for batch in batches:
            tokens, gates = Routing.of(batch.state).of_expert(expert.number)
            if len(tokens):
                x = batch.state["normed"][tokens]
                parts.append(Routed(x, gates, _outputs(self.block, own, x, project)))
            heard(size * len(tokens))
        held = {name: w for name, w in weights.items() if name.rpartition(".")[0] in {x.name for x in own}}
        said = _outputs(self.block, own, self.inputs, project)
        return SeenExpert(self.block.layer, expert.number, self.block.experts, held, parts, self.inputs, said)


def _outputs(block: Block, linears: Sequence[LinearLayout], x: Tensor, project: Projection) -> Tensor:
    """fp32 [n, hidden] of x [n, hidden]."""
    *gate_up, down = linears
    said = [project(linear.name, x.to(project.dtype)) for linear in gate_up]
    gate, up = said if len(said) == 2 else said[0].chunk(2, dim=-1)
    product = block.decoder.activate(gate, up).to(block.decoder.dtype)
    return project(down.name, product).float()


def spread(counts: Sequence[int]) -> list[Tensor]:
    """By batch of so many tokens, int64, ascending: which of them are among SAMPLE that are evenly spread over all."""
    total = sum(counts)
    chosen = torch.arange(min(total, SAMPLE)) * total // max(1, min(total, SAMPLE))
    found, start = [], 0
    for count in counts:
        found.append(chosen[(chosen >= start) & (chosen < start + count)] - start)
        start += count
    return found
