"""GGUF's blocks by the compiled kernels: memory for the results, and the calls."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from kompressor_worker.formats.gguf_types import TYPES
from kompressor_worker.kernels import gguf_eager, gguf_search
from kompressor_worker.kernels.compiled import DTYPES, _i64, _pointer, _threads

SMALL = {None: 0, "nibbles": 1, "six": 2, "signed six": 3, "bytes": 4}
SEARCHED = 1 << 14
"""Elements below which a search is done before a thread has started."""


class Kind(ctypes.Structure):
    """GgufKind in gguf_blocks.cpp."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("block", "nbytes", "group", "bits", "planes")),
        ("plane", ctypes.c_int32 * 3 * 2),
        *((name, ctypes.c_int32) for name in ("scale", "minimum", "small", "small_at", "exponent", "even")),
        ("small_bottom", ctypes.c_float),
        ("small_top", ctypes.c_float),
        ("levels", ctypes.c_float * 16),
    )


class Tries(ctypes.Structure):
    """GgufTries in gguf_search.cpp."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("form", "widths", "outers", "cuts")),
        ("width", ctypes.c_float * 16),
        ("outer", ctypes.c_float * 8),
        ("cut", ctypes.c_double * 6),
    )


@cache
def _kind(name: str) -> Kind:
    found = TYPES[name]
    made = Kind(found.block, found.nbytes, found.group, found.bits, len(found.planes))
    for number, plane in enumerate(found.planes):
        made.plane[number][:] = plane.at, plane.bits, plane.width
    made.scale, made.minimum = found.scale, -1 if found.minimum is None else found.minimum
    made.small, made.small_at, made.exponent, made.even = SMALL[found.small], found.small_at, name == "MXFP4", found.even
    if found.small is not None:
        made.small_bottom, made.small_top = found.small_range
    levels = (found.levels[0], found.levels[-1]) if found.even else found.levels
    made.levels[: len(levels)] = levels
    return made


@cache
def _tries(name: str, weighted: bool) -> Tries:
    found, widths = TYPES[name], gguf_search.widths(TYPES[name], weighted)
    cuts = gguf_search.WEIGHTED_CUTS if weighted else gguf_search.CUTS
    form = 0 if widths else 1 if found.minimum is not None else 3 if name == "MXFP4" else 2
    made = Tries(form, len(widths), len(gguf_search.OUTER), len(cuts))
    made.width[: len(widths)] = widths
    if found.small is not None:
        made.outer[:] = [found.small_range[0] * share for share in gguf_search.OUTER]
    made.cut[: len(cuts)] = cuts
    return made


def quantize(lib: ctypes.CDLL, weight: Tensor, importance: Tensor | None, name: str, unbiased: bool) -> tuple[Tensor, Tensor]:
    if name in gguf_eager.HALVES:
        return gguf_eager.quantize(weight, importance, name, unbiased)
    (rows, columns), kind, stats = weight.shape, TYPES[name], torch.empty(3, dtype=torch.float64)
    data = torch.empty((rows, columns // kind.block * kind.nbytes), dtype=torch.uint8)
    lib.kompressor_gguf_quantize(
        _pointer(weight), DTYPES[weight.dtype], None if importance is None else _pointer(importance), _i64(rows), _i64(columns),
        ctypes.byref(_kind(name)), ctypes.byref(_tries(name, importance is not None)), ctypes.c_int(unbiased),
        1 if weight.numel() < SEARCHED else torch.get_num_threads(), _pointer(data), _pointer(stats),
    )  # fmt: skip
    return data, stats


def dequantize(lib: ctypes.CDLL, data: Tensor, columns: int, name: str, dtype: torch.dtype) -> Tensor:
    if name in gguf_eager.HALVES:
        return gguf_eager.dequantize(data, columns, name, dtype)
    made = torch.empty((len(data), columns), dtype=dtype)
    lib.kompressor_gguf_dequantize(
        _pointer(data), ctypes.byref(_kind(name)), _i64(len(data)), _i64(columns), DTYPES[dtype], _threads(made), _pointer(made)
    )
    return made


def codes(lib: ctypes.CDLL, data: Tensor, columns: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    found, rows = torch.empty((len(data), columns), dtype=torch.int8), len(data)
    scale = torch.empty((rows, columns // TYPES[name].group))
    centre = torch.empty_like(scale)
    lib.kompressor_gguf_codes(
        _pointer(data), ctypes.byref(_kind(name)), _i64(rows), _i64(columns), _threads(found), _pointer(found), _pointer(scale),
        _pointer(centre),
    )  # fmt: skip
    return found, scale, centre


def pack(lib: ctypes.CDLL, data: Tensor, codes: Tensor, name: str) -> Tensor:
    (rows, columns), made = codes.shape, data.clone()
    lib.kompressor_gguf_pack(_pointer(codes), ctypes.byref(_kind(name)), _i64(rows), _i64(columns), _threads(codes), _pointer(made))
    return made


def keep_mean(lib: ctypes.CDLL, weight: Tensor, data: Tensor, variance: Tensor, mean: Tensor, name: str) -> Tensor:
    (rows, columns), made = weight.shape, data.clone()
    lib.kompressor_gguf_keep_mean(
        _pointer(weight), DTYPES[weight.dtype], _pointer(variance), _pointer(mean), ctypes.byref(_kind(name)), _i64(rows), _i64(columns),
        _threads(weight), _pointer(made),
    )  # fmt: skip
    return made


def errors(lib: ctypes.CDLL, weight: Tensor, data: Tensor, name: str) -> Tensor:
    if name in gguf_eager.HALVES:
        return gguf_eager.errors(weight, data, name)
    (rows, columns), stats = weight.shape, torch.empty(2, dtype=torch.float64)
    lib.kompressor_gguf_errors(
        _pointer(weight), DTYPES[weight.dtype], _pointer(data), ctypes.byref(_kind(name)), _i64(rows), _i64(columns), _threads(weight),
        _pointer(stats),
    )  # fmt: skip
    return stats
