"""The kernels on activations: rounding of inputs and of the KV cache, the Hadamard transform, sums of x^T x."""

from __future__ import annotations

from ctypes import CDLL

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import constants, inputs

from kompressor_worker import kernels
from kompressor_worker.kernels import activations, butterflies, gram

quick = settings(max_examples=25)
ARGS = {
    "int8_token": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
    "fp8_token": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    "fp8_group": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True},
    "int8_tensor": {"num_bits": 8, "type": "int", "strategy": "tensor"},
    "int8_tensor_asym": {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": False},
    "fp8_tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "fp4_local": {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "dynamic": "local",
        "scale_dtype": "torch.float8_e4m3fn",
        "zp_dtype": "torch.float8_e4m3fn",
    },
}


@pytest.mark.parametrize("kind", activations.KINDS)
@quick
@given(seed=st.integers(0, 2**31), shape=st.sampled_from([(1, 1, 128), (2, 3, 256), (5, 1, 384), (4, 40, 128)]))
def test_inputs_are_rounded_as_compressed_tensors_does(kind: str, seed: int, shape: tuple[int, ...]) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x, args = inputs(seed, shape), QuantizationArgs(**ARGS[kind])
    given_ones = constants(kind, x)
    shared = given_ones.get("global_scale")
    if args.dynamic:
        scale, zero_point = compute_dynamic_scales_and_zp(x, args, torch.nn.Module(), shared)
    else:
        scale, zero_point = given_ones["scale"], given_ones.get("zero_point")
    theirs = fake_quantize(x, scale, zero_point, args, shared)
    assert torch.equal(kernels.fake_quantize_input(x, kind, **given_ones), theirs)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", activations.KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@quick
@given(seed=st.integers(0, 2**31), shape=st.sampled_from([(1, 1), (3, 17), (5, 130), (9, 1000), (70, 48)]), nan=st.booleans())
def test_compiled_inputs_equal_eager(lib: CDLL, kind: str, dtype: torch.dtype, seed: int, shape: tuple[int, int], nan: bool) -> None:
    x = inputs(seed, shape).clamp(-6e4, 6e4).to(dtype)
    given_ones = constants(kind, x.float())
    if nan:
        x[0, -1] = torch.nan
    ours = kernels.fake_quantize_input(x, kind, **given_ones)  # type: ignore[arg-type]
    theirs = activations.fake_quantize(x, kind, *(given_ones.get(name) for name in ("scale", "zero_point", "global_scale")))
    assert ours.dtype == dtype
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert bool(ours.isnan().any()) == nan
    assert torch.equal(ours.nan_to_num(0), theirs.nan_to_num(0))


@pytest.mark.parametrize("heads", [1, 3])
def test_cache_has_a_scale_for_each_head(heads: int) -> None:
    x = torch.randn(2, 5, 3, 7).transpose(1, 2)  # as attention has them: not contiguous
    scale = torch.rand(heads, 1, 1) * 0.01 if heads > 1 else torch.tensor([0.004])
    expected = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(kernels.fake_quantize_kv(x, scale), expected)
    assert (expected != x).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("order", "power"), [(1, 1), (1, 2), (1, 8), (1, 16), (1, 512), (12, 1), (12, 4), (20, 32), (28, 64), (43, 8)])
def test_hadamard(lib: CDLL, threads: None, dtype: torch.dtype, order: int, power: int) -> None:
    """The same bits compiled and eager, on one thread and on three; and it is the product with the matrix."""
    generator = torch.Generator().manual_seed(order * power)
    base = torch.linalg.qr(torch.randn(order, order, dtype=torch.float64, generator=generator))[0]
    x = torch.randn(300, order * power, dtype=dtype, generator=generator)
    expected = butterflies.hadamard(x, None if order == 1 else base)
    for count in (1, 3):
        torch.set_num_threads(count)
        assert torch.equal(kernels.hadamard(x, None if order == 1 else base), expected)
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    while len(sylvester) < power:
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), sylvester)
    matrix = torch.kron((base if order > 1 else torch.ones(1, 1, dtype=torch.float64)).contiguous(), sylvester) / power**0.5
    assert torch.allclose(expected.double(), x.double() @ matrix, atol=1e-5 if dtype is torch.float32 else 1e-13)
    assert torch.allclose(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (3, 5), (100, 37), (1027, 96), (600, 300)])
def test_gram(lib: CDLL, threads: None, dtype: torch.dtype, rows: int, n: int) -> None:
    """Compiled, eager and fp64; added to what is there, symmetric, the same bits on any number of threads."""
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    before = torch.full((n, n), 3.0)
    expected = x.double().T @ x.double() + 3.0
    made = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        made.append(before.clone())
        kernels.add_gram(made[-1], x)
    eager_sums = before.clone()
    gram.add_gram(eager_sums, x)
    assert torch.equal(made[0], made[0].T)
    for sums in (*made, eager_sums):
        assert float((sums - expected).abs().max() / expected.diagonal().max()) < 4e-6
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
