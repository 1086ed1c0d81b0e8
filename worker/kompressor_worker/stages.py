"""Pieces of a layout that known and unknown families share: linears, plain stages, units of no decoder."""

from __future__ import annotations

import re
from collections.abc import Iterable

from kompressor_api.names import Reason
from kompressor_worker.errors import UserError
from kompressor_worker.layout import Kind, LinearLayout, SourceTensor, StageLayout, UnitLayout

__all__ = ["linear_layout", "other_units", "plain_stages"]

STAGE_BYTES = 128 * 1024 * 1024
"""Plain tensors are gathered in stages of at most this many decoded bytes; a larger one has a stage of its own."""

FIRST_NUMBER = re.compile(r"(?:[^.]+\.)*?\d+(?=\.)")


def linear_layout(tensor: SourceTensor, kind: Kind = "linear", fused: str | None = None, shared: str | None = None) -> LinearLayout:
    """Raises UserError where the weight is stored in a type that holds no plain numbers."""
    if tensor.dtype not in ("F32", "F16", "BF16"):
        raise UserError(
            f"{tensor.name}: stored as {tensor.dtype}; start from a checkpoint in F32, F16 or BF16",
            Reason.UNSUPPORTED_MODEL,
        )
    rows, columns = tensor.shape
    return LinearLayout(tensor.name.removesuffix(".weight"), (rows, columns), tensor.dtype, kind, fused, shared)


def plain_stages(name: str, tensors: Iterable[SourceTensor]) -> list[StageLayout]:
    """Stages without linears; the second and later ones are numbered."""
    runs: list[list[SourceTensor]] = []
    held = STAGE_BYTES
    for tensor in tensors:
        if held + tensor.nbytes > STAGE_BYTES:
            runs.append([])
            held = 0
        runs[-1].append(tensor)
        held += tensor.nbytes
    return [StageLayout(f"{name}.{i}" if i else name, tuple(run)) for i, run in enumerate(runs)]


def other_units(tensors: Iterable[SourceTensor]) -> list[UnitLayout]:
    """What no block, embedding or head claims (a vision tower): a unit for every numbered block, and the rest."""
    by_place: dict[str, list[SourceTensor]] = {}
    for tensor in tensors:
        numbered = FIRST_NUMBER.match(tensor.name)
        place = numbered[0] if numbered else tensor.name.partition(".")[0]
        by_place.setdefault(place, []).append(tensor)
    return [UnitLayout(place, tuple(plain_stages(place, held))) for place, held in by_place.items()]
