"""What a quantised linear is stored as, whichever file it goes into: asked here, answered by the format of its scheme.

In GGUF files a linear is one tensor of blocks, which hold codes and scales together; in safetensors files it is several.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kompressor_worker.formats import compressed_tensors
from kompressor_worker.formats.compressed_tensors import PlannedTensor
from kompressor_worker.formats.gguf_types import row_bytes, type_of
from kompressor_worker.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from kompressor_worker import grid

GGUF = "gguf"
__all__ = ["PlannedTensor", "codes_and_grid", "decode", "named_tensors", "planned_tensors"]


def planned_tensors(name: str, shape: tuple[int, int], dtype: str, scheme: Scheme) -> list[PlannedTensor]:
    """The tensors that a linear `name` with a weight of this shape [out, in] and safetensors dtype (BF16, F16, F32) is stored as."""
    if scheme.format == GGUF:
        return [PlannedTensor(f"{name}.weight", "U8", (shape[0], row_bytes(type_of(scheme).name, shape[1])))]
    return compressed_tensors.planned_tensors(name, shape, dtype, scheme)


def named_tensors(
    name: str,
    shape: tuple[int, int],
    scheme: Scheme,
    codes: torch.Tensor,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """What `planned_tensors` announces of the weight, filled: codes, scales and zero points of a weight [out, in] as a kernel packs
    them; of a GGUF file its blocks, which have all of that in them."""
    if scheme.format == GGUF:
        return {f"{name}.weight": codes}
    assert scale is not None, f"{scheme.name}: no scale"
    return compressed_tensors.named_tensors(name, shape, scheme, codes, scale, zero_point, global_scale)


def decode(name: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] in `dtype` that a reader sees. `tensors` by full name."""
    if scheme.format == GGUF:
        from kompressor_worker import kernels

        found = type_of(scheme)
        data = tensors[f"{name}.weight"]
        return kernels.gguf_dequantize(data, found.name, data.shape[1] // found.nbytes * found.block, dtype)
    return compressed_tensors.decode(name, tensors, scheme, dtype)


def codes_and_grid(name: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> tuple[torch.Tensor, int, grid.Grid]:
    """A quantised linear's codes as the file holds them, its columns, and its grid, unpacked. `tensors` by full name."""
    assert scheme.format != GGUF, f"{scheme.name}: its codes are not tuned"
    return compressed_tensors.codes_and_grid(name, tensors, scheme)
