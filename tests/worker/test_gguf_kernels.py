"""GGUF's tensor types: decoded as the format's own library does, quantised with little error, the same bytes from every implementation."""

from __future__ import annotations

from ctypes import CDLL

import gguf
import numpy as np
import pytest
import torch

from kompressor_worker import kernels
from kompressor_worker.formats.gguf_types import TYPES, fitting, row_bytes, type_of
from kompressor_worker.grid import integer_range
from kompressor_worker.kernels import gguf_compiled, gguf_eager
from kompressor_worker.schemes import COMPRESSED_TENSORS, GGUF, SCHEMES

PACKED = [name for name, kind in TYPES.items() if kind.planes]
EVEN = [name for name in PACKED if TYPES[name].even]
RELATIVE = {
    "Q8_0": 0.0055, "Q6_K": 0.0171, "Q5_K": 0.0358, "Q4_K": 0.0715, "Q3_K": 0.146, "Q2_K": 0.265, "Q5_0": 0.0407, "Q5_1": 0.0347,
    "Q4_0": 0.0817, "IQ4_NL": 0.0757, "MXFP4": 0.1135,
}  # fmt: skip
"""The error of bell-shaped weights, in shares of their norm: llama.cpp's is larger."""


def bell(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def decoded(data: torch.Tensor, name: str) -> torch.Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[name]))


def test_types_are_the_formats() -> None:
    for name, kind in TYPES.items():
        number = gguf.GGMLQuantizationType[name]
        assert (kind.number, (kind.block, kind.nbytes)) == (number, gguf.GGML_QUANT_SIZES[number])
    assert {type_of(scheme).name for scheme in GGUF.values()} == set(TYPES) - {"F32"}
    for scheme in GGUF.values():
        kind = type_of(scheme)
        if kind.planes:
            assert (scheme.bits, scheme.group_size, scheme.type == "int") == (kind.bits, kind.group, kind.even)
            assert scheme.symmetric == (kind.minimum is None)
    assert not set(COMPRESSED_TENSORS) & set(GGUF) and len(SCHEMES) == len(COMPRESSED_TENSORS) + len(GGUF)


def test_rows_that_do_not_fit_fall_back() -> None:
    assert [fitting(name, 512) for name in TYPES] == list(TYPES)
    narrow = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
    assert {name: fitting(name, 96) for name in narrow} == narrow
    assert {fitting(name, 48) for name in PACKED} == {"F16"}
    assert row_bytes("Q4_K", 512) == 288 and row_bytes("BF16", 7) == 14


@pytest.mark.parametrize("name", [*PACKED, "F16", "BF16"])
def test_decodes_any_bytes_as_the_formats_library(name: str) -> None:
    kind = TYPES[name]
    columns = 2 * kind.block
    data = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (33, row_bytes(name, columns)), dtype=np.uint8))
    wanted = decoded(data, name)
    for ours in (gguf_eager.dequantize(data, columns, name, torch.float32), kernels.gguf_dequantize(data, name, columns, torch.float32)):
        assert torch.equal(ours.nan_to_num(123.0), wanted.nan_to_num(123.0))
        assert torch.equal(ours.signbit() & ~ours.isnan(), wanted.signbit() & ~wanted.isnan())


@pytest.mark.parametrize("name", PACKED)
def test_little_is_lost(name: str) -> None:
    weight = bell(16, 512).bfloat16()
    data, error, norm, bad = kernels.gguf_quantize(weight, name, unbiased=False)
    off = (decoded(data, name) - weight.float()).double().square().sum()
    assert bad == 0 and error == pytest.approx(float(off), rel=1e-9)
    assert norm == pytest.approx(float(weight.double().square().sum()), rel=1e-9)
    assert (error / norm) ** 0.5 < RELATIVE[name]
    assert kernels.gguf_errors(weight, data, name) == pytest.approx((error, norm), rel=1e-9)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_block_is_shorter_than_it_was(name: str, weighted: bool) -> None:
    """Along itself; for that all of its values become larger, and no more is lost than the part that they were too short."""
    weight = bell(16, 512)
    importance = torch.rand(512, generator=torch.Generator().manual_seed(1)) + 0.1 if weighted else None
    made = [decoded(kernels.gguf_quantize(weight, name, importance, unbiased=unbiased)[0], name) for unbiased in (False, True)]
    shares = torch.ones(512) if importance is None else importance
    x, short, long = ((shares * weight * t).view(-1, TYPES[name].block).sum(1) for t in (weight, *made))
    if name in ("Q8_0", "MXFP4"):  # shorter by less than fp16 tells, and powers of two
        assert torch.equal(*made)
        return
    assert (long / x - 1).abs().max() < 3e-3 and (short / x).mean() < 1  # scales so small have few digits in fp16
    lost = [float((shares * (t - weight).square()).sum() / x.sum()) for t in made]
    assert lost[1] < lost[0] / (1 - lost[0]) * 1.02
    longer = (made[1] / made[0]).view(-1, TYPES[name].block)
    if TYPES[name].minimum is None:  # whose own scale has digits of its own
        assert (longer.nan_to_num(0).amax(1) - longer.nan_to_num(9).amin(1)).abs().max() < 1e-5


@pytest.mark.parametrize("name", PACKED)
def test_importance_moves_the_error(name: str) -> None:
    weight, importance = bell(16, 512), torch.exp(2 * torch.randn(512, generator=torch.Generator().manual_seed(1)))
    data = [kernels.gguf_quantize(weight, name, by)[0] for by in (None, importance)]
    plain, weighted = (kernels.gguf_dequantize(made, name, 512, torch.float32) for made in data)
    cost = [float(((made - weight).square() * importance).sum()) for made in (plain, weighted)]
    if name == "Q8_0":  # which has one scale, that of its largest magnitude
        assert cost[1] == cost[0]
    else:
        assert cost[1] < (1.0 if name == "MXFP4" else 0.97) * cost[0]
    scaled = kernels.gguf_quantize(weight, name, importance * 2.0**20)[0]
    assert torch.equal(scaled, kernels.gguf_quantize(weight, name, importance)[0])
    for nothing in (torch.zeros(512), torch.full((512,), torch.inf)):
        assert torch.equal(kernels.gguf_quantize(weight, name, nothing)[0], kernels.gguf_quantize(weight, name)[0])


@pytest.mark.parametrize("name", EVEN)
def test_codes_and_grid_make_the_same_bytes(name: str) -> None:
    weight = bell(16, 512)
    data = kernels.gguf_quantize(weight, name, unbiased=False)[0]
    found = kernels.gguf_grid(weight, name)
    codes, same = kernels.gguf_codes(data, name, 512)
    assert torch.equal(found.data, data) and torch.equal(found.scale, same.scale) and torch.equal(found.centre, same.centre)
    assert torch.equal(kernels.gguf_pack(codes, found, name), data)
    each = 512 // found.scale.shape[1]
    value = found.scale.repeat_interleave(each, 1) * codes + found.centre.repeat_interleave(each, 1)
    assert torch.allclose(value, decoded(data, name), atol=1e-7)
    bottom, top = integer_range(next(scheme for scheme in GGUF.values() if type_of(scheme).name == name))
    other = torch.randint(bottom, top + 1, codes.shape, generator=torch.Generator().manual_seed(2), dtype=torch.int8)
    assert (codes.min() >= bottom) and (codes.max() <= top)
    changed = kernels.gguf_pack(other, found, name)
    back, after = kernels.gguf_codes(changed, name, 512)
    assert torch.equal(back, other) and torch.equal(after.scale, found.scale) and torch.equal(after.centre, found.centre)


def odd() -> torch.Tensor:
    """Rows of zeros, of one value, of tiny and of huge ones, of one sign, one that sticks out, of no two alike magnitudes."""
    weight = bell(14, 512)
    weight[0] = 0
    weight[1], weight[2] = 0.25, -0.25
    weight[3] *= 1e-6
    weight[4] *= 1e5
    weight[5, 100] = 1e4
    weight[6], weight[7] = weight[6].abs() + 0.01, -weight[7].abs() - 0.01
    weight[8] *= 1e-30
    weight[9, 300] = 1e30
    weight[10] = torch.linspace(-1, 1, 512)
    weight[11, 1::2] = 0
    weight[12] = weight[12].sign() * 0.01
    return weight


@pytest.mark.parametrize("name", [*PACKED, "F16", "BF16"])
def test_odd_rows(name: str) -> None:
    weight = odd()
    made, nearest = (decoded(kernels.gguf_quantize(weight, name, unbiased=unbiased)[0], name) for unbiased in (True, False))
    if name != "F16":  # what is beyond its range is infinite
        assert made.isfinite().all()
    assert not made[0].any()
    ordinary = [1, 2, 6, 7, 10, 11, 12, 13]
    share = ((nearest - weight).square().sum(1) / weight.square().sum(1).clamp(min=1e-30))[ordinary].sqrt()
    assert share.max() < {"Q2_K": 0.27, "MXFP4": 0.18}.get(name, 0.15)
    assert kernels.gguf_quantize(weight[:0], name)[0].shape == (0, row_bytes(name, 512))
    weight[3, 7], weight[5, 9] = torch.nan, torch.inf
    assert kernels.gguf_quantize(weight, name)[3] == 2


def of_any_bits() -> torch.Tensor:
    bits = torch.randint(-(1 << 15), 1 << 15, (8, 512), dtype=torch.int16, generator=torch.Generator().manual_seed(3))
    return bits.view(torch.bfloat16).nan_to_num(0, 0, 0)


@pytest.mark.parametrize("name", PACKED)
def test_compiled_equals_eager(lib: CDLL, name: str) -> None:
    for weight in (bell(3, 1792), bell(5, 512).half(), bell(3, 2816).bfloat16(), odd(), of_any_bits()):  # lanes that are not all filled
        columns = weight.shape[1]
        for importance in (None, torch.exp(torch.randn(columns, generator=torch.Generator().manual_seed(1)))):
            for unbiased in (False, True):
                data, stats = gguf_eager.quantize(weight, importance, name, unbiased)
                ours, figures = gguf_compiled.quantize(lib, weight, importance, name, unbiased)
                assert torch.equal(ours, data)
                assert torch.allclose(figures, stats, rtol=1e-9)
        made = gguf_compiled.dequantize(lib, data, columns, name, weight.dtype)
        assert torch.equal(made.view(torch.uint8), gguf_eager.dequantize(data, columns, name, weight.dtype).view(torch.uint8))
        assert torch.allclose(gguf_compiled.errors(lib, weight, data, name), stats[:2], rtol=1e-9)
        if TYPES[name].even:
            found = gguf_compiled.codes(lib, data, columns, name)
            assert all(map(torch.equal, found, gguf_eager.codes(data, columns, name)))
            assert torch.equal(gguf_compiled.pack(lib, data, found[0] ^ 1, name), gguf_eager.pack(data, found[0] ^ 1, name))


@pytest.mark.parametrize("name", ["Q4_K", "Q3_K", "Q4_0", "MXFP4"])
def test_threads_change_nothing(lib: CDLL, threads: None, name: str) -> None:
    weight, results = bell(64, 2048).bfloat16(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        data, stats = gguf_compiled.quantize(lib, weight, None, name, True)
        results.append((data, stats, gguf_compiled.dequantize(lib, data, 2048, name, torch.float32)))
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))
