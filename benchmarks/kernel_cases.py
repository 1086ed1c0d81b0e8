"""The kernels that `kernels.py` measures: each as the worker calls it, its eager reference, the bytes and operations that it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from kompressor_worker import grid, kernels
from kompressor_worker.formats.gguf_types import TYPES
from kompressor_worker.kernels import activations, bitmask, butterflies, column_loop, eager, gguf_eager, gram, token_divergence
from kompressor_worker.schemes import COMPRESSED_TENSORS, SCHEMES


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    work: Callable[[], Any]
    reference: Callable[[], Any] | None
    read: int
    """Bytes."""
    operations: float
    dtype: str = "float32"
    """That matrix products at the limit are of."""
    written: int | None = None
    """Bytes; None: those of the tensors that it returns."""


@dataclass(frozen=True)
class Shapes:
    """Of a weight [rows, columns], of activations [tokens, columns], and of GPTQ's second weight, as wide as an FFN."""

    rows: int = 4096
    columns: int = 8192
    tokens: int = 4096
    square: int = 4096
    wide: int = 11008


def rounding(weight: torch.Tensor) -> Iterator[Case]:
    """Round to nearest in every scheme: codes packed, scales and errors."""
    largest = grid.global_scale(torch.tensor(kernels.amax(weight)[0]))
    for scheme in [*COMPRESSED_TENSORS.values(), SCHEMES["W4A16"].with_group_size(-1)]:
        name = scheme.name + (" channel" if scheme.choosable_groups and scheme.strategy == "channel" else "")
        each = 25 if scheme.type == "float" else 13 if scheme.symmetric else 17
        given = weight, scheme, largest
        yield Case(
            f"round to {name}", partial(kernels.quantize, *given), partial(eager.quantize, *given), weight.nbytes, each * weight.numel()
        )
    yield Case("amax, NaN and Inf", partial(kernels.amax, weight), partial(eager.amax, weight), weight.nbytes, 2 * weight.numel())


def codes(weight: torch.Tensor) -> Iterator[Case]:
    """Codes that a pass chose: stored, priced, and read back."""
    (rows, columns), dtype, each = weight.shape, weight.dtype, weight.numel()
    for name in ("W4A16", "W3A16", "NVFP4A16"):
        scheme = SCHEMES[name]
        found = grid.grid_of(weight, scheme, grid.global_scale(weight.abs().max()))
        chosen = grid.quantize(weight, found, scheme)
        chosen = chosen if scheme.type == "int" else chosen.to(torch.float8_e4m3fn)
        given, tile = (chosen, found, scheme, dtype), scheme.tile((rows, columns))
        held = kernels.stored(*given)[0]
        yield Case(f"store {name}", partial(kernels.stored, *given), partial(eager.stored, *given), chosen.nbytes, 3 * each)
        yield Case(
            f"dequantise {name}",
            partial(kernels.dequantize, held, columns, found, scheme, dtype),
            partial(eager.dequantize, held, scheme.bits, columns, found.step, found.zero_point, tile, dtype),
            held.nbytes,
            6 * each,
        )
        yield Case(
            f"errors of {name}",
            partial(kernels.code_errors, weight, chosen, found, scheme),
            partial(eager.code_errors, weight, chosen, found.step, found.zero_point, tile),
            weight.nbytes + chosen.nbytes,
            8 * each,
        )


def blocks(weight: torch.Tensor) -> Iterator[Case]:
    """Of GGUF files, on the CPU, whatever the device: searched and rounded, given other codes, decoded. In each pass of its search an
    element takes 10 operations, 13 where there are minima."""
    weight = weight.cpu()
    importance, columns = torch.rand(weight.shape[1]) + 0.1, weight.shape[1]
    few = weight[: max(1, len(weight) // 8)].contiguous()
    for name, passes in (("Q8_0", 1), ("Q4_0", 18), ("Q3_K", 19), ("Q4_K", 43)):
        given, each = (few, importance, name, True), 10 if TYPES[name].minimum is None else 13
        yield Case(
            f"search {name}",
            partial(torch.ops.kompressor.gguf_quantize, *given),
            partial(gguf_eager.quantize, *given),
            few.nbytes,
            each * passes * few.numel(),
        )
    data = kernels.gguf_quantize(weight, "Q4_K")[0]
    found, held = kernels.gguf_codes(data, "Q4_K", columns)
    yield Case(
        "codes to Q4_K",
        partial(kernels.gguf_pack, found, held, "Q4_K"),
        partial(gguf_eager.pack, data, found, "Q4_K"),
        found.nbytes,
        3.0 * weight.numel(),
    )
    yield Case(
        "decode Q4_K",
        partial(kernels.gguf_dequantize, data, "Q4_K", columns, weight.dtype),
        partial(gguf_eager.dequantize, data, columns, "Q4_K", weight.dtype),
        data.nbytes,
        5.0 * weight.numel(),
    )


def reading(shapes: Shapes) -> Iterator[Case]:
    """Checkpoints that come quantised: decoded on the CPU, whatever the device."""
    rows, columns = shapes.rows, shapes.columns
    weight, inverse = (torch.randn(rows, columns) * 0.1).to(torch.float8_e4m3fn), torch.rand(-(-rows // 128), -(-columns // 128))
    block = weight, inverse, (128, 128), torch.bfloat16
    yield Case(
        "decode FP8 blocks",
        partial(kernels.decode_fp8_block, *block),
        partial(eager.decode_fp8_block, *block),
        weight.nbytes,
        8 * weight.numel(),
    )
    pairs = torch.randint(0, 256, (4, rows // 2, columns // 128, 16), dtype=torch.uint8)
    exponents = torch.randint(110, 130, pairs.shape[:3], dtype=torch.uint8)
    experts = pairs, exponents, torch.bfloat16
    yield Case(
        "decode MXFP4 experts",
        partial(kernels.decode_mxfp4, *experts),
        partial(eager.decode_mxfp4, *experts),
        pairs.nbytes + exponents.nbytes,
        2 * 8 * pairs.numel(),
    )


def bitmasks(weight: torch.Tensor) -> Iterator[Case]:
    """Half of a weight and where it stands: packed and taken apart on the CPU, whatever the device."""
    weight = weight.cpu().masked_fill(torch.rand(weight.shape) < 0.5, 0.0)
    values, columns = int((weight != 0).sum()), weight.shape[1]
    left, bits, _ = kernels.pack_bitmask(weight, values)
    yield Case(
        "pack a bitmask",
        partial(kernels.pack_bitmask, weight, values),
        partial(bitmask.pack_bitmask, weight, values),
        weight.nbytes,
        2 * weight.numel(),
    )
    yield Case(
        "unpack a bitmask",
        partial(kernels.unpack_bitmask, left, bits, columns),
        partial(bitmask.unpack_bitmask, left, bits, columns),
        left.nbytes + bits.nbytes,
        1.0 * weight.numel(),
    )


def inputs(x: torch.Tensor) -> Iterator[Case]:
    """Activations rounded as a runtime does, and back."""
    shared = grid.global_scale(x.abs().max())
    for kind in ("int8_token", "fp8_token", "fp8_group", "int8_tensor", "fp8_tensor", "fp4_local"):
        scale = torch.tensor([0.01], device=x.device) if "tensor" in kind else None
        given = x, kind, scale, None, shared if kind == "fp4_local" else None
        each = (20 if "fp" in kind else 10) * x.numel()
        yield Case(
            f"inputs {kind}", partial(kernels.fake_quantize_input, *given), partial(activations.fake_quantize, *given), x.nbytes, each
        )
    heads = x.view(-1, 8, x.shape[0] // 16, x.shape[1] // 2)
    scales, by_head = torch.rand(8, 1, 1, device=x.device) * 0.01, heads.reshape(-1, heads.shape[2] * heads.shape[3])
    yield Case(
        "KV cache fp8, by head",
        partial(kernels.fake_quantize_kv, heads, scales),
        partial(activations.fake_quantize, by_head, "fp8_tensor", scales.reshape(-1), None, None),
        x.nbytes,
        18 * x.numel(),
    )


def transforms(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """log2(n) additions an element, with a small factor as many multiply-adds as it has rows."""
    n = shapes.square
    for order, power, dtype in ((1, n, torch.float32), (1, n, torch.float64), (12, n // 16, torch.float64)):
        x = torch.randn(shapes.tokens // 4, order * power, dtype=dtype, device=device)
        base = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, device=device))[0] if order > 1 else None
        each = math.log2(power) + 1 + (2 * order if order > 1 else 0)
        yield Case(
            f"Hadamard {order} x {power}, {dtype}".replace("torch.", ""),
            partial(kernels.hadamard, x, base),
            partial(butterflies.hadamard, x, base),
            x.nbytes,
            each * x.numel(),
        )


def hessians(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """One triangle of x^T x: tokens * n^2 operations. The factor of its inverse: n^3."""
    n, tokens = shapes.square, shapes.tokens
    ours, theirs = torch.zeros(n, n, device=device), torch.zeros(n, n, device=device)
    x = torch.randn(tokens, n, device=device)
    for name in ("bfloat16", "float32"):
        narrow = x.to(getattr(torch, name))
        yield Case(
            f"gram {n}, {name}",
            partial(kernels.add_gram, ours, narrow),
            partial(gram.add_gram, theirs, narrow),
            narrow.nbytes + ours.nbytes,
            1.0 * tokens * n**2,
            name,
            written=ours.nbytes,
        )
    hessian = x.T @ x + tokens * torch.eye(n, device=device)
    yield Case(
        f"inverse factor {n}",
        lambda: kernels.inverse_factor(hessian.clone()),
        lambda: torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True),
        hessian.nbytes,
        1.0 * n**3,
    )


def column_loops(rows: int, columns: int, device: torch.device) -> Iterator[Case]:
    """rows * columns^2 operations, all but some of them in products of fp32."""
    weight = torch.randn(rows, columns, device=device) * 0.02
    factor = torch.randn(columns, columns, device=device).triu_() / columns
    factor.diagonal().abs_().add_(1)
    cost = weight.nbytes + factor.nbytes, 1.0 * rows * columns**2
    for name in ("W4A16", "FP8_DYNAMIC"):
        scheme = SCHEMES[name]
        found = grid.grid_of(weight, scheme)
        tiles = torch.arange(columns, dtype=torch.int32, device=device) // scheme.tile((rows, columns))[1]
        given = weight, factor, found.step, found.zero_point, tiles, scheme.type == "float", scheme.bits, 128
        yield Case(
            f"GPTQ {name} {rows} x {columns}",
            partial(kernels.gptq, weight, factor, found, scheme),
            partial(column_loop.gptq, *given),
            *cost,
        )
    scheme = SCHEMES["W4A16"]
    yield Case(
        f"GPTQ W4A16 {rows} x {columns}, groups on the way",
        partial(kernels.gptq_groups, weight, factor, scheme, torch.bfloat16),
        partial(column_loop.gptq_groups, weight, factor, scheme.tile((rows, columns))[1], 4, True, torch.bfloat16),
        *cost,
    )


def divergences(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Logits of student and teacher read, the gradient written in place of the student's: two to four exponentials a logit."""
    student, teacher = ((torch.randn(rows, vocabulary, device=device) * 2).to(dtype) for _ in range(2))
    targets = torch.arange(rows, device=device) % vocabulary
    log_p = teacher.float().log_softmax(1)
    most, indices = log_p.topk(16, 1)
    top = indices.to(torch.int32), most.contiguous(), log_p.scatter(1, indices, -torch.inf).logsumexp(1)
    operations = {"forward": 80, "reverse": 80, "jensenShannon": 160}
    for kind, each in operations.items():
        given = teacher, targets, kind, 1.0, 0.0, None, None, True
        yield Case(
            f"divergence {kind}",
            partial(anew, torch.ops.kompressor.divergence, student, given),
            partial(anew, token_divergence.divergence, student, given),
            2 * student.nbytes,
            each * student.numel(),
            written=student.nbytes,
        )
    few = *top, targets, "forward", 1.0, 0.0, None, True
    yield Case(
        "divergence of 16 bins",
        partial(anew, torch.ops.kompressor.top_k_divergence, student, few),
        partial(anew, token_divergence.top_k_divergence, student, few),
        student.nbytes,
        50 * student.numel(),
        written=student.nbytes,
    )


def anew(work: Callable[..., torch.Tensor], student: torch.Tensor, given: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """On a copy, since the logits are used up: the figures, and the gradient."""
    logits = student.clone()
    return work(logits, *given), logits


def cases(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    weight = (torch.randn(shapes.rows, shapes.columns, device=device) * 0.02).to(dtype)
    yield from rounding(weight)
    yield from codes(weight)
    if device.type == "cpu":
        yield from reading(shapes)
        yield from bitmasks(weight)
        yield from blocks(weight)
    yield from inputs((torch.randn(shapes.tokens, shapes.columns, device=device)).to(dtype))
    yield from transforms(shapes, device)
    yield from hessians(shapes, device)
    yield from column_loops(shapes.square, shapes.square, device)
    yield from divergences(max(1, shapes.tokens // 8), shapes.columns * 4, dtype, device)
    for case in column_loops(shapes.square, shapes.wide, device):
        yield replace(case, reference=None)  # minutes
