"""The compiled kernels on CPU tensors: memory for the results, and the calls, which release the GIL."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kompressor_worker.formats import packing
from kompressor_worker.grid import integer_range
from kompressor_worker.kernels import bitmask as bitmask_eager
from kompressor_worker.kernels import eager
from kompressor_worker.kernels.activations import KINDS
from kompressor_worker.kernels.eager import Quantized
from kompressor_worker.schemes import Scheme

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
SERIAL = 1 << 17
"""Elements below which starting a thread costs more than it saves."""


def quantize(lib: ctypes.CDLL, weight: Tensor, scheme: Scheme, shared: Tensor | None) -> Quantized:
    rows, columns = weight.shape
    one = scheme.strategy == "tensor"  # known beforehand: rows go each on its own, and each is given the same scale
    tiles = (rows, 1) if one else scheme.scale_shape((rows, columns))
    height, width = (1, max(columns, 1)) if one else scheme.tile((rows, columns))
    common = float(shared) if shared is not None and scheme.strategy in ("tensor", "tensor_group") else 0.0
    codec, bias = 2, 0
    zero_point: Tensor | None = None
    code_dtype, code_columns, scale_dtype = torch.float8_e4m3fn, columns, weight.dtype
    if scheme.format == "mxfp4-pack-quantized":
        codec, code_dtype, code_columns, scale_dtype = 3, torch.uint8, columns // 2, torch.uint8
    elif scheme.format == "nvfp4-pack-quantized":
        codec, code_dtype, code_columns, scale_dtype = 4, torch.uint8, columns // 2, torch.float8_e4m3fn
    elif scheme.type == "int":
        codec, code_dtype = 0, torch.int8
        if scheme.format == "pack-quantized":
            bias, code_dtype, code_columns = -integer_range(scheme)[0], torch.int32, -(-columns * scheme.bits // 32)
        if not scheme.symmetric:
            codec, zero_point = 1, torch.empty(tiles, dtype=torch.int8)
    codes = torch.empty((rows, code_columns), dtype=code_dtype)
    scale = torch.empty(tiles, dtype=scale_dtype)
    stats = torch.empty(3, dtype=torch.float64)
    lib.kompressor_quantize(
        _pointer(weight), DTYPES[weight.dtype], _i64(rows), _i64(columns), codec, scheme.bits, bias, _i64(height), _i64(width),
        ctypes.c_float(common), _threads(weight), _pointer(codes),
        _i64(code_columns * codes.element_size()), _pointer(scale), None if zero_point is None else _pointer(zero_point),
        _pointer(stats),
    )  # fmt: skip
    packed = None if zero_point is None else packing.pack_int32(zero_point, scheme.bits, dim=0)
    error, norm, bad = stats.tolist()
    return Quantized(codes, scale[:1] if one else scale, packed, error, norm, int(bad))


def amax(lib: ctypes.CDLL, weight: Tensor) -> tuple[float, int]:
    bits, bad = ctypes.c_uint32(), ctypes.c_int64()
    lib.kompressor_range(
        _pointer(weight), DTYPES[weight.dtype], _i64(weight.numel()), _threads(weight), ctypes.byref(bits), ctypes.byref(bad)
    )
    word = torch.tensor(bits.value, dtype=torch.int64)
    view = word.to(torch.int32) if weight.dtype is torch.float32 else word.to(torch.int16)
    return float(view.view(weight.dtype)), bad.value


def decode_fp8_block(lib: ctypes.CDLL, weight: Tensor, scale_inv: Tensor, block: Sequence[int], dtype: torch.dtype) -> Tensor:
    rows, columns = weight.shape
    out = torch.empty((rows, columns), dtype=dtype)
    lib.kompressor_decode_fp8_block(
        _pointer(weight), _pointer(scale_inv), _i64(rows), _i64(columns), _i64(block[0]), _i64(block[1]), DTYPES[dtype],
        _threads(weight), _pointer(out),
    )  # fmt: skip
    return out


def decode_mxfp4(lib: ctypes.CDLL, blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    experts, rows, groups, _ = blocks.shape
    out = torch.empty((experts, groups * 32, rows), dtype=dtype)
    lib.kompressor_decode_mxfp4(
        _pointer(blocks), _pointer(scales), _i64(experts), _i64(rows), _i64(groups), DTYPES[dtype], _threads(blocks),
        _pointer(out),
    )  # fmt: skip
    return out


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def _i64(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def _threads(tensor: Tensor) -> int:
    return 1 if tensor.numel() < SERIAL else torch.get_num_threads()


def gptq(
    lib: ctypes.CDLL,
    weight: Tensor,
    factor: Tensor,
    step: Tensor,
    zero_point: Tensor | None,
    group_of: Tensor,
    floating: bool,
    bits: int,
    block: int,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`block` is the kernel's own: the result does not depend on it."""
    codec = (3 if bits == 4 else 2) if floating else 0 if zero_point is None else 1
    steps, zero_points = _by_panels(lib, step, 1.0), None if zero_point is None else _by_panels(lib, zero_point, 0.0)
    return _gptq(lib, weight, factor, codec, bits, steps, zero_points, group_of.contiguous(), 0, torch.float32, mask)


def gptq_groups(
    lib: ctypes.CDLL,
    weight: Tensor,
    factor: Tensor,
    group_size: int,
    bits: int,
    symmetric: bool,
    dtype: torch.dtype,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = weight.shape
    blank = torch.empty((rows, -(-columns // group_size)))
    steps, zero_points = _by_panels(lib, blank, 1.0), None if symmetric else _by_panels(lib, blank, 0.0)
    codes, loss = _gptq(lib, weight, factor, 0 if symmetric else 1, bits, steps, zero_points, None, group_size, dtype, mask)
    zero_point = torch.empty(0, dtype=torch.int8) if zero_points is None else zero_points[:, :rows].t().to(torch.int8).contiguous()
    return codes, steps[:, :rows].t().contiguous(), zero_point, loss


def _by_panels(lib: ctypes.CDLL, grid: Tensor, beyond: float) -> Tensor:
    """[out, groups] as fp32 [groups, out rounded up to whole panels]."""
    rows, groups = grid.shape
    panel = lib.kompressor_panel()
    whole = torch.full((groups, -(-rows // panel) * panel), beyond)
    whole[:, :rows] = grid.t()
    return whole


def _gptq(
    lib: ctypes.CDLL, weight: Tensor, factor: Tensor, codec: int, bits: int, steps: Tensor, zero_points: Tensor | None,
    group_of: Tensor | None, group_size: int, dtype: torch.dtype, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, columns = weight.shape
    codes = torch.empty((rows, columns), dtype=torch.int8 if codec < 2 else torch.float8_e4m3fn)
    losses = torch.zeros(steps.shape[1] // lib.kompressor_panel(), dtype=torch.float64)
    lib.kompressor_gptq(
        _pointer(weight), _pointer(factor), _i64(rows), _i64(columns), codec, bits, _pointer(steps),
        None if zero_points is None else _pointer(zero_points), _i64(steps.shape[1]), None if group_of is None else _pointer(group_of),
        _i64(group_size), DTYPES[dtype], None if mask is None else _pointer(mask), _threads(weight), _pointer(codes), _pointer(losses),
    )  # fmt: skip
    return codes, losses.sum()


def prune_columns(lib: ctypes.CDLL, weight: Tensor, factor: Tensor, mask: Tensor | None, keep: int, of: int) -> tuple[Tensor, Tensor]:
    rows, width = weight.shape
    kept, errors = torch.empty_like(weight), torch.empty_like(weight)
    lib.kompressor_prune(
        _pointer(weight), _pointer(factor), _i64(rows), _i64(width), None if mask is None else _pointer(mask), _i64(keep), _i64(of),
        _threads(weight), _pointer(kept), _pointer(errors),
    )  # fmt: skip
    return kept, errors


def fake_quantize(
    lib: ctypes.CDLL, x: Tensor, kind: str, scale: Tensor | None, zero_point: Tensor | None, global_scale: Tensor | None
) -> Tensor:
    rows, columns = x.shape
    scheme, made = KINDS[kind], torch.empty_like(x)
    codec = 4 if scheme.bits == 4 else 2 if scheme.type == "float" else 0 if zero_point is None else 1
    lib.kompressor_fake_quantize(
        _pointer(x), DTYPES[x.dtype], _i64(rows), _i64(columns), _i64(scheme.tile((rows, columns))[1]), codec,
        None if scale is None else _pointer(scale), _i64(0 if scale is None else len(scale)),
        ctypes.c_float(0.0 if zero_point is None else float(zero_point)),
        ctypes.c_float(1.0 if global_scale is None else float(global_scale)), _threads(x), _pointer(made),
    )  # fmt: skip
    return made


def hadamard(lib: ctypes.CDLL, x: Tensor, base: Tensor | None) -> Tensor:
    order, made = 1 if base is None else len(base), torch.empty_like(x)
    lib.kompressor_hadamard(
        _pointer(x), x.dtype is torch.float64, _i64(len(x)), _i64(order), _i64(x.shape[1] // order),
        None if base is None else _pointer(base), _threads(x), _pointer(made),
    )  # fmt: skip
    return made


def add_gram(lib: ctypes.CDLL, sums: Tensor, x: Tensor) -> None:
    lib.kompressor_add_gram(_pointer(x), DTYPES[x.dtype], _i64(len(x)), _i64(x.shape[1]), _pointer(sums), torch.get_num_threads())


def pack(lib: ctypes.CDLL, codes: Tensor, bits: int) -> Tensor:
    if codes.dtype is torch.float32:
        return eager.pack(codes, bits)
    (rows, columns), floating = codes.shape, codes.dtype is not torch.int8
    packed = (
        torch.empty((rows, columns // 2), dtype=torch.uint8)
        if floating
        else torch.empty((rows, -(-columns * bits // 32)), dtype=torch.int32)
    )
    stride = packed.shape[1] * packed.element_size()
    lib.kompressor_pack(
        _pointer(codes), _i64(rows), _i64(columns), bits, floating, _threads(codes), _pointer(packed), _i64(stride),
    )  # fmt: skip
    return packed


def code_errors(lib: ctypes.CDLL, weight: Tensor, codes: Tensor, step: Tensor, zero_point: Tensor | None, tile: Sequence[int]) -> Tensor:
    if codes.dtype is torch.float32:
        return eager.code_errors(weight, codes, step, zero_point, tile)
    (rows, columns), stats = weight.shape, torch.empty(2, dtype=torch.float64)
    zero_point = None if zero_point is None else zero_point.float().contiguous()
    lib.kompressor_code_errors(
        _pointer(codes), codes.dtype is not torch.int8, _pointer(weight), DTYPES[weight.dtype], _i64(rows), _i64(columns),
        _pointer(step.contiguous()), None if zero_point is None else _pointer(zero_point), _i64(tile[0]), _i64(tile[1]),
        _threads(weight), _pointer(stats),
    )  # fmt: skip
    return stats


HELD = {torch.int8: 0, torch.float8_e4m3fn: 1, torch.int32: 2, torch.uint8: 3}


def dequantize(
    lib: ctypes.CDLL,
    codes: Tensor,
    bits: int,
    columns: int,
    step: Tensor,
    zero_point: Tensor | None,
    tile: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    made = torch.empty((len(codes), columns), dtype=dtype)
    zero_point = None if zero_point is None else zero_point.float().contiguous()
    lib.kompressor_dequantize(
        _pointer(codes), _i64(codes.shape[1] * codes.element_size()), HELD[codes.dtype], bits, _i64(len(codes)), _i64(columns),
        _pointer(step.contiguous()), None if zero_point is None else _pointer(zero_point), _i64(tile[0]), _i64(tile[1]), DTYPES[dtype],
        _threads(made), _pointer(made),
    )  # fmt: skip
    return made


def tile_errors(lib: ctypes.CDLL, weight: Tensor, step: Tensor, zero_point: Tensor | None, bottom: int, top: int) -> Tensor:
    (rows, columns), (count, _, tiles), errors = weight.shape, step.shape, torch.empty_like(step)
    lib.kompressor_tile_errors(
        _pointer(weight), DTYPES[weight.dtype], _i64(rows), _i64(columns), _i64(count), _i64(tiles), _pointer(step),
        None if zero_point is None else _pointer(zero_point), bottom, top, _threads(weight), _pointer(errors),
    )  # fmt: skip
    return errors


def pack_bitmask(lib: ctypes.CDLL, weight: Tensor, values: int) -> tuple[Tensor, Tensor, Tensor]:
    (rows, columns), leave = weight.shape, weight.numel() - values
    made, bitmask = weight.new_empty(values), torch.empty((rows, -(-columns // 8)), dtype=torch.uint8)
    offsets, pack = torch.empty(rows, dtype=torch.int64), lib.kompressor_pack_bitmask
    pack.restype = ctypes.c_int64
    there = pack(
        _pointer(weight), weight.element_size(), _i64(rows), _i64(columns), _i64(leave), _threads(weight), _pointer(made),
        _pointer(bitmask), _pointer(offsets),
    )  # fmt: skip
    if there < leave:
        raise ValueError(f"{there} zeros, {leave} are to be left out")
    return made, bitmask, offsets


def unpack_bitmask(lib: ctypes.CDLL, values: Tensor, bitmask: Tensor, columns: int) -> Tensor:
    rows, unpack = len(bitmask), lib.kompressor_unpack_bitmask
    weight, unpack.restype = values.new_empty((rows, columns)), ctypes.c_int64
    done = unpack(
        _pointer(values), values.element_size(), _i64(len(values)), _pointer(bitmask), _i64(rows), _i64(columns), _threads(weight),
        _pointer(weight),
    )  # fmt: skip
    return weight if done == len(values) else bitmask_eager.unpack_bitmask(values, bitmask, columns)  # raises, and says why


BETWEEN = {"forward": 0, "reverse": 1, "jensenShannon": 2}


def divergence(
    lib: ctypes.CDLL, student: Tensor, teacher: Tensor | None, targets: Tensor, kind: str, temperature: float, labels: float,
    cap: float | None, teacher_cap: float | None, gradient: bool,
) -> Tensor:  # fmt: skip
    (rows, vocabulary), made = student.shape, torch.empty((len(student), 3), dtype=torch.float64)
    assert teacher is None or (teacher.shape, teacher.dtype) == (student.shape, student.dtype), (teacher.shape, teacher.dtype)
    assert not rows or int(targets.max()) < vocabulary, (int(targets.max()), vocabulary)
    lib.kompressor_divergence(
        _pointer(student), None if teacher is None else _pointer(teacher), DTYPES[student.dtype], _pointer(targets), _i64(rows),
        _i64(vocabulary), BETWEEN[kind], ctypes.c_float(temperature), ctypes.c_float(labels), ctypes.c_float(cap or 0.0),
        ctypes.c_float(teacher_cap or 0.0), gradient, _threads(student), _pointer(made),
    )  # fmt: skip
    return made


def top_k_divergence(
    lib: ctypes.CDLL, student: Tensor, indices: Tensor, log_probabilities: Tensor, rest: Tensor, targets: Tensor, kind: str,
    temperature: float, labels: float, cap: float | None, gradient: bool,
) -> Tensor:  # fmt: skip
    (rows, vocabulary), made = student.shape, torch.empty((len(student), 3), dtype=torch.float64)
    assert (indices.dtype, log_probabilities.dtype, rest.dtype) == (torch.int32, torch.float32, torch.float32)
    assert not rows or (int(targets.max()) < vocabulary and int(indices.min()) >= 0 and int(indices.max()) < vocabulary), vocabulary
    lib.kompressor_top_k_divergence(
        _pointer(student), DTYPES[student.dtype], _pointer(indices), _pointer(log_probabilities), _pointer(rest), _pointer(targets),
        _i64(rows), _i64(vocabulary), _i64(indices.shape[1]), BETWEEN[kind], ctypes.c_float(temperature), ctypes.c_float(labels),
        ctypes.c_float(cap or 0.0), gradient, _threads(student), _pointer(made),
    )  # fmt: skip
    return made
