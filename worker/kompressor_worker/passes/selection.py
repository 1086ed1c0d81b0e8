"""Which linears a pass takes: targets and ignore patterns against names known from headers, torch-free.

Patterns are compressed-tensors': a module's exact name, `re:<regex>` matched from the start of the name, or the class
name `Linear`.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from kompressor_worker.errors import UserError
from kompressor_worker.formats.targets import matches
from kompressor_worker.layout import Kind, LinearLayout, ModelLayout
from kompressor_worker.schemes import Scheme

LINEAR = "Linear"
LINEARS: tuple[Kind, ...] = ("linear",)
MATRICES: tuple[Kind, ...] = ("linear", "embedding", "head")


def select(layout: ModelLayout, taken: Mapping[str, Scheme], targets: Sequence[str], ignore: Sequence[str]) -> list[LinearLayout]:
    """What a pass that quantises takes: as `choose`, and for a GGUF file embeddings and head like any other linear. Raises UserError, also
    where a fused group would be split."""
    gguf = layout.file_format == "gguf"
    chosen = choose(layout, taken, targets, ignore, "quantise", MATRICES if gguf else LINEARS)
    refuse_split(held_as_one(layout), {linear.name for linear in chosen}, taken)
    return chosen


def held_as_one(layout: ModelLayout) -> list[LinearLayout]:
    """The model's linears, as the loaders of its file fuse them."""
    linears = list(layout.linears())
    return [stacked(x) for x in linears] if layout.file_format == "gguf" else linears


def stacked(linear: LinearLayout) -> LinearLayout:
    """As a GGUF file fuses linears: the same matrix of all experts of a layer, and nothing else."""
    place, inside, rest = linear.name.rpartition(".experts.")
    matrix = rest.rpartition(".")[2]
    return replace(linear, fused=f"{place}.experts.{matrix}" if inside else None)


def choose(
    layout: ModelLayout,
    taken: Collection[str],
    targets: Sequence[str],
    ignore: Sequence[str],
    what: str,
    kinds: Collection[Kind] = LINEARS,
) -> list[LinearLayout]:
    """The linears that match `targets`, less those that match `ignore` or are in `taken`, in the model's order.

    Those of other `kinds` (embeddings, heads, MoE routers) are left out; a head is taken if `targets` has its exact name. `what` is done to
    them, for the words.
    Raises UserError: a pattern that matches nothing, an embedding or router asked for by name, nothing left.
    """
    linears = list(layout.linears())
    _refuse_unmatched("targets", targets, layout, linears)
    _refuse_unmatched("ignore", ignore, layout, linears)
    chosen = [
        linear
        for linear in linears
        if linear.name not in taken and _targeted(linear, targets, kinds) and not any(_match(pattern, linear, kinds) for pattern in ignore)
    ]
    if not chosen:
        raise UserError(
            f"targets {list(targets)} and ignore {list(ignore)} leave no linear layer to {what} "
            f"({len(linears)} in the model, {len(taken)} taken by earlier passes); "
            "widen targets, shorten ignore, or drop this pass"
        )
    return chosen


def _match(pattern: str, linear: LinearLayout, kinds: Collection[Kind]) -> bool:
    return matches(pattern, linear.name) or (pattern == LINEAR and linear.kind in kinds)


def _targeted(linear: LinearLayout, targets: Sequence[str], kinds: Collection[Kind]) -> bool:
    if linear.kind in kinds:
        return any(_match(pattern, linear, kinds) for pattern in targets)
    if linear.name not in targets:
        return False
    if linear.kind == "head":
        return True
    what = "an embedding" if linear.kind == "embedding" else "a router of a mixture of experts"
    raise UserError(f"targets: {linear.name} is {what}, which loaders want exact; take it out of targets")


def _refuse_unmatched(field: str, patterns: Sequence[str], layout: ModelLayout, linears: Sequence[LinearLayout]) -> None:
    names = {linear.name for linear in linears}
    names.update(tensor.name.rpartition(".")[0] for stage in layout.stages() for tensor in stage.tensors)
    stacks = [tensor.name for stage in layout.stages() for tensor in stage.tensors if len(tensor.shape) == 3]
    names.update(stacks)
    if layout.tied_embeddings:
        names.add("lm_head")  # commonly listed, and absent only because it is tied
    for pattern in patterns:
        pool = {linear.name for linear in linears} if field == "targets" else names
        if pattern == LINEAR or any(matches(pattern, name) for name in pool):
            continue
        if stack := next((name for name in stacks if matches(pattern, name) or matches(pattern, name.rpartition(".")[0])), None):
            raise UserError(
                f"{field}: {pattern!r} means {stack}, a stack of all experts of a layer, which no loader reads quantised by us and which "
                'stays exact; target attention, such as "re:.*self_attn.*", or "Linear", and leave the experts out'
            )
        near = difflib.get_close_matches(pattern, sorted(pool), n=1)
        hint = (
            f"did you mean {near[0]}?" if near else 'use a module name such as model.layers.0.mlp.down_proj, "re:.*down_proj$" or "Linear"'
        )
        if pattern == "lm_head":
            hint = "its weight is tied to the embeddings, which are left exact"
        raise UserError(f"{field}: {pattern!r} matches no linear layer of this model; {hint}")


def refuse_split(linears: Sequence[LinearLayout], chosen: set[str], taken: Mapping[str, Scheme]) -> None:
    """What a loader fuses into one matrix must be quantised as one."""
    inside: dict[str, str] = {linear.fused: linear.name for linear in linears if linear.fused and linear.name in chosen}
    for linear in linears:
        if linear.fused is None or linear.fused not in inside or linear.name in chosen:
            continue
        other = inside[linear.fused]
        state = f"{taken[linear.name].name} by an earlier pass" if linear.name in taken else "left exact"
        raise UserError(
            f"{linear.name} would be {state}, but {other}, which loaders fuse with it, is quantised here; "
            "target or ignore both in the same pass"
        )
