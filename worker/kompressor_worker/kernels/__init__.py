"""Fused kernels: one read of a weight gives codes, scales and errors.

Each operation stands up to three times: in plain torch, its specification (`eager`, `column_loop`, `activations`, `butterflies`); in
`kernels.cpp`, compiled for this CPU at first use; in Triton for CUDA (`triton_*`). All are registered with torch.library, as
`torch.ops.kompressor.*`. The one dispatch rule: on the CPU the compiled one where it could be built, on CUDA the one in Triton where there
is one, else plain torch; `KOMPRESSOR_KERNELS=eager` forces that. All give the same tensors bit for bit, whatever the number of threads;
the fp64 sums agree to rounding. GPTQ's codes agree but where the last bit of a sum decides between two: the compiled one has sums of its
own, which depend on nothing. Divergences and their gradients, with exponentials in them, agree to rounding too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kompressor_worker.grid import Grid, integer_range
from kompressor_worker.kernels import compiled, eager, ops, pruning  # ops: registers the operations
from kompressor_worker.kernels.bf16 import fast_bf16
from kompressor_worker.kernels.cholesky import inverse_factor
from kompressor_worker.kernels.column_loop import block_of_groups
from kompressor_worker.kernels.eager import Quantized
from kompressor_worker.kernels.gguf import (
    GgufGrid,
    gguf_codes,
    gguf_dequantize,
    gguf_errors,
    gguf_grid,
    gguf_keep_mean,
    gguf_pack,
    gguf_quantize,
    gguf_scaled,
)
from kompressor_worker.kernels.pieces import Heard, row_pieces, unheard
from kompressor_worker.schemes import Inputs, Scheme
from kompressor_worker.sparsity import Sparsity

__all__ = [
    "GgufGrid", "Quantized", "add_gram", "amax", "code_errors", "decode_fp8_block", "decode_mxfp4", "dequantize", "fake_quantize_input",
    "fake_quantize_kv", "fast_bf16", "gguf_codes", "gguf_dequantize", "gguf_errors", "gguf_grid", "gguf_keep_mean", "gguf_pack",
    "gguf_quantize", "gguf_scaled", "gptq",
    "gptq_groups", "hadamard", "inverse_factor", "nonfinite", "ops", "pack_bitmask", "prune", "quantize", "stored", "tile_errors",
    "unpack_bitmask",
]  # fmt: skip

FLOATS = tuple(compiled.DTYPES)
"""bf16, fp16 and fp32: what weights come in."""


def quantize(weight: Tensor, scheme: Scheme, shared: Tensor | None = None) -> Quantized:
    """Weight [out, in] (bf16, fp16 or fp32) rounded to nearest, each tile on the grid of its own range.

    shared, fp32 [1], of all tensors that are one to a loader: NVFP4's global scale (`grid.global_scale`); their largest magnitude where a
    tensor has one scale (FP8).
    """
    assert weight.dtype in FLOATS, weight.dtype
    codes, scale, zero_point, stats = torch.ops.kompressor.quantize(weight.contiguous(), scheme.name, scheme.group_size or -1, shared)
    error, norm, bad = stats.tolist()
    return Quantized(codes, scale, None if scheme.symmetric else zero_point, error, norm, int(bad))


def amax(weight: Tensor) -> tuple[float, int]:
    """Largest finite magnitude of a bf16, fp16 or fp32 tensor, and how many of its elements are NaN or Inf."""
    assert weight.dtype in FLOATS, weight.dtype
    most, bad = torch.ops.kompressor.amax(weight.contiguous()).tolist()
    return most, int(bad)


def nonfinite(tensor: Tensor) -> int:
    """How many elements of a tensor are NaN or Inf; of any dtype, fast for bf16, fp16 and fp32."""
    if not tensor.is_floating_point():
        return 0
    return amax(tensor)[1] if tensor.dtype in FLOATS else eager.nonfinite(tensor.double())


def decode_fp8_block(weight: Tensor, scale_inv: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """An FP8 checkpoint's weight [out, in] in `dtype` (bf16, fp16 or fp32).

    weight float8_e4m3fn [out, in]; scale_inv [ceil(out / r), ceil(in / c)] for blocks of (r, c), by which each code is
    multiplied in fp32, as DeepSeek-V3's `weight_dequant` and transformers' `Fp8Dequantize`.
    """
    scale_inv = scale_inv.float().contiguous()
    decoded: Tensor = torch.ops.kompressor.decode_fp8_block(weight.contiguous(), scale_inv, block, dtype)
    return decoded


def decode_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """gpt-oss experts in `dtype` (bf16, fp16 or fp32): [E, groups * 32, rows], transposed as the model has them.

    blocks uint8 [E, rows, groups, 16], two E2M1 a byte; scales uint8 [E, rows, groups], exponents with bias 127. As
    transformers' `convert_moe_packed_tensors`.
    """
    decoded: Tensor = torch.ops.kompressor.decode_mxfp4(blocks.contiguous(), scales.contiguous(), dtype)
    return decoded


def stored(codes: Tensor, found: Grid, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [out, in] on the grid `found`, scales and zero points as the file holds them, as in `Quantized`, for a weight of `dtype`.

    Codes as `gptq` or `grid.quantize` make them: int8, float8_e4m3fn, or FP4 values in fp32."""
    if scheme.format in eager.PACKED:
        codes = torch.ops.kompressor.pack(codes.contiguous(), scheme.bits)
    return codes, *eager.stored_grid(found, scheme, dtype)


def dequantize(codes: Tensor, columns: int, found: Grid, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """The weight [out, columns] in `dtype` (bf16, fp16 or fp32) that a reader sees: (code - zero point) * step in fp32, then rounded.

    Codes as the file holds them: int8, float8_e4m3fn, int32 words, or FP4 pairs in uint8; the grid unpacked."""
    tile = scheme.tile((len(codes), columns))
    step, zero_point = found.step.float(), found.zero_point
    made: Tensor = torch.ops.kompressor.dequantize(codes.contiguous(), scheme.bits, columns, step, zero_point, tile, dtype)
    return made


def code_errors(weight: Tensor, codes: Tensor, found: Grid, scheme: Scheme) -> tuple[float, float]:
    """Sums of (dequantised - weight)^2 and of weight^2, as `Quantized.squared_error` and `squared_norm`. Codes as for `stored`."""
    tile = scheme.tile((weight.shape[0], weight.shape[1]))
    error, norm = torch.ops.kompressor.code_errors(weight.contiguous(), codes.contiguous(), found.step, found.zero_point, tile).tolist()
    return error, norm


def tile_errors(weight: Tensor, grids: Sequence[Grid], scheme: Scheme) -> Tensor:
    """fp32 [grids, rows, tiles]: the squared error of weight [rows, columns] (bf16, fp16 or fp32) on each of these integer grids.

    For schemes whose tiles are equal parts of one row."""
    assert scheme.type == "int" and weight.dtype in FLOATS, (scheme.name, weight.dtype)
    step = torch.stack([found.step for found in grids])
    zero_point = None if scheme.symmetric else torch.stack([found.zero_point.float() for found in grids if found.zero_point is not None])
    made: Tensor = torch.ops.kompressor.tile_errors(weight.contiguous(), step, zero_point, *integer_range(scheme))
    return made


def add_gram(sums: Tensor, x: Tensor) -> None:
    """sums [n, n] fp32, contiguous and symmetric, += x^T x for x [rows, n] (bf16, fp16 or fp32); sums are fp32.

    In the model's dtype x costs least: bf16 is multiplied as it is where the CPU can.
    """
    assert sums.dtype is torch.float32 and x.dtype in FLOATS and sums.shape == (x.shape[1], x.shape[1]), (
        sums.shape,
        sums.dtype,
        x.shape,
        x.dtype,
    )
    torch.ops.kompressor.add_gram(sums, x.contiguous())


def gptq(
    weight: Tensor,
    inverse_factor: Tensor,
    grid: Grid,
    scheme: Scheme,
    columns: Tensor | None = None,
    heard: Heard = unheard,
    block: int = 128,
    mask: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Codes [out, in] by GPTQ (Frantar et al. 2022, arXiv 2210.17323) on a given grid, and the loss it propagated.

    weight fp32 [out, in] in the order of processing; inverse_factor fp32 [in, in]: U, upper triangular, H^-1 = U^T U. `columns` int32
    [in]: the tile of `grid` that each column belongs to (activation order with static groups); None: as they lie. Codes are in the order
    of processing: int8, or float8_e4m3fn for FP8 and for FP4, whose values it holds exactly. The loss is the sum of (w - q)^2 / U_jj^2
    over all elements: by how much ||(W - Q) X||^2 has grown if H is X^T X. `heard` is called between pieces, and may raise.
    `mask` bool [out, in]: where weights are pruned, and stay zero.
    """
    assert weight.dtype == inverse_factor.dtype == torch.float32, (weight.dtype, inverse_factor.dtype)
    height, width = scheme.tile((weight.shape[0], weight.shape[1]))
    if columns is None:
        columns = torch.arange(weight.shape[1], dtype=torch.int32, device=weight.device) // width
    step = grid.step.repeat_interleave(height, 0)[: len(weight)]
    zero_point = None if grid.zero_point is None else grid.zero_point.repeat_interleave(height, 0)[: len(weight)]
    factor, tiles, made = inverse_factor.contiguous(), columns.to(torch.int32), []
    for rows in row_pieces(weight, weight.shape[1] ** 2 / 2):
        points = None if zero_point is None else zero_point[rows]
        floating, part = scheme.type == "float", weight[rows].contiguous()
        made.append(torch.ops.kompressor.gptq(part, factor, step[rows], points, tiles, floating, scheme.bits, block, _bytes(mask, rows)))
        heard()
    return torch.cat([codes for codes, _ in made]), sum(float(loss) for _, loss in made)


def gptq_groups(
    weight: Tensor, inverse_factor: Tensor, scheme: Scheme, dtype: torch.dtype, heard: Heard = unheard, mask: Tensor | None = None
) -> tuple[Tensor, Grid, float]:
    """The same without a grid: each group gets that of its weights as they are when its first column is reached. Integers only.

    `dtype` is what scales are stored in. Returns codes, the grid and the loss. For columns in their own order.
    """
    assert scheme.type == "int", scheme.name
    factor, width, made = inverse_factor.contiguous(), scheme.tile((weight.shape[0], weight.shape[1]))[1], []
    for rows in row_pieces(weight, weight.shape[1] ** 2 / 2):
        part = weight[rows].contiguous()
        made.append(torch.ops.kompressor.gptq_groups(part, factor, width, scheme.bits, scheme.symmetric, dtype, _bytes(mask, rows)))
        heard()
    codes, scales, zero_points, losses = zip(*made, strict=True)
    return torch.cat(codes), Grid(torch.cat(scales), None if scheme.symmetric else torch.cat(zero_points)), sum(map(float, losses))


def _bytes(mask: Tensor | None, rows: slice) -> Tensor | None:
    return None if mask is None else mask[rows].to(torch.uint8).contiguous()


def prune(weight: Tensor, inverse_factor: Tensor, sparsity: Sparsity, heard: Heard = unheard) -> tuple[Tensor, float]:
    """What SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774) leaves of weight fp32 [out, in], and the loss it propagated.

    inverse_factor as for `gptq`, in the columns' own order. Without a pattern every block of columns loses its share, over all rows.
    `heard` is called before each block, and may raise."""
    assert weight.dtype == inverse_factor.dtype == torch.float32, (weight.dtype, inverse_factor.dtype)
    (rows, columns), left, kept, loss, gone = weight.shape, weight.clone(), torch.empty_like(weight), 0.0, 0
    block = block_of_groups(sparsity.of) if sparsity.of else pruning.BLOCK
    for start in range(0, columns, block):
        heard()
        stop = min(start + block, columns)
        part, factor = left[:, start:stop].contiguous(), inverse_factor[start:stop, start:stop].contiguous()
        mask = None
        if not sparsity.of:
            count = sparsity.zeros((rows, stop)) - gone
            mask, gone = pruning.smallest_in_all((part / factor.diagonal()).square(), count).to(torch.uint8), gone + count
        kept[:, start:stop], errors = torch.ops.kompressor.prune_columns(part, factor, mask, sparsity.keep, sparsity.of)
        left[:, stop:].addmm_(errors, inverse_factor[start:stop, stop:], alpha=-1)
        loss += float(errors.double().square().sum())
    return kept, loss


def pack_bitmask(weight: Tensor, values: int) -> tuple[Tensor, Tensor, Tensor]:
    """So many values of weight [rows, columns] (bf16, fp16 or fp32) that zeros may be left out of, uint8 [rows, ceil(columns / 8)] with a
    bit for each place, first column lowest, and int64 [rows]: where each row begins among the values.

    What is left out are zeros (not -0.0), the first in memory. Raises ValueError where there are not enough of them."""
    assert weight.dtype in FLOATS and 0 <= values <= weight.numel(), (weight.dtype, values)
    left, bitmask, offsets = torch.ops.kompressor.pack_bitmask(weight.contiguous(), values)
    return left, bitmask, offsets


def unpack_bitmask(values: Tensor, bitmask: Tensor, columns: int) -> Tensor:
    """The weight [rows, columns]. Raises ValueError where the bitmask [rows, ceil(columns / 8)] does not mark a place for each value."""
    assert values.dtype in FLOATS and bitmask.shape[1] == -(-columns // 8), (values.dtype, bitmask.shape, columns)
    made: Tensor = torch.ops.kompressor.unpack_bitmask(values.contiguous(), bitmask.contiguous(), columns)
    return made


def fake_quantize_input(
    x: Tensor, kind: Inputs, scale: Tensor | None = None, zero_point: Tensor | None = None, global_scale: Tensor | None = None
) -> Tensor:
    """x [..., columns] (bf16, fp16 or fp32) quantised as a runtime does, and back, in x's dtype.

    `kind` as in `Scheme.inputs`: dynamic ones need nothing, those by one calibrated scale `scale` [1] (and `zero_point` [1], int8),
    "fp4_local" `global_scale` [1]. NaN stays NaN.
    """
    if kind == "none":
        return x
    assert x.dtype in FLOATS, x.dtype
    given = kind in ("int8_tensor", "int8_tensor_asym", "fp8_tensor")
    assert (scale is not None) == given and (zero_point is not None) == (kind == "int8_tensor_asym"), kind
    assert (global_scale is not None) == (kind == "fp4_local"), kind
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    scale = None if scale is None else scale.to(x.device, torch.float32).reshape(1)
    zero_point, global_scale = (None if t is None else t.to(x.device) for t in (zero_point, global_scale))
    made: Tensor = torch.ops.kompressor.fake_quantize(rows, kind, scale, zero_point, global_scale)
    return made.view(x.shape)


def fake_quantize_kv(x: Tensor, scale: Tensor) -> Tensor:
    """Keys or values [rows, KV heads, length, head dim] through an FP8 cache, in x's dtype. scale [1], or [KV heads, 1, 1]: one a head."""
    assert x.dim() == 4 and x.dtype in FLOATS and scale.numel() in (1, x.shape[1]), (x.shape, x.dtype, scale.shape)
    by_head = x.reshape(x.shape[0] * x.shape[1], -1).contiguous()
    made: Tensor = torch.ops.kompressor.fake_quantize(by_head, "fp8_tensor", scale.to(x.device, torch.float32).reshape(-1), None, None)
    return made.view(x.shape)


def hadamard(x: Tensor, base: Tensor | None = None) -> Tensor:
    """x (B x H) / sqrt(2^k) for x [..., order * 2^k], fp32 or fp64, in x's dtype; rotated rows, if B is orthogonal.

    H is Sylvester's Hadamard matrix of the order 2^k (symmetric), B = `base` an fp64 [order, order] matrix for sizes that are no power of
    two, None: 1. The same bits from every implementation.
    """
    assert x.dtype in (torch.float32, torch.float64), x.dtype
    order = 1 if base is None else len(base)
    power, rest = divmod(x.shape[-1], order)
    assert rest == 0 and power & (power - 1) == 0 and power > 0, f"{x.shape[-1]} is not {order} times a power of two"
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    made: Tensor = torch.ops.kompressor.hadamard(rows, None if base is None else base.to(x.device, torch.float64).contiguous())
    return made.view(x.shape)
