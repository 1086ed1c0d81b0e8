"""The Triton kernels in Triton's interpreter against their references: `TRITON_INTERPRET=1 python triton_interpreted.py`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from kompressor_worker import grid
from kompressor_worker.kernels import (
    activations,
    butterflies,
    column_loop,
    eager,
    pruning,
    token_divergence,
    triton_activations,
    triton_column_loop,
    triton_divergence,
    triton_encode,
    triton_gram,
    triton_pruning,
    triton_quantize,
)
from kompressor_worker.schemes import COMPRESSED_TENSORS, SCHEMES, Scheme

ROWS, COLUMNS = 20, 40
"""More than a program has, more than a block has, and no multiple of either."""


def column_loops() -> None:
    """In blocks of 16: each column is interpreted, and 128 in a block say no more."""
    triton_column_loop.BLOCK = 16
    weight = torch.randn(ROWS, COLUMNS) * torch.randn(COLUMNS).exp() * 0.02
    factor = torch.eye(COLUMNS) + torch.randn(COLUMNS, COLUMNS).triu(1) * 0.1
    integers = [Scheme("", "", bits, "int", "group", symmetric, 12) for bits in (3, 8) for symmetric in (True, False)]
    for scheme in [*integers, SCHEMES["FP8_DYNAMIC"], SCHEMES["MXFP4"]]:
        found = grid.grid_of(weight, scheme)
        tiles = torch.arange(COLUMNS, dtype=torch.int32) // scheme.tile((ROWS, COLUMNS))[1]
        given = weight, factor, found.step, found.zero_point, tiles, scheme.type == "float", scheme.bits, 128
        mask = (torch.rand(ROWS, COLUMNS) < 0.5).to(torch.uint8)
        for masked in (given, (*given, mask)):
            same(triton_column_loop.gptq(*masked), column_loop.gptq(*masked))
    for symmetric in (True, False):
        grouped = weight, factor, 12, 4, symmetric, torch.bfloat16
        same(triton_column_loop.gptq_groups(*grouped), column_loop.gptq_groups(*grouped))


def pruning_loops() -> None:
    for keep, of, width in ((0, 0, 100), (2, 4, 64), (1, 3, 96), (5, 7, 126)):
        weight = torch.randn(ROWS, width) * torch.randn(width).exp() * 0.02
        factor = torch.eye(width) + torch.randn(width, width).triu(1) * 0.1
        mask = None if of else (torch.rand(ROWS, width) < 0.5).to(torch.uint8)
        for one, other in zip(
            triton_pruning.prune_columns(weight, factor, mask, keep, of), pruning.prune_columns(weight, factor, mask, keep, of), strict=True
        ):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-6), (keep, of)


def same(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> None:
    """But for ties that the last bit of a sum decides."""
    for one, other in zip(ours, theirs, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert (ours[0].float() != theirs[0].float()).float().mean() < 1e-2
    assert torch.allclose(ours[-1], theirs[-1], rtol=1e-2)


def inputs() -> None:
    for kind in activations.KINDS:
        for dtype in (torch.float32, torch.float16):  # the interpreter's own conversion to bf16 cuts off where the GPU's rounds
            for shape in ((3, 300), (2, 2100), (1, 17)):
                x = (torch.randn(shape) * 3).to(dtype)
                x[0, 3], x[0, 4], x[-1, 5] = 0, -1e-6, torch.nan
                scale = torch.tensor([0.017]) if "tensor" in kind else None
                zero_point = torch.tensor([-9], dtype=torch.int8) if "asym" in kind else None
                shared = torch.tensor([321.0]) if kind == "fp4_local" else None
                ours = triton_activations.fake_quantize(x, kind, scale, zero_point, shared)
                theirs = activations.fake_quantize(x, kind, scale, zero_point, shared)
                assert torch.equal(ours.isnan(), theirs.isnan()), kind
                assert torch.equal(ours.nan_to_num(0), theirs.nan_to_num(0)), kind
    x, by_head = torch.randn(6, 40), torch.tensor([0.01, 0.02, 0.003])
    theirs = activations.fake_quantize(x, "fp8_tensor", by_head, None, None)
    assert torch.equal(triton_activations.fake_quantize(x, "fp8_tensor", by_head, None, None), theirs)


def transforms() -> None:
    for dtype, precision in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        for order, power in ((1, 1), (1, 2), (1, 512), (12, 32)):
            x = torch.randn(3, order * power, dtype=dtype)
            base = None if order == 1 else torch.linalg.qr(torch.randn(order, order, dtype=torch.float64))[0]
            assert torch.allclose(triton_activations.hadamard(x, base), butterflies.hadamard(x, base), atol=precision, rtol=precision)


def grams() -> None:
    for dtype in (torch.float32, torch.float16):  # the interpreter multiplies bf16 as if they were integers
        for rows, n in ((1, 1), (100, 37), (70, 150)):
            x = torch.randn(rows, n).to(dtype)
            sums = torch.full((n, n), 3.0)
            triton_gram.add_gram(sums, x)
            expected = x.double().T @ x.double() + 3.0
            assert torch.equal(sums, sums.T)
            assert float((sums - expected).abs().max() / expected.diagonal().max()) < 1e-6
    wide = torch.randn(5, 2050)  # two sizes of tiles
    sums = torch.zeros(2050, 2050)
    triton_gram.add_gram(sums, wide)
    assert torch.allclose(sums, wide.T @ wide, atol=1e-5)


def equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def weights() -> None:
    """Round to nearest in every scheme, and back; the codes on their own packed and priced."""
    odd = [SCHEMES["W4A16"].with_group_size(-1), SCHEMES["W3A16"].with_group_size(40), SCHEMES["W4A16_ASYM"].with_group_size(24)]
    for number, scheme in enumerate([*COMPRESSED_TENSORS.values(), *odd]):
        shape = (130, 300) if scheme.block else (5, 544)
        weight = torch.randn(shape) * torch.randn(shape[1]).exp() * 0.02
        weight[0, :32], weight[1, 5] = 0, -1e-6
        weight = weight.to((torch.float32, torch.float16, torch.bfloat16)[number % 3])
        most = weight.abs().max().float().reshape(1)
        shared = {"tensor": most, "tensor_group": grid.global_scale(most)}.get(scheme.strategy)
        ours = triton_quantize.quantize(weight, scheme.name, scheme.group_size or -1, shared)
        theirs = eager.tensors(eager.quantize(weight, scheme, shared))
        assert all(map(equal, ours[:3], theirs[:3])), scheme
        assert torch.allclose(ours[3], theirs[3], rtol=1e-9), scheme
        found, tile = grid.grid_of(weight, scheme, shared), scheme.tile(shape)
        wide = grid.quantize(weight, found, scheme)
        codes = wide.to(torch.float8_e4m3fn) if wide.dtype is torch.float32 else wide
        if scheme.format in eager.PACKED:
            assert equal(triton_encode.pack(codes, scheme.bits), ours[0])
        assert torch.allclose(triton_encode.code_errors(weight, codes, found.step, found.zero_point, tile), theirs[3][:2], rtol=1e-9)
        given = ours[0], scheme.bits, shape[1], found.step, found.zero_point, tile, torch.float16
        assert equal(triton_encode.dequantize(*given), eager.dequantize(*given)), scheme


def packing() -> None:
    for bits in range(2, 9):
        for columns in (7, 33, 131):
            codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (5, columns)).to(torch.int8)
            packed = triton_encode.pack(codes, bits)
            assert equal(packed, eager.pack(codes, bits))
            seen = triton_encode.dequantize(packed, bits, columns, torch.full((5, 1), 0.5), None, (1, columns), torch.float32)
            assert torch.equal(seen, codes * 0.5)


def damaged() -> None:
    for shape in ((3, 20000), (130, 300)):
        weight = torch.randn(shape)
        assert triton_quantize.amax(weight).tolist() == list(eager.amax(weight))
        weight[0, 0] = weight[-1, -1] = torch.nan
        weight[1, 200], weight[1, 201] = torch.inf, -torch.inf
        assert triton_quantize.amax(weight).tolist() == list(eager.amax(weight))
        for scheme in ("W8A8", "FP8_BLOCK", "FP8"):
            assert triton_quantize.quantize(weight[:, :300].contiguous(), scheme, -1, torch.ones(1))[3][2] == 4 - (shape[1] > 300)


def divergences() -> None:
    """Of all of a teacher's logits, of none, and of its most likely tokens; a vocabulary of more than one chunk, which it does not fill."""
    for number, kind in enumerate(triton_divergence.KINDS):
        for dtype, count, temperature, labels, cap in (
            (torch.float32, 5001, 1.0, 0.0, None),
            (torch.float32, 300, 2.5, 0.3, 6.0),
            (torch.float16, 300, 0.7, 1.0, None),
        ):
            student, teacher = ((torch.randn(4, count) * 3).to(dtype) for _ in range(2))
            targets = torch.tensor([7, -100, count - 1, number])
            for theirs in (teacher, None):
                whole = theirs, targets, kind, temperature, labels, cap, 5.0 if cap else None
                close_to(triton_divergence.divergence, token_divergence.divergence, student, *whole)
            log_p = teacher.float().log_softmax(1)
            most, indices = log_p.topk(9, 1)
            rest = log_p.scatter(1, indices, -torch.inf).logsumexp(1)
            targets[3] = indices[3, 2]
            some = indices.to(torch.int32), most.contiguous(), rest, targets, kind, temperature, labels, cap
            close_to(triton_divergence.top_k_divergence, token_divergence.top_k_divergence, student, *some)


def close_to(ours: Callable[..., torch.Tensor], theirs: Callable[..., torch.Tensor], student: torch.Tensor, *given: Any) -> None:
    """The figures, and the gradient that stands where the logits were; these stay where no gradient is wanted."""
    one, other, kept = student.clone(), student.clone(), student.clone()
    wanted = theirs(other, *given, True)
    assert torch.allclose(ours(one, *given, True), wanted, rtol=1e-4, atol=1e-4), given
    precision = 1e-5 if student.dtype is torch.float32 else 1e-3
    assert float((one.double() - other.double()).norm()) <= precision * float(other.double().norm()), given
    if len(given) == 7:  # `top_k_divergence` may use the logits' place
        assert torch.allclose(ours(kept, *given, False), wanted, rtol=1e-4, atol=1e-4) and torch.equal(kept, student)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    torch.manual_seed(0)
    column_loops()
    pruning_loops()
    inputs()
    transforms()
    grams()
    weights()
    packing()
    damaged()
    torch.manual_seed(0)  # its bounds are not for just any draw
    divergences()
