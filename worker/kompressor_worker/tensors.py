"""Bytes of a file and torch tensors, without copies."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kompressor_worker import kernels
from kompressor_worker.errors import BadNumerics, CorruptSource
from kompressor_worker.formats import bitmask
from kompressor_worker.formats.gguf_form import formed
from kompressor_worker.formats.stored import decode as decode_linear
from kompressor_worker.layout import SourceTensor
from kompressor_worker.shards import PlacedTensor

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CHECKED = ("F64", "F32", "F16", "BF16")


def tensor(view: memoryview, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over a file's bytes; copied only where they are not aligned to the dtype."""
    if len(view) == 0:
        return torch.empty(shape, dtype=DTYPES[dtype])
    flat = torch.frombuffer(view, dtype=torch.uint8)
    if flat.data_ptr() % DTYPES[dtype].itemsize:
        flat = flat.clone()
    return flat.view(DTYPES[dtype]).reshape(shape)


def float_view(view: memoryview, dtype: str) -> torch.Tensor | None:
    """The values of a slice, if they are of a type that can hold NaN."""
    return tensor(view, dtype, (-1,)) if dtype in _CHECKED and len(view) else None


def decode(source: SourceTensor, views: Mapping[str, memoryview]) -> torch.Tensor:
    """A tensor as the model sees it, from the bytes of its stored tensors."""
    stored = [tensor(views[s.name], s.dtype, s.shape) for s in source.stored]
    if source.encoding == "fp8_block":
        return kernels.decode_fp8_block(stored[0], stored[1], source.block, DTYPES[source.dtype])
    if source.encoding == "mxfp4":
        return kernels.decode_mxfp4(stored[0], stored[1], DTYPES[source.dtype])
    if source.encoding in ("quantized", "bitmask"):
        parts = {s.name: value for s, value in zip(source.stored, stored, strict=True)}
        return _decode_ours(source, parts)
    return stored[0]


def _decode_ours(source: SourceTensor, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A linear's weight from the tensors by full name in which one of our results has it. Raises CorruptSource."""
    name = source.name.removesuffix(".weight")
    if source.scheme is not None:
        return decode_linear(name, stored, source.scheme, DTYPES[source.dtype])
    try:
        return bitmask.decode(name, stored)
    except ValueError as error:
        raise CorruptSource(f"{source.name}: {error}; upload the result again") from error


def as_bytes(value: torch.Tensor, placed: PlacedTensor) -> memoryview:
    """The bytes of a result, after making sure that they are what the header promised."""
    assert tuple(value.shape) == placed.shape, f"{placed.name}: planned {placed.shape}, made {tuple(value.shape)}"
    data = slice_bytes(value, placed)
    assert data.nbytes == placed.stop - placed.start, f"{placed.name}: planned {placed.stop - placed.start} bytes, made {data.nbytes}"
    return data


def slice_bytes(rows: torch.Tensor, placed: PlacedTensor) -> memoryview:
    """The same of some of its rows, or of some values as they follow each other."""
    assert rows.dtype == DTYPES[placed.dtype], f"{placed.name}: planned {placed.dtype}, made {rows.dtype}"
    rows = rows.cpu().contiguous() if placed.form is None else formed(rows.cpu(), placed.form)
    return memoryview(rows.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stubs lack the buffer


def refuse_nonfinite(name: str, count: int) -> None:
    if count:
        raise BadNumerics(f"{name}: {count} values are NaN or Inf; the checkpoint is damaged or its training diverged, fetch it again")
