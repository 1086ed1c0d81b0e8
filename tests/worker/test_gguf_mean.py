"""Codes by which a layer's output is right on average: the error of inputs with a mean is less; only codes beside the nearest are used."""

from __future__ import annotations

from ctypes import CDLL

import pytest
import torch
from test_gguf_kernels import EVEN, bell, odd

from kompressor_worker import kernels
from kompressor_worker.kernels import gguf_compiled, gguf_mean

COLUMNS = 512


def inputs(columns: int = COLUMNS) -> torch.Tensor:
    """[2048, columns], whose means are half of what they spread."""
    drawn = torch.Generator().manual_seed(5)
    spread = torch.exp(torch.randn(columns, generator=drawn) / 2)
    return (torch.randn(2048, columns, generator=drawn) + 0.5 * torch.randn(columns, generator=drawn).sign()) * spread


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.square().mean(0), x.mean(0)


@pytest.mark.parametrize("name", EVEN)
def test_outputs_are_right_on_average(name: str) -> None:
    weight, x = bell(64, COLUMNS).bfloat16(), inputs()
    squares, mean = moments(x)
    data = kernels.gguf_quantize(weight, name, squares)[0]
    kept = kernels.gguf_keep_mean(weight, data, name, squares, mean)
    before, after = (x @ (kernels.gguf_dequantize(t, name, COLUMNS, torch.float32) - weight.float()).T for t in (data, kept))
    assert after.mean(0).square().mean() < 0.01 * before.mean(0).square().mean()
    share = float((mean.square().sum() / squares.sum()).item())  # of the error, which goes, for a little more of the rest
    assert after.square().mean() < (1 - 0.6 * share) * before.square().mean()
    codes = [kernels.gguf_codes(t, name, COLUMNS) for t in (data, kept)]
    moved = (codes[1][0].int() - codes[0][0].int()).abs()
    assert 0 < moved.count_nonzero() < moved.numel() / 4 and moved.max() == 1
    assert torch.equal(codes[0][1].scale, codes[1][1].scale) and torch.equal(codes[0][1].centre, codes[1][1].centre)


@pytest.mark.parametrize("name", EVEN)
def test_zeros_keep_their_codes(name: str) -> None:
    weight, (squares, mean) = bell(16, COLUMNS), moments(inputs())
    weight[:, 1::2] = 0
    data = kernels.gguf_quantize(weight, name, squares)[0]
    codes = [kernels.gguf_codes(t, name, COLUMNS)[0] for t in (data, kernels.gguf_keep_mean(weight, data, name, squares, mean))]
    assert torch.equal(codes[0][:, 1::2], codes[1][:, 1::2]) and not torch.equal(*codes)


def test_where_nothing_was_seen_nothing_moves() -> None:
    weight = bell(16, COLUMNS)
    data = kernels.gguf_quantize(weight, "Q4_0")[0]
    for nothing in (0.0, torch.inf, torch.nan):
        assert torch.equal(kernels.gguf_keep_mean(weight, data, "Q4_0", torch.full((COLUMNS,), nothing), torch.zeros(COLUMNS)), data)


@pytest.mark.parametrize("name", EVEN)
def test_compiled_equals_eager(lib: CDLL, name: str) -> None:
    for weight in (bell(3, 1792), bell(21, 512).half(), bell(17, 768).bfloat16(), odd()):  # lanes that are not all filled
        squares, mean = moments(inputs(weight.shape[1]))
        data = kernels.gguf_quantize(weight, name, squares)[0]
        given = weight, data, squares - mean.square(), mean, name
        assert torch.equal(gguf_compiled.keep_mean(lib, *given), gguf_mean.keep_mean(*given))


def test_threads_and_pieces_change_nothing(lib: CDLL, threads: None) -> None:
    weight, (squares, mean) = bell(40, 2048).bfloat16(), moments(inputs(2048))
    data, results = kernels.gguf_quantize(weight, "Q4_K", squares)[0], []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(kernels.gguf_keep_mean(weight, data, "Q4_K", squares, mean))
    results.append(torch.cat([kernels.gguf_keep_mean(weight[n::40], data[n::40], "Q4_K", squares, mean) for n in range(40)]))
    assert all(torch.equal(other, results[0]) for other in results[1:])
