"""GPTQ's column loop and the factor it needs: against their references and the paper's algorithm in fp64."""

from __future__ import annotations

from ctypes import CDLL
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_inputs import layer, of_range

from kompressor_worker import grid, kernels
from kompressor_worker.grid import Grid
from kompressor_worker.kernels import column_loop, compiled
from kompressor_worker.schemes import SCHEMES, Scheme

quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
INTEGERS = [Scheme("", "", bits, "int", "group", symmetric, 40) for bits in (2, 3, 4, 5, 8) for symmetric in (True, False)]
FLOATS = [SCHEMES["FP8"], SCHEMES["FP8_DYNAMIC"], SCHEMES["FP8_BLOCK"], SCHEMES["MXFP4"], SCHEMES["NVFP4A16"]]


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
