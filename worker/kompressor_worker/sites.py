"""The inputs of a step's linears: which linears share one, and where the inverse of a scale on it can be folded."""

from __future__ import annotations

from collections.abc import Collection

from kompressor_worker.block import Fold, Site
from kompressor_worker.decoder_block import Block, Step, expert_linears
from kompressor_worker.layout import LinearLayout
from kompressor_worker.statistics import Statistic, Statistics

BEFORE = {"o": "qkv", "down": "gate_up", "experts_out": "experts_in", "shared_down": "shared_gate_up"}
"""The step whose rows are a step's input columns."""


def sites_of(block: Block, step: Step, wanted: Collection[Statistic]) -> tuple[Site, ...]:
    """The step's inputs, nothing measured yet. In a mixture the norm's output is one (its readers are the router and all experts), and the
    tokens routed to each expert are its children."""
    linears = step.layout.linears
    columns = linears[0].shape[1]
    norm = block.norms.get(step.name)
    fold = Fold(f"{block.prefix}{norm}.weight", block.decoder.family.norm_offset) if norm else None

    def site(name: str, members: tuple[LinearLayout, ...], fold: Fold | None) -> Site:
        return Site(name, members, tuple(x.weight for x in members), Statistics(columns, wanted), fold)

    if step.name == "shared_gate_up":
        alike = site(step.layout.name, linears, None)
        alike.same_as = block.router
        return (alike,)
    if step.name == "experts_in":
        children = tuple(site(block.expert(e), pair, None) for e, pair in enumerate(expert_linears(linears, 2)))
        parent = site(block.router, (), fold)
        beside = next((s.layout for s in block.steps if s.name == "shared_gate_up"), None)
        parent.beside = beside.linears if beside else ()
        shared = [t.name for t in beside.tensors if len(t.shape) > 1] if beside else []
        parent.readers = (f"{block.router}.weight", *shared, *(reader for child in children for reader in child.readers))
        parent.children = children
        return (parent, *children)
    if step.name == "experts_out":
        downs = enumerate(expert_linears(linears, 1))
        return tuple(site(block.expert(e), (down,), behind_up(block, step, e)) for e, (down,) in downs)
    if step.name == "o":
        fold = behind_values(block, columns)
    if step.name in ("down", "shared_down"):
        fold = behind_up(block, step, 0)
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


def behind_up(block: Block, step: Step, expert: int) -> Fold:
    """The down projection's input columns are the rows of up, in fused weights the last ones."""
    before = next(s for s in block.steps if s.name == BEFORE[step.name])
    pairs = expert_linears(before.layout.linears, 2) if step.name == "experts_out" else [before.layout.linears]
    up, columns = pairs[expert][-1], step.layout.linears[0].shape[1]
    return Fold(up.weight, rows=tuple(range(up.shape[0] - columns, up.shape[0])))
