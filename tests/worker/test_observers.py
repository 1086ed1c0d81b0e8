"""Ranges of static inputs: against a search of all ranges in fp64, value by value, and against min-max where there are outliers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kompressor_worker import grid, observers
from kompressor_worker.observers import input_grid, range_of
from kompressor_worker.schemes import SCHEMES, Scheme
from kompressor_worker.statistics import bf16_histogram

STATIC = ["W8A8_STATIC", "W8A8_STATIC_ASYM", "FP8"]
OBSERVERS = ["minmax", "percentile", "mse", "entropy"]


def drawn(kind: str, n: int = 20_000, seed: int = 0) -> Tensor:
    """bf16 values: bell-shaped; with heavy tails; with a few far outliers; one-sided, as an activation function leaves them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator)
    match kind:
        case "laplace":
            x = x.sign() * -torch.rand(n, generator=generator).clamp(min=1e-9).log()
        case "outliers":
            x[:3] = torch.tensor([23.0, -19.0, 21.0])
        case "silu":
            x = torch.nn.functional.silu(2 * x)
        case "relu":
            x = x.clamp(min=0.0)
    return x.bfloat16()


def error(x: Tensor, low: Tensor, high: Tensor, quantiser: Scheme) -> float:
    """Mean squared error of the values themselves, rounded by plain fp64 arithmetic on the grid that would be stored."""
    found = grid.grid_of_range(low, high, quantiser, torch.bfloat16)
    scale = found.scale.double()
    zero_point = 0.0 if found.zero_point is None else found.zero_point.double()
    codes = x.double() / scale
    codes = e4m3(codes) if quantiser.type == "float" else (codes + zero_point).round().clamp(-128, 127) - zero_point
    return float((codes * scale - x.double()).square().mean())


def e4m3(x: Tensor) -> Tensor:
    """fp64 to the nearest E4M3 value, from what the format is: 3 bits of mantissa, exponents from -6, largest 448."""
    x = x.clamp(-448.0, 448.0)
    step = torch.exp2(x.abs().clamp(min=2.0**-6).log2().floor() - 3)
    return (x / step).round() * step


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("kind", ["normal", "laplace", "outliers", "silu", "relu"])
def test_mse_is_as_good_as_every_range_tried(name: str, kind: str) -> None:
    x, quantiser = drawn(kind), input_grid(SCHEMES[name])
    low, high = x.float().aminmax()
    most = x.float().abs().max()
    shares = torch.arange(1, 201) / 200
    ranges = (
        [(-most * s, most * s) for s in shares]
        if quantiser.symmetric
        else [(low * a, high * b) for a in shares[9::10] for b in shares[9::10]]
    )
    best = min(error(x, a, b, quantiser) for a, b in ranges)
    ours = error(x, *range_of(bf16_histogram(x), quantiser, "mse", torch.bfloat16), quantiser)
    assert ours <= best * 1.01
    assert ours <= error(x, low, high, quantiser) * 1.0001  # min-max is among what is tried


@pytest.mark.parametrize("name", ["W8A8_STATIC", "W8A8_STATIC_ASYM"])
def test_searches_beat_minmax_where_there_are_outliers(name: str) -> None:
    quantiser = input_grid(SCHEMES[name])
    for kind, gain in (("normal", 1.0), ("laplace", 0.75), ("outliers", 0.8)):
        x = drawn(kind, 1 << 19)
        errors = {o: error(x, *range_of(bf16_histogram(x), quantiser, o, torch.bfloat16), quantiser) for o in OBSERVERS}  # type: ignore[arg-type]
        assert errors["mse"] < gain * errors["minmax"], kind
        assert errors["entropy"] <= gain * errors["minmax"], kind
        assert errors["mse"] <= min(errors.values()) * 1.01, kind


def plain_divergence(x: Tensor, low: float, high: float, quantiser: Scheme) -> float:
    """The same divergence, code by code and value by value, in Python's floats."""
    import math

    values, counts = x[x != 0].double().unique(return_counts=True)
    scale = float(grid.grid_of_range(torch.tensor(low), torch.tensor(high), quantiser, torch.bfloat16).scale)
    cells: dict[float, list[tuple[float, float]]] = {}
    beyond: dict[float, int] = {}
    ends = (-464.0, 464.0) if quantiser.type == "float" else (-128.5, 127.5)
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        scaled = torch.tensor(value / scale, dtype=torch.float64)
        code = float(e4m3(scaled)) if quantiser.type == "float" else float(scaled.round().clamp(-128, 127))
        if not ends[0] <= value / scale < ends[1]:
            beyond[code + 0.0] = beyond.get(code + 0.0, 0) + count
            continue
        octave = math.floor(math.log2(abs(value)))
        at_power = abs(value) == 2.0**octave  # half as far to the next value below
        cells.setdefault(code + 0.0, []).append((count, 2.0 ** (octave - 7) * (0.75 if at_power else 1.0)))
    total = int(counts.sum())
    kept = sum(count for cell in cells.values() for count, _ in cell)
    result = 0.0
    for code in cells | beyond:
        inside = sum(count for count, _ in cells.get(code, []))
        mass = (inside + beyond.get(code, 0)) / total
        if not inside:
            return math.inf
        width = sum(w for _, w in cells[code])
        result += mass * math.log(mass * kept / inside)
        result += mass * sum(count / inside * math.log(count / inside * width / w) for count, w in cells[code])
    return result


@pytest.mark.parametrize("name", ["W8A8_STATIC", "FP8"])
@pytest.mark.parametrize("kind", ["normal", "outliers", "relu"])
def test_divergence_is_what_it_says(name: str, kind: str) -> None:
    x, quantiser = drawn(kind, 1000, seed=1), input_grid(SCHEMES[name])
    cost = observers.divergence(*observers.occurring(bf16_histogram(x)), quantiser, torch.bfloat16)
    ends = x.float().abs().max() * torch.tensor([1.0, 0.9, 0.7, 0.5, 0.2, 0.15, 0.11, 0.1, 0.09, 0.08, 0.06, 0.04])
    theirs = [plain_divergence(x, -float(end), float(end), quantiser) for end in ends]
    assert sum(t < float("inf") for t in theirs) > 2
    torch.testing.assert_close(cost(-ends, ends), torch.tensor(theirs, dtype=torch.float64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["normal", "outliers"])
def test_entropy_is_as_good_as_every_end_tried(kind: str) -> None:
    x, quantiser = drawn(kind), input_grid(SCHEMES["W8A8_STATIC"])
    most = float(x.float().abs().max())
    best = min(plain_divergence(x, -most * s, most * s, quantiser) for s in [2 ** (-i / 8) for i in range(40)])
    low, high = range_of(bf16_histogram(x), quantiser, "entropy", torch.bfloat16)
    assert plain_divergence(x, float(low), float(high), quantiser) <= best * 1.000001


@given(st.integers(0, 2**32), st.floats(60.0, 100.0), st.booleans())
@settings(max_examples=30, deadline=None)
def test_percentile_counts_values(seed: int, percentile: float, symmetric: bool) -> None:
    x = drawn("silu", 999, seed)
    quantiser = input_grid(SCHEMES["W8A8_STATIC" if symmetric else "W8A8_STATIC_ASYM"])
    low, high = range_of(bf16_histogram(x), quantiser, "percentile", torch.bfloat16, percentile)
    values = x.float()
    if symmetric:
        assert low == -high
        inside, wanted = (values.abs() <= high).sum(), percentile
        assert (values.abs() < high).sum() < 999 * wanted / 100  # not one more than it takes
    else:
        inside, wanted = (values <= high).sum(), 50 + percentile / 2
        assert (values >= low).sum() >= 999 * wanted / 100 - 1e-6 or low == 0
    assert inside >= 999 * wanted / 100 - 1e-6


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("name", STATIC)
def test_odd_histograms(name: str, observer: Any) -> None:
    quantiser = input_grid(SCHEMES[name])
    for x in ([], [0.0, -0.0], [2.0], [-3.0, -3.0], [torch.nan, torch.inf, 1.0], [1e-38, 3e38], [-1.0, 0.0, 1.0]):
        values = torch.tensor(x, dtype=torch.bfloat16)
        low, high = range_of(bf16_histogram(values), quantiser, observer, torch.bfloat16)
        finite = values[values.isfinite()].float()
        assert low.isfinite() and high.isfinite() and low <= 0 <= high
        assert high <= max(finite.abs().max().item() if len(finite) else 0.0, 0.0)
        found = grid.grid_of_range(low, high, quantiser, torch.bfloat16)
        assert found.scale > 0


def test_the_same_every_time() -> None:
    histogram = bf16_histogram(drawn("laplace", 1 << 18))
    for name in STATIC:
        for observer in OBSERVERS:
            first, *others = (range_of(histogram, input_grid(SCHEMES[name]), observer, torch.bfloat16) for _ in range(3))  # type: ignore[arg-type]
            assert all(torch.equal(torch.stack(found), torch.stack(first)) for found in others)
