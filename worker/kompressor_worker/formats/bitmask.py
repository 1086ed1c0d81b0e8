"""Pruned linears by the values that are left of them: compressed-tensors' `sparse-bitmask`.

In place of `<linear>.weight` [out, in] stand `compressed` (the values, row by row), `bitmask` (uint8 [out, ceil(in / 8)], 1 where one of
them stands, first column in the lowest bit), `row_offsets` (int64 [out]: where each row begins among them) and `shape`. Releases of the
library up to 0.12 read it as it is; later ones, vLLM and transformers do not.

How many values are stored follows from the sparsity that was asked for, before a weight is read. A weight may have more zeros than that:
those that are first in memory are left out, the others are stored like any value. So the size of the file never depends on what is in it.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from kompressor_worker.formats.compressed_tensors import PlannedTensor
from kompressor_worker.formats.targets import patterns_for
from kompressor_worker.layout import DTYPE_BYTES, LinearLayout, ModelLayout, StageLayout
from kompressor_worker.schemes import Scheme

if TYPE_CHECKING:
    import torch

FORMAT = "sparse-bitmask"
UNIT = 8
"""Values are stored in a multiple of this, so that what comes after them in the file stays aligned."""
TRIPWIRE = "run_kompressor_expand_first"
"""A key that no reader of config groups knows. transformers would otherwise take a linear without `weight` for a new one, and give it
random weights; as it is it refuses, and its message has the remedy in it."""


def marked(layout: ModelLayout, schemes: Mapping[str, Scheme]) -> ModelLayout:
    """The layout, with `LinearLayout.bitmask` set where a linear is pruned, not quantised, and smaller with a bitmask than without."""

    def linear(x: LinearLayout) -> LinearLayout:
        return x if x.name in schemes else replace(x, bitmask=values_of(x))

    def stage(old: StageLayout) -> StageLayout:
        return replace(old, linears=tuple(map(linear, old.linears)))

    units = tuple(replace(unit, stages=tuple(map(stage, unit.stages))) for unit in layout.units)
    return replace(layout, units=units)


def values_of(linear: LinearLayout) -> int | None:
    """How many values are to be stored of it; None where a bitmask would save nothing."""
    if linear.pruned is None:
        return None
    size, width = prod(linear.shape), DTYPE_BYTES[linear.dtype]
    values = min(-(-(size - linear.pruned.zeros(linear.shape)) // UNIT) * UNIT, size)
    needed = sum(t.nbytes for t in planned_tensors(linear.name, linear.shape, linear.dtype, values))
    return values if needed < size * width else None


def planned_tensors(name: str, shape: tuple[int, int], dtype: str, values: int) -> list[PlannedTensor]:
    """The tensors that the linear `name` with a weight of this shape [out, in] and safetensors dtype is stored as."""
    rows, columns = shape
    return [
        PlannedTensor(f"{name}.row_offsets", "I64", (rows,)),
        PlannedTensor(f"{name}.shape", "I64", (2,)),
        PlannedTensor(f"{name}.compressed", dtype, (values,)),
        PlannedTensor(f"{name}.bitmask", "U8", (rows, -(-columns // 8))),
    ]


def saved_bytes(linears: Sequence[LinearLayout]) -> int:
    """By which these linears are smaller than as they are."""
    saved = 0
    for x in linears:
        if x.bitmask is not None:
            saved += prod(x.shape) * DTYPE_BYTES[x.dtype]
            saved -= sum(t.nbytes for t in planned_tensors(x.name, x.shape, x.dtype, x.bitmask))
    return saved


def encode(linear: LinearLayout, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `planned_tensors` announces, of a weight [out, in] on the CPU."""
    import torch

    from kompressor_worker import kernels

    assert linear.bitmask is not None
    values, bitmask, row_offsets = kernels.pack_bitmask(weight, linear.bitmask)
    shape = torch.tensor(linear.shape, dtype=torch.int64)
    parts = {"compressed": values, "bitmask": bitmask, "row_offsets": row_offsets, "shape": shape}
    return {f"{linear.name}.{suffix}": tensor for suffix, tensor in parts.items()}


def decode(name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weight [out, in], from tensors by full name. Raises ValueError where bitmask and values contradict each other."""
    from kompressor_worker import kernels

    columns = int(tensors[f"{name}.shape"][1])
    return kernels.unpack_bitmask(tensors[f"{name}.compressed"], tensors[f"{name}.bitmask"], columns)


def pack_linears(linears: Sequence[LinearLayout], tensors: MutableMapping[str, torch.Tensor]) -> None:
    """In place of the weights of those that are stored so, what they are stored as."""
    for linear in linears:
        if linear.bitmask is not None:
            tensors.update(encode(linear, tensors.pop(linear.weight)))


def unpack_linears(linears: Sequence[LinearLayout], tensors: MutableMapping[str, torch.Tensor]) -> None:
    """The reverse."""
    for linear in linears:
        if linear.bitmask is not None:
            tensors[linear.weight] = decode(linear.name, tensors)
            for suffix in ("compressed", "bitmask", "row_offsets", "shape"):
                del tensors[f"{linear.name}.{suffix}"]


def described(config: Mapping[str, Any], linears: Sequence[LinearLayout]) -> dict[str, Any]:
    """`quantization_config` with what there is to say of those of a model's linears that are stored so: `sparsity_config` as the library
    wrote it (vLLM refuses a model with targets in it), and a group that current readers refuse."""
    stored = [(x, x.pruned) for x in linears if x.bitmask is not None and x.pruned is not None]
    if not stored:
        return dict(config)
    targets = patterns_for([x.name for x, _ in stored], [x.name for x in linears])
    zeros, size = sum(sparsity.zeros(x.shape) for x, sparsity in stored), sum(prod(x.shape) for x in linears)
    sparsity_config = {
        "format": FORMAT,
        "targets": targets,
        "ignore": [],
        "global_sparsity": round(zeros / size, 6),
        "sparsity_structure": "2:4" if {str(sparsity) for _, sparsity in stored} == {"2:4"} else "unstructured",
    }
    group = {
        "targets": targets,
        "weights": None,
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
        TRIPWIRE: True,
    }
    return {**config, "config_groups": {**config["config_groups"], "bitmask": group}, "sparsity_config": sparsity_config}
