"""What a unit is to a calibrated job, by its linears, and where its one matrix lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from kompressor_worker.layout import LinearLayout, SourceTensor, StageLayout, UnitLayout
from kompressor_worker.shards import PlacedTensor


def kind_of(unit: UnitLayout) -> str:
    """embeddings, block, head, or other (a vision tower): by its linears."""
    kinds = {x.kind for stage in unit.stages for x in stage.linears}
    if "linear" in kinds or "router" in kinds:
        return "block"
    if "embedding" in kinds:
        return "embeddings"
    return "head" if unit.name == "head" else "other"


def matrix_of(stage: StageLayout) -> LinearLayout | None:
    return stage.linears[0] if len(stage.linears) == 1 else None


def matrix_tensor(stage: StageLayout, matrix: LinearLayout) -> SourceTensor:
    return next(t for t in stage.tensors if t.name == matrix.weight)


def in_file_order(stage: StageLayout, placed: Sequence[PlacedTensor]) -> list[SourceTensor]:
    """A stage's plain tensors as they follow each other in the output."""
    by_name = {t.name: t for t in stage.tensors}
    return [by_name[place.name] for place in placed]


def final_norm(tensors: Mapping[str, Tensor]) -> Tensor:
    return next(tensor for name, tensor in tensors.items() if name.endswith("norm.weight"))
