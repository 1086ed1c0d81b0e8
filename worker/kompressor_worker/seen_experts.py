"""The experts of a mixture one by one, as surveys see them: what each gets and says, and what it would say to a sample of all tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from kompressor_worker.batch import Batch
from kompressor_worker.decoder_block import Block, Step, expert_linears
from kompressor_worker.forward import Projection
from kompressor_worker.layout import LinearLayout
from kompressor_worker.mixture import Routing
from kompressor_worker.passes.surveyor import SAMPLE, Routed, SeenExpert


def seen_experts(
    block: Block,
    batches: Sequence[Batch],
    weights: Mapping[str, Tensor],
    project: Projection,
    heard: Callable[[float], None],
) -> Iterator[SeenExpert]:
    """Every expert of the block's mixture; `batches` stand before it and are routed here. `heard` of multiply-adds; it may raise."""
    ins, outs = (next(step for step in block.steps if step.name == name) for name in ("experts_in", "experts_out"))
    norm = weights[f"{block.prefix}{block.norms[ins.name]}.weight"]
    routings = [_routed(block, ins, batch, weights) for batch in batches]
    sample = torch.cat([_inputs(block, norm, batch, at) for batch, at in zip(batches, spread(batches), strict=True)])
    downs = expert_linears(outs.layout.linears, 1)
    for number, linears in enumerate(expert_linears(ins.layout.linears, len(ins.layout.linears) // len(downs))):
        own, size = (*linears, *downs[number]), sum(x.shape[0] * x.shape[1] for x in (*linears, *downs[number]))
        parts = []
        for batch, routing in zip(batches, routings, strict=True):
            tokens, slots = (routing.experts == number).nonzero(as_tuple=True)
            if len(tokens):
                x = _inputs(block, norm, batch, tokens)
                parts.append(Routed(x, routing.gates[tokens, slots], _outputs(block, own, x, project)))
            heard(size * len(tokens))
        held = {name: w for name, w in weights.items() if name.rpartition(".")[0] in {x.name for x in own}}
        yield SeenExpert(block.layer, number, len(downs), held, parts, sample, _outputs(block, own, sample, project))
        project.forget()


def _routed(block: Block, step: Step, batch: Batch, weights: Mapping[str, Tensor]) -> Routing:
    block.inputs(step, batch, weights)
    return Routing.of(batch.state)


def _inputs(block: Block, norm: Tensor, batch: Batch, tokens: Tensor) -> Tensor:
    """What the mixture gets, of these of the positions that count; only their norms are computed."""
    hidden = batch.state["hidden"]
    valid = batch.valid(hidden.shape[1], hidden.device)
    at = tokens if valid is None else valid.flatten().nonzero()[:, 0][tokens]
    return block.decoder.norm(hidden.flatten(0, 1)[at], norm).to(block.decoder.dtype)


def _outputs(block: Block, linears: Sequence[LinearLayout], x: Tensor, project: Projection) -> Tensor:
    """fp32 [n, hidden] of x [n, hidden]."""
    *gate_up, down = linears
    said = [project(linear.name, x.to(project.dtype)) for linear in gate_up]
    gate, up = said if len(said) == 2 else said[0].chunk(2, dim=-1)
    product = block.decoder.activate(gate, up).to(block.decoder.dtype)
    return project(down.name, product).float()


def spread(batches: Sequence[Batch]) -> list[Tensor]:
    """By batch, int64, ascending: which of the positions that count are among SAMPLE that are evenly spread over all rows."""
    counts = []
    for batch in batches:
        hidden = batch.state["hidden"]
        valid = batch.valid(hidden.shape[1], hidden.device)
        counts.append(hidden.shape[0] * hidden.shape[1] if valid is None else int(valid.sum()))
    total = sum(counts)
    chosen = torch.arange(min(total, SAMPLE)) * total // max(1, min(total, SAMPLE))
    found, start = [], 0
    for batch, count in zip(batches, counts, strict=True):
        inside = chosen[(chosen >= start) & (chosen < start + count)] - start
        found.append(inside.to(batch.state["hidden"].device))
        start += count
    return found
