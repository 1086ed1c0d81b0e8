"""The Triton kernels in Triton's interpreter against their references: `TRITON_INTERPRET=1 python triton_interpreted.py`."""

from __future__ import annotations

import os

import torch

from kompressor_worker import grid
from kompressor_worker.kernels import activations, butterflies, column_loop, triton_activations, triton_column_loop
from kompressor_worker.schemes import SCHEMES, Scheme

ROWS, COLUMNS = 20, 150


def column_loops() -> None:
    weight = torch.randn(ROWS, COLUMNS) * torch.randn(COLUMNS).exp() * 0.02
    factor = torch.eye(COLUMNS) + torch.randn(COLUMNS, COLUMNS).triu(1) * 0.1
    integers = [Scheme("", "", bits, "int", "group", symmetric, 40) for bits in (3, 8) for symmetric in (True, False)]
    for scheme in [*integers, SCHEMES["FP8_DYNAMIC"], SCHEMES["MXFP4"]]:
        found = grid.grid_of(weight, scheme)
        tiles = torch.arange(COLUMNS, dtype=torch.int32) // scheme.tile((ROWS, COLUMNS))[1]
        given = weight, factor, found.step, found.zero_point, tiles, scheme.type == "float", scheme.bits, 128
        same(triton_column_loop.gptq(*given), column_loop.gptq(*given))
    for symmetric in (True, False):
        grouped = weight, factor, 40, 4, symmetric, torch.bfloat16
        same(triton_column_loop.gptq_groups(*grouped), column_loop.gptq_groups(*grouped))


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


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    torch.manual_seed(0)
    column_loops()
    inputs()
    transforms()
