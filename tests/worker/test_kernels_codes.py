"""Codes on a grid: as files hold them, and what rounding to a grid costs."""

from __future__ import annotations

from ctypes import CDLL

import pytest
import torch
from kernel_inputs import of_range

from kompressor_worker import grid, kernels
from kompressor_worker.kernels import clip_search, compiled, eager
from kompressor_worker.schemes import COMPRESSED_TENSORS, SCHEMES, Scheme


@pytest.mark.parametrize("scheme", [s for s in COMPRESSED_TENSORS.values() if s.strategy != "tensor"], ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 128), (130, 384), (300, 96)])
def test_chosen_codes_are_stored_as_rounded_ones_are(lib: CDLL, scheme: Scheme, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Codes of the weight's own grid: the file and the errors are those of `kernels.quantize`."""
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    found = of_range(weight, scheme)
    codes = grid.quantize(weight, found, scheme)
    expected = kernels.quantize(weight, scheme, found.global_scale)
    for form in (codes, codes.to(torch.float8_e4m3fn)) if scheme.type == "float" and scheme.bits == 4 else (codes,):
        packed, scale, zero_point = kernels.stored(form, found, scheme, dtype)
        assert torch.equal(packed.view(torch.uint8), expected.codes.view(torch.uint8))
        assert torch.equal(scale.view(torch.uint8), expected.scale.view(torch.uint8))
        assert (zero_point is None) == (expected.zero_point is None)
        assert zero_point is None or torch.equal(zero_point, expected.zero_point)
        seen = grid.dequantize(codes, found, scheme).to(dtype)
        assert torch.equal(kernels.dequantize(packed, shape[1], found, scheme, dtype), seen)
        error, norm = kernels.code_errors(weight, form, found, scheme)
        assert error == pytest.approx(expected.squared_error, rel=1e-9)
        assert norm == pytest.approx(expected.squared_norm, rel=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("columns", [1, 7, 8, 33, 96, 131])
def test_codes_of_any_width_are_packed(lib: CDLL, bits: int, columns: int) -> None:
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (5, columns)).to(torch.int8)
    packed = compiled.pack(lib, codes, bits)
    assert torch.equal(packed, eager.pack(codes, bits))
    seen = compiled.dequantize(lib, packed, bits, columns, torch.full((5, 1), 0.5), None, (1, columns), torch.float32)
    assert torch.equal(seen, codes * 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("scheme", "shape"), [("W4A16", (5, 384)), ("W4A16_ASYM", (33, 256)), ("W8A8", (7, 201)), ("W3A16", (3, 128))])
def test_tile_errors(scheme: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    made = SCHEMES[scheme]
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02 + 0.005).to(dtype)
    rows, tiles = made.scale_shape(shape)
    by_tile = weight.float().view(rows, tiles, -1)
    low, high = by_tile.amin(-1), by_tile.amax(-1)
    grids = [grid.grid_of_range(low * share, high * share, made, torch.float32) for share in (1.0, 0.7, 0.5)]
    found = kernels.tile_errors(weight, grids, made)
    for k, each in enumerate(grids):
        rounded = grid.dequantize(grid.quantize(weight, each, made), each, made).double()
        exact = (rounded - weight.double()).square().view(rows, tiles, -1).sum(-1)
        torch.testing.assert_close(found[k].double(), exact, rtol=2e-4, atol=0)
    step = torch.stack([each.step for each in grids])
    zero_point = None if made.symmetric else torch.stack([each.zero_point.float() for each in grids if each.zero_point is not None])
    reference = clip_search.tile_errors(weight, step, zero_point, *grid.integer_range(made))
    torch.testing.assert_close(found, reference, rtol=2e-6, atol=0)
