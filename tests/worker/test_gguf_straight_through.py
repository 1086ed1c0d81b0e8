"""GGUF's blocks that gradients pass through: what the forward sees is what the format's own library reads, and where gradients go."""

from __future__ import annotations

import gguf
import numpy
import pytest
import torch
from gguf.quants import dequantize
from torch import Tensor

from kompressor_worker import kernels
from kompressor_worker.errors import BadNumerics
from kompressor_worker.formats.gguf_types import TYPES, type_of
from kompressor_worker.gguf_straight_through import FakeBlocks
from kompressor_worker.layout import LinearLayout
from kompressor_worker.schemes import SCHEMES, Scheme

GGUF = sorted(name for name, scheme in SCHEMES.items() if scheme.format == "gguf")
SHAPE = (24, 512)
BLOCKS = [name for name in GGUF if type_of(SCHEMES[name]).levels]


def weight_of(seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    weight = (torch.randn(SHAPE) * torch.linspace(0.01, 0.3, SHAPE[1])).bfloat16()
    weight[3, 32:96] = 0  # groups whose step is zero
    return weight


def fake_of(name: str, weight: Tensor) -> tuple[FakeBlocks, Scheme, LinearLayout]:
    linear = LinearLayout("layer", SHAPE, "BF16")
    return FakeBlocks.found(linear, SCHEMES[name], weight), SCHEMES[name], linear


def read(data: Tensor, scheme: Scheme) -> Tensor:
    """By the format's own library, fp32."""
    kind = gguf.GGMLQuantizationType[type_of(scheme).name]
    return torch.from_numpy(numpy.ascontiguousarray(dequantize(data.numpy(), kind))).view(SHAPE)


@pytest.mark.parametrize("name", GGUF)
def test_what_is_encoded_is_read_as_the_forward_saw_it(name: str) -> None:
    """Bit for bit: at once as rounding to nearest has it, and once weights have moved."""
    weight = weight_of()
    fake, scheme, linear = fake_of(name, weight)
    nearest = read(kernels.gguf_quantize(weight, type_of(scheme).name, unbiased=False)[0], scheme)
    first = fake.weight(weight)
    assert first.dtype is torch.bfloat16
    assert (first.float() - weight.float()).square().sum() <= 1.0001 * (nearest.bfloat16().float() - weight.float()).square().sum()
    moved = weight.float() + torch.randn(SHAPE) * 0.05
    for source in (weight, moved, moved.bfloat16()):
        encoded = fake.encode(source, weight)
        data = encoded.tensors[linear.weight]
        assert data.dtype is torch.uint8 and data.is_contiguous()
        values = read(data, scheme)
        assert torch.equal(values.bfloat16(), fake.weight(source))
        assert encoded.squared_error == pytest.approx(float((values.double() - weight.double()).square().sum()), rel=1e-6)
    rows = torch.tensor([5, 3, 5])
    assert torch.equal(fake.weight(moved[rows], rows), fake.weight(moved)[rows])


@pytest.mark.parametrize("name", BLOCKS)
def test_no_level_is_nearer(name: str) -> None:
    """Each value against all that its group has."""
    weight = weight_of()
    fake, scheme, _ = fake_of(name, weight)
    moved = weight.float() * 1.3
    levels = torch.tensor(sorted(set(TYPES[type_of(scheme).name].levels)), dtype=torch.float32)
    step, low = (x.repeat_interleave(fake.kind.group, 1)[..., None] for x in (fake.step, fake.low))
    least = (levels * step - low - moved[..., None]).abs().amin(-1)
    assert torch.allclose((fake.values(moved, None) - moved).abs(), least, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", GGUF)
def test_gradients_pass_where_nothing_is_cut_off(name: str) -> None:
    weight = weight_of()
    fake, _, _ = fake_of(name, weight)
    moved = (weight.float() * 3).requires_grad_()
    upstream = torch.randn(SHAPE)
    (fake.weight(moved).float() * upstream).sum().backward()
    assert moved.grad is not None
    if fake.plain is not None:
        assert torch.equal(moved.grad, upstream.bfloat16().float())
        return
    passed = moved.grad != 0
    assert torch.equal(moved.grad[passed], upstream.bfloat16().float()[passed]) and 0.2 < passed.float().mean() < 1
    half = fake.step.abs().repeat_interleave(fake.kind.group, 1) * max(fake._gaps) / 2
    off = (fake.values(moved.detach(), None) - moved.detach()).abs()
    assert (off[passed] <= half[passed] * 1.001).all() and (off[~passed] >= half[~passed] * 0.249).all()


@pytest.mark.parametrize("name", BLOCKS)
def test_a_weight_begins_on_the_code_that_it_has(name: str) -> None:
    """Also where a pass has chosen another than the nearest; and two steps further, of the shorter ones beside it, it is on another."""
    weight = weight_of()
    fake, _, linear = fake_of(name, weight)
    other = fake.encode(weight.float() + fake.step.abs().repeat_interleave(fake.kind.group, 1) * torch.randn(SHAPE)).tensors
    began, unit = fake.begins(weight, other)
    assert torch.equal(fake.encode(began).tensors[linear.weight], other[linear.weight])
    assert (unit >= 0).all() and (unit[3, 32:64] == 0).all() == (fake.step[3, 32 // fake.kind.group] == 0)
    least, most = (fake.values(torch.full(SHAPE, end), None) for end in (-1e6, 1e6))
    free = (began >= torch.minimum(least, most)) & (began + 2 * unit <= torch.maximum(least, most)) & (unit > 0)
    assert free.float().mean() > 0.1 and (fake.values(began + 2 * unit, None) > fake.values(began, None))[free].all()


def test_what_is_no_number_is_refused() -> None:
    weight = weight_of()
    weight[1, 2] = torch.nan
    with pytest.raises(BadNumerics, match=r"layer\.weight: 1 of 12288 values"):
        fake_of("Q4_K", weight)
