"""Experts that a file holds stacked in one tensor, as transformers does in memory: each of them is a byte range of it, read alone.

gate_up_proj [experts, 2 * width, hidden] has an expert's gate rows, then its up rows; down_proj is [experts, hidden, width]. So each of its
weights lies in one piece. In files where the two last axes are the other way round it does not, and they are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from kompressor_api.names import Reason
from kompressor_worker.architectures import Dimensions
from kompressor_worker.errors import CorruptSource, UserError
from kompressor_worker.family import Experts, Family
from kompressor_worker.layout import DTYPE_BYTES, SourceTensor, StoredTensor

__all__ = ["unstacked"]


def unstacked(family: Family, sizes: Dimensions, tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """The tensors with each expert's weights in place of the stacks, under the names that files have otherwise.

    Raises UserError (stacks that are quantised, or the other way round), CorruptSource."""
    experts = family.experts
    if experts is None or not experts.stacks:
        return dict(tensors)
    found: dict[str, SourceTensor] = {}
    for tensor in tensors.values():
        place, parts = stack_of(experts, tensor.name)
        pieces = [tensor] if place is None else slices(experts, sizes, tensor, place, parts)
        for piece in pieces:
            if found.setdefault(piece.name, piece) is not piece:
                raise CorruptSource(f"{tensor.name}: {piece.name} is there beside it; upload the checkpoint in one form or the other")
    return renamed(experts, found) if len(found) != len(tensors) else found


def stack_of(experts: Experts, name: str) -> tuple[str | None, Sequence[str]]:
    """What stands before the experts' names, and the linears that are stacked in this tensor; None: it is no stack."""
    for stack, parts in experts.stacks.items():
        if name.endswith(f".{stack}"):
            return name.removesuffix(stack), parts
    return None, ()


def slices(experts: Experts, sizes: Dimensions, tensor: SourceTensor, place: str, parts: Sequence[str]) -> list[SourceTensor]:
    linears = {x.name: x for group in experts.groups for x in group.linears}
    check(tensor, sizes, linears[parts[0]].rows, linears[parts[0]].columns, len(parts))
    (stored,) = tensor.stored
    count, rows, columns = tensor.shape
    shape = (rows // len(parts), columns)
    nbytes = prod(shape) * DTYPE_BYTES[stored.dtype]
    pieces = []
    for number in range(count * len(parts)):
        expert, part = divmod(number, len(parts))
        name = f"{place}{experts.expert.format(expert=expert)}.{parts[part]}.weight"
        start = stored.start + number * nbytes
        pieces.append(
            SourceTensor(name, tensor.dtype, shape, (StoredTensor(name, stored.dtype, shape, stored.file, start, start + nbytes),))
        )
    return pieces


def check(tensor: SourceTensor, sizes: Dimensions, rows: str, columns: str, parts: int) -> None:
    if tensor.encoding != "plain":
        raise UserError(
            f"{tensor.name}: experts stacked and in {tensor.encoding}; start from a checkpoint in fp32, fp16, bf16 or FP8 by expert",
            Reason.UNSUPPORTED_MODEL,
        )
    width, inputs = sizes[rows], sizes[columns]
    wanted = (sizes["experts"], None if width is None else parts * width, inputs)
    if len(tensor.shape) == 3 and tensor.shape[1] % parts == 0 and fits(tensor.shape, wanted):
        return
    said = ", ".join("?" if size is None else str(size) for size in wanted)
    if len(tensor.shape) == 3 and fits(tensor.shape, (wanted[0], wanted[2], wanted[1])):
        raise UserError(
            f"{tensor.name}: {list(tensor.shape)}, the last axes the other way round than [{said}], so no expert lies in one piece; load "
            "it with transformers and write it with save_pretrained, which gives each expert tensors of its own",
            Reason.UNSUPPORTED_MODEL,
        )
    raise CorruptSource(
        f"{tensor.name}: shape {list(tensor.shape)}, but config.json says [{said}]; upload config.json and all shards of one version"
    )


def fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return all(size in (None, there) for size, there in zip(wanted, shape, strict=True))


def renamed(experts: Experts, tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """Where what is in memory has another name than in files, the router too."""
    if not experts.in_memory:
        return dict(tensors)
    found = {}
    for tensor in tensors.values():
        block, inside, rest = tensor.name.partition(f".{experts.in_memory}.")
        name = f"{block}.{experts.router}.{rest}" if inside else tensor.name
        found[name] = tensor if name == tensor.name else replace(tensor, name=name)
    return found
