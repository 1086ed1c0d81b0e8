"""The inputs of a step's linears: which linears share one, and where the inverse of a scale on it can be folded."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kompressor_worker.block import Fold, Site
from kompressor_worker.decoder_block import Block, Step
from kompressor_worker.layout import LinearLayout, SourceTensor
from kompressor_worker.statistics import Statistic, Statistics

BEFORE = {"o": "qkv", "down": "gate_up", "shared_down": "shared_gate_up"}
"""The step whose rows are a step's input columns."""


def sites_of(block: Block, step: Step, wanted: Collection[Statistic]) -> tuple[Site, ...]:
    """The step's inputs, nothing measured yet. In a mixture the norm's output is one (its readers are the router and all experts), and the
    tokens routed to each expert are its children, where they are measured in the same step."""
    linears = step.layout.linears
    columns = linears[0].shape[1]
    alone = len(step.stages) == len(step.experts)  # without the router, which had a step of its own
    norm = block.norms.get(step.name)
    fold = Fold(f"{block.prefix}{norm}.weight", block.decoder.family.norm_offset) if norm else None

    def site(name: str, members: tuple[LinearLayout, ...], fold: Fold | None) -> Site:
        return Site(name, members, tuple(x.weight for x in members), Statistics(columns, wanted), fold)

    if step.name == "shared_gate_up":
        alike = site(step.layout.name, linears, None)
        alike.same_as = block.router
        return (alike,)
    if step.name == "router":
        parent = site(block.router, (), fold)
        readers = [t.name for s in block.steps if s.name in ("shared_gate_up", "experts_in") for t in matrices_behind(s)]
        parent.readers = (f"{block.router}.weight", *readers)
        return (parent,)
    if step.name == "experts_in":
        children = tuple(site(expert.name, expert.gate_up, None) for expert in step.experts)
        if alone:
            return children
        parent = site(block.router, (), fold)
        beside = [s for s in block.steps if s.name == "shared_gate_up"]
        parent.beside = tuple(x for s in beside for x in s.layout.linears)
        shared = [t.name for s in beside for t in matrices_behind(s)]
        parent.readers = (f"{block.router}.weight", *shared, *(reader for child in children for reader in child.readers))
        parent.children = children
        return (parent, *children)
    if step.name == "experts_out":
        return tuple(site(expert.name, (expert.down,), behind_up(expert.gate_up, expert.down)) for expert in step.experts)
    if step.name == "o":
        fold = behind_values(block, columns)
    if step.name in ("down", "shared_down"):
        before = next(s for s in block.steps if s.name == BEFORE[step.name])
        fold = behind_up(before.layout.linears, linears[0])
    return (site(step.layout.name, linears, fold),)


def join(sites: Collection[Site]) -> None:
    """Where the sites of several steps are at hand: those that have the same input hear of its scale."""
    for site in sites:
        for parent in sites:
            if site.same_as == parent.name:
                parent.children = (*parent.children, site)


def behind_values(block: Block, columns: int) -> Fold:
    """The output projection's input columns are value channels, each shared by the query heads of its group. In fused weights they come
    last."""
    if block.latent is not None:
        step = next(s for s in block.steps if s.name == "keys_values")
        return Fold(step.layout.linears[-1].weight, rows=block.latent.value_rows())
    d, value = block.decoder, block.steps[0].layout.linears[-1]
    first = value.shape[0] - d.kv_heads * d.head_dim
    shared = d.heads // d.kv_heads
    return Fold(value.weight, rows=tuple(first + c // d.head_dim // shared * d.head_dim + c % d.head_dim for c in range(columns)))


def behind_up(before: Sequence[LinearLayout], down: LinearLayout) -> Fold:
    """The down projection's input columns are the rows of up, in fused weights the last ones."""
    up, columns = before[-1], down.shape[1]
    return Fold(up.weight, rows=tuple(range(up.shape[0] - columns, up.shape[0])))


def matrices_behind(step: Step) -> list[SourceTensor]:
    """Weights of a mixture's step that read what the mixture gets."""
    names = {x.weight for x in step.layout.linears}
    return [t for t in step.layout.tensors if t.name in names or (step.name == "shared_gate_up" and len(t.shape) > 1)]
