"""The kernels that calibration and evaluation need: against their references, plain fp64 arithmetic and compressed-tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from ctypes import CDLL
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kompressor_worker import grid, kernels
from kompressor_worker.grid import Grid
from kompressor_worker.kernels import activations, build, butterflies, clip_search, column_loop, compiled, eager, gram
from kompressor_worker.schemes import SCHEMES, Scheme

quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
INTEGERS = [Scheme("", "", bits, "int", "group", symmetric, 40) for bits in (2, 3, 4, 5, 8) for symmetric in (True, False)]
FLOATS = [SCHEMES["FP8"], SCHEMES["FP8_DYNAMIC"], SCHEMES["FP8_BLOCK"], SCHEMES["MXFP4"], SCHEMES["NVFP4A16"]]


@pytest.fixture(scope="module")
def lib() -> CDLL:
    if (found := build.library()) is None:
        pytest.skip("no C++ compiler on this machine")
    return found


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def layer(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, U of its input's Hessian and the input: correlated, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    weight[:, :: max(1, columns // 3)] *= 6  # so that clamping has something to do where the grid does not reach
    x = torch.randn(2 * columns + 8, columns, generator=generator, dtype=torch.float64)
    x = x @ (torch.randn(columns, columns, generator=generator, dtype=torch.float64) * 0.3 + torch.eye(columns, dtype=torch.float64))
    hessian = x.T @ x
    hessian += torch.eye(columns, dtype=torch.float64) * hessian.diagonal().mean() * 0.01
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    return weight, factor.float().contiguous(), x


def of_range(weight: torch.Tensor, scheme: Scheme) -> Grid:
    return grid.grid_of(weight, scheme, grid.global_scale(weight.abs().max()) if scheme.strategy == "tensor_group" else None)


def textbook(weight: torch.Tensor, factor: torch.Tensor, found: Grid, scheme: Scheme, tiles: torch.Tensor, exact: bool) -> torch.Tensor:
    """Codes by the paper's algorithm without blocks. `exact`: every update rounded to fp32 once, as by a fused multiply-add."""
    rows = weight.shape[0]
    work, u = weight.double(), factor.double()
    step, zero = (
        None if g is None else g.repeat_interleave(scheme.tile(weight.shape)[0], 0)[:rows].double() for g in (found.step, found.zero_point)
    )
    codes = torch.empty_like(work)
    for j, tile in enumerate(tiles.tolist()):
        width, at = step[:, tile], torch.zeros(rows) if zero is None else zero[:, tile]
        value = (work[:, j].float() / width.float() + at.float()).double()  # in fp32: a group's largest value is a tie
        if scheme.type == "int":
            codes[:, j] = value.clamp(-(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1).round()
        elif scheme.bits == 8:
            codes[:, j] = value.float().clamp(-448, 448).to(torch.float8_e4m3fn).double()
        else:
            codes[:, j] = grid.round_to_fp4(value.float()).double()
        error = work[:, j] - (codes[:, j] - at) * width
        if exact:
            quantised = ((codes[:, j] - at).float() * width.float()).float()
            error = ((work[:, j].float() - quantised) / factor[j, j]).double()
        else:
            error = error / u[j, j]
        work[:, j + 1 :] -= error[:, None] * u[j, j + 1 :]
        if exact:
            work = work.float().double()
    return codes


@pytest.mark.parametrize("scheme", INTEGERS + FLOATS, ids=lambda s: s.name or f"{s.bits}-{'sym' if s.symmetric else 'asym'}")
@quick
@given(
    seed=st.integers(0, 2**31), rows=st.sampled_from([1, 7, 33, 70]), columns=st.sampled_from([1, 30, 96, 131, 300]), ordered=st.booleans()
)
def test_compiled_gptq_is_the_textbooks_in_fp32(lib: CDLL, scheme: Scheme, seed: int, rows: int, columns: int, ordered: bool) -> None:
    """Bit for bit, with columns in any order, and the loss is what the codes say."""
    weight, factor, _ = layer(rows, columns, seed)
    found = of_range(weight, scheme)
    tiles = torch.arange(columns) // scheme.tile(weight.shape)[1]
    if ordered:
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
        weight, tiles = weight[:, order], tiles[order]
    codes, loss = kernels.gptq(weight, factor, found, scheme, tiles)
    expected = textbook(weight, factor, found, scheme, tiles, exact=True)
    assert torch.equal(codes.double(), expected)
    # H^-1 = U^T U: the loss is (w - q) H (w - q)^T
    if columns > 1:
        wide, zero = scheme.tile(weight.shape)[0], found.zero_point
        step = found.step.repeat_interleave(wide, 0)[:rows][:, tiles].double()
        value = codes.double() - (0 if zero is None else zero.repeat_interleave(wide, 0)[:rows][:, tiles].double())
        residual = (weight.double() - value * step) @ torch.linalg.inv(factor.double())
        assert loss == pytest.approx(float(residual.square().sum()), rel=2e-3)


@pytest.mark.parametrize("scheme", [s for s in INTEGERS if s.bits in (3, 4)] + FLOATS, ids=lambda s: f"{s.name}{s.bits}{s.symmetric}")
@pytest.mark.parametrize("block", [16, 128])
def test_eager_gptq_is_the_textbooks(scheme: Scheme, block: int) -> None:
    weight, factor, _ = layer(48, 200, 3)
    found, tiles = of_range(weight, scheme), torch.arange(200, dtype=torch.int32) // scheme.tile((48, 200))[1]
    height = scheme.tile((48, 200))[0]
    step, zero = (None if g is None else g.repeat_interleave(height, 0)[:48] for g in (found.step, found.zero_point))
    codes, _ = column_loop.gptq(weight, factor, step, zero, tiles, scheme.type == "float", scheme.bits, block)
    expected = textbook(weight, factor, found, scheme, tiles, exact=False)
    assert (codes.double() != expected).float().mean() < 1e-2, "ties that the last bit of a sum decides, and what follows from them"


@pytest.mark.parametrize("scheme", [s for s in INTEGERS if s.bits in (3, 4, 8)], ids=lambda s: f"{s.bits}{s.symmetric}")
@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(1, 40, 40), (33, 300, 32), (40, 300, 40), (20, 520, 256), (5, 100, 130), (9, 50, 7)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_groups_see_updated_weights(lib: CDLL, scheme: Scheme, rows: int, columns: int, group: int, dtype: torch.dtype) -> None:
    """The grid found on the way, given beforehand, gives the same codes; and it is the grid of the weights as they had become."""
    scheme = replace(scheme, group_size=group)
    weight, factor, _ = layer(rows, columns, 5)
    codes, found, loss = kernels.gptq_groups(weight, factor, scheme, dtype)
    given_codes, given_loss = kernels.gptq(weight, factor, found, scheme)
    assert torch.equal(codes, given_codes)
    assert loss == given_loss
    work, u = weight.clone(), factor.double()
    for start in range(0, columns, group):
        stop = min(start + group, columns)
        made = grid.grid_of(work[:, start:stop], replace(scheme, group_size=None, strategy="channel")).scale.to(dtype).float()
        here = found.scale[:, start // group : start // group + 1]
        assert torch.allclose(made, here, rtol=2**-7 if dtype is torch.bfloat16 else 2**-9)
        value = grid.dequantize(
            codes[:, :stop], Grid(found.scale[:, : start // group + 1], _first(found.zero_point, start // group + 1)), scheme
        )
        residual = (weight[:, :stop] - value).double()
        # weights as they are after `stop` columns: w - (w - q)[:stop] U[:stop, :stop]^-1 U[:stop, stop:]
        errors = torch.linalg.solve_triangular(u[:stop, :stop].T, residual.T, upper=False).T
        work = (weight.double() - torch.nn.functional.pad(errors @ u[:stop, stop:], (stop, 0))).float()


def _first(tensor: torch.Tensor | None, count: int) -> torch.Tensor | None:
    return None if tensor is None else tensor[:, :count]


@pytest.mark.parametrize("symmetric", [True, False])
def test_compiled_groups_equal_eager(lib: CDLL, symmetric: bool) -> None:
    weight, factor, _ = layer(40, 256, 6)
    ours = compiled.gptq_groups(lib, weight, factor, 32, 4, symmetric, torch.bfloat16)
    theirs = column_loop.gptq_groups(weight, factor, 32, 4, symmetric, torch.bfloat16)
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    assert (ours[0] != theirs[0]).float().mean() < 2e-3
    assert (ours[1] != theirs[1]).float().mean() < 2e-2


def test_threads_do_not_change_gptq(lib: CDLL, threads: None) -> None:
    weight, factor, _ = layer(700, 260, 7)
    found = of_range(weight, SCHEMES["W4A16"])
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(kernels.gptq(weight, factor, found, SCHEMES["W4A16"]))
    for codes, loss in results[1:]:
        assert torch.equal(codes, results[0][0])
        assert loss == results[0][1]


@pytest.mark.parametrize("name", ["W3A16", "W4A16", "W4A16_ASYM", "FP8_DYNAMIC", "MXFP4", "NVFP4A16"])
def test_gptq_beats_rounding_to_nearest(name: str) -> None:
    weight, factor, x = layer(64, 256, 8)
    scheme = SCHEMES[name]
    found = of_range(weight, scheme)

    def error(codes: torch.Tensor) -> float:
        return float(((grid.dequantize(codes, found, scheme) - weight).double() @ x.T).square().sum())

    assert error(kernels.gptq(weight, factor, found, scheme)[0]) < 0.7 * error(grid.quantize(weight, found, scheme))


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


def inputs(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Activations with outliers, zeros of both signs and a token of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.randn(shape[-1], generator=generator).exp()
    x.view(-1)[:: max(1, x.numel() // 3)] *= 50
    x.view(-1)[::7] *= 0
    if len(x) > 1:
        x[-1] = 0
    return x


def constants(kind: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    made = {"scale": x.abs().max().reshape(1) / 300 + 1e-6} if "tensor" in kind else {}
    if kind == "int8_tensor_asym":
        made["zero_point"] = torch.tensor([-37], dtype=torch.int8)
    if kind == "fp4_local":
        made["global_scale"] = grid.global_scale(x.abs().max() / 2)
    return made


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


@pytest.mark.parametrize("n", [1, 5, 128, 129, 300, 1301])
def test_inverse_factor(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(3 * n, n, generator=generator) * torch.randn(n, generator=generator).exp()
    hessian = x.T @ x
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    factor = kernels.inverse_factor(hessian.clone())
    assert factor is not None
    assert factor.is_contiguous()
    assert torch.equal(factor, factor.triu())
    reference = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True)
    assert ((factor.double() - reference).abs() <= 2e-5 * reference.diagonal()[:, None]).all()


def test_inverse_factor_of_what_has_none() -> None:
    hessian = torch.eye(200)
    hessian[150, 150] = -1
    assert kernels.inverse_factor(hessian.clone()) is None
    hessian[150, 150] = torch.nan
    assert kernels.inverse_factor(hessian.clone()) is None


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


@pytest.mark.parametrize("scheme", [s for s in SCHEMES.values() if s.strategy != "tensor"], ids=lambda s: s.name)
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


@pytest.mark.parametrize("module", ["triton_interpreted.py", "triton_compiled.py"])
def test_triton(module: str) -> None:
    """In a process of its own: whether Triton interprets is settled when it is imported."""
    pytest.importorskip("triton")
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if "interpreted" in module else {})
    done = subprocess.run([sys.executable, str(Path(__file__).with_name(module))], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here; Triton's interpreter and its compiler ran")
def test_cuda_equals_eager() -> None:
    weight, factor, _ = layer(300, 384, 9)
    for scheme in (SCHEMES["W4A16"], SCHEMES["W4A16_ASYM"], SCHEMES["FP8_DYNAMIC"], SCHEMES["NVFP4A16"]):
        found = of_range(weight, scheme)
        moved = Grid(*(None if g is None else g.cuda() for g in (found.scale, found.zero_point, found.global_scale)))  # type: ignore[arg-type]
        codes, _ = kernels.gptq(weight.cuda(), factor.cuda(), moved, scheme)
        expected, _ = kernels.gptq(weight, factor, found, scheme)
        assert (codes.cpu().float() != expected.float()).float().mean() < 1e-2
    for kind in activations.KINDS:
        x = inputs(1, (70, 300)).bfloat16()
        moved_ones = {name: value.cuda() for name, value in constants(kind, x.float()).items()}
        ours = kernels.fake_quantize_input(x.cuda(), kind, **moved_ones)  # type: ignore[arg-type]
        assert torch.equal(ours.cpu(), kernels.fake_quantize_input(x, kind, **constants(kind, x.float())))  # type: ignore[arg-type]
    for name in SCHEMES:
        shared = torch.tensor([300.0])
        half = weight.bfloat16()
        ours, theirs = kernels.quantize(half.cuda(), SCHEMES[name], shared), kernels.quantize(half, SCHEMES[name], shared)
        assert torch.equal(ours.codes.cpu().view(torch.uint8), theirs.codes.view(torch.uint8))
        assert torch.equal(ours.scale.cpu().view(torch.uint8), theirs.scale.view(torch.uint8))
        assert ours.squared_error == pytest.approx(theirs.squared_error, rel=1e-9)
    for dtype in (torch.bfloat16, torch.float32):
        x, sums = torch.randn(1000, 300).to(dtype), torch.zeros(300, 300)
        moved_sums = sums.cuda()
        kernels.add_gram(moved_sums, x.cuda())
        kernels.add_gram(sums, x)
        assert torch.allclose(moved_sums.cpu(), sums, atol=1e-3)
        assert torch.equal(moved_sums, moved_sums.T)
    x = torch.randn(10, 12 * 512, dtype=torch.float64)
    base = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    assert torch.allclose(kernels.hadamard(x.cuda(), base).cpu(), kernels.hadamard(x, base), atol=1e-13)


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
