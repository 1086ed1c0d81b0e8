"""Calibration against deployment activations: what is drift, what is chance, and which layer and channel is named."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kompressor_worker.drift import SiteDrift, compare, distance, summarise, warnings
from kompressor_worker.results import drifted
from kompressor_worker.statistics import Statistics, bf16_histogram, bin_values

COLUMNS = 64


def measured(x: Tensor) -> Statistics:
    statistics = Statistics(x.shape[1], ("histogram", "range"))
    for part in x.split(100):
        statistics.add(part)
    return statistics


def drift_of(x: Tensor, y: Tensor) -> SiteDrift:
    found = compare(measured(x.bfloat16()), measured(y.bfloat16()))
    assert found is not None
    return found


def normal(rows: int = 2000, seed: int = 0) -> Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed))


def test_equal_activations_do_not_drift() -> None:
    found = drift_of(normal(), normal())
    assert found == {"distance": 0, "outside": 0, "outsidePerToken": 0, "largest": 1, "channels": 0}
    assert warnings(summarise({"model.layers.0": {"model.layers.0.mlp.down": found}}, 0.0)) == ()


@pytest.mark.parametrize("rows", [3, 30, 2000])
def test_chance_is_no_drift(rows: int) -> None:
    """Two samples of the same distribution, also the few tokens of a rare expert."""
    found = [drift_of(normal(2000, seed), normal(rows, 100 + seed)) for seed in range(10)]
    drift = summarise({"block": {f"site{n}": each for n, each in enumerate(found)}}, 0.1)
    assert drift["drifting"] == [], drift


@settings(max_examples=25, deadline=None)
@given(shifts=st.lists(st.floats(0.1, 6), min_size=2, max_size=2), scale=st.sampled_from([1e-3, 1.0, 300.0]))
def test_grows_with_the_shift_whatever_the_scale(shifts: list[float], scale: float) -> None:
    low, high = sorted(shifts)
    x = normal()
    near, far = drift_of(x * scale, (x + low) * scale), drift_of(x * scale, (x + high) * scale)
    assert 0 < near["distance"] <= far["distance"] + 0.01 and far["distance"] <= 1
    assert near["outside"] <= far["outside"]


def test_the_distance_is_jensen_shannons() -> None:
    """Against the integral for two normal distributions, in fp64."""
    x = torch.randn(1 << 21, generator=torch.Generator().manual_seed(1))
    grid = np.linspace(-12, 13, 400_001)
    step = grid[1] - grid[0]
    for shift, scale in [(1.0, 1.0), (0.0, 2.0), (0.3, 1.0)]:
        p = np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi)
        q = np.exp(-(((grid - shift) / scale) ** 2) / 2) / math.sqrt(2 * math.pi) / scale
        m = (p + q) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = np.nan_to_num(p * np.log2(p / m)) + np.nan_to_num(q * np.log2(q / m))
        exact = math.sqrt(parts.sum() * step / 2)
        found = distance(bf16_histogram(x), bf16_histogram(x.flip(0) * scale + shift))
        assert exact * 0.95 < found < exact * 1.01, (shift, scale, found, exact)
    assert distance(bf16_histogram(x.abs() + 1), bf16_histogram(-x.abs() - 1)) == pytest.approx(1, abs=1e-3)


def test_shares_outside_are_exact() -> None:
    x, y = normal(500), 1.3 * normal(700, 1)
    x[3, 5] = math.nan
    y[4, 6] = math.inf
    found = drift_of(x, y)
    seen = x.bfloat16().float()[x.isfinite()]
    met = y.bfloat16().float()[y.isfinite()]
    outside = float(((met < seen.min()) | (met > seen.max())).double().mean())
    assert outside > 0
    assert found["outside"] == pytest.approx(outside, rel=1e-5)
    assert found["largest"] == pytest.approx(float(met.abs().max() / seen.abs().max()), rel=1e-5)


def test_one_new_outlier_channel_is_found_and_named() -> None:
    """It is too small a share of the values to change their distribution."""
    x, y = normal(), normal(seed=1)
    quiet = drift_of(x, y)
    y[:, 17] *= 40
    loud = drift_of(x, y)
    assert loud["distance"] < 0.1
    assert loud["worst"]["channel"] == 17
    before, after = x.bfloat16().float(), y.bfloat16().float()
    width = before.amax(0) - before.amin(0)
    beyond = max(after[:, 17].max() - before[:, 17].max(), before[:, 17].min() - after[:, 17].min())
    assert loud["worst"]["grown"] == pytest.approx(float(beyond / max(width[17], width.mean())), rel=1e-5)
    assert "worst" not in quiet
    assert loud["channels"] == pytest.approx(1 / COLUMNS, rel=1e-5)
    sites = {"model.layers.4": {"model.layers.4.mlp.gate_up": quiet, "model.layers.4.mlp.down": loud}}
    (line,) = warnings(summarise(sites, 0.1))
    assert "1 of 2 inputs" in line and "model.layers.4.mlp.down (" in line and "channel 17" in line and "gate_up" not in line


def test_the_worst_layers_are_named_first_and_blocks_carry_their_worst() -> None:
    x = normal()
    shifts = [0.0, 3.0, 0.0, 0.5, 1.5, 1.0, 2.0, 2.5, 0.1]
    blocks = {f"b{n}": {f"b{n}.qkv": drift_of(x, x + shift), f"b{n}.o": drift_of(x, x)} for n, shift in enumerate(shifts)}
    drift = summarise(blocks, 0.1)
    assert drift["drifting"] == ["b1.qkv", "b7.qkv", "b6.qkv", "b4.qkv", "b5.qkv", "b3.qkv"]
    assert drift["blocks"] == {name: sites[f"{name}.qkv"]["distance"] for name, sites in blocks.items()}
    (line,) = warnings(drift)
    assert line.index("b1.qkv") < line.index("b5.qkv") and "b3.qkv" not in line and "and 1 more" in line
    worst = drift["sites"]["b1.qkv"]
    assert drifted(drift) == {
        "distance": f"{worst['distance']:.4g}", "layer": "b1.qkv", "outside": f"{100 * worst['outside']:.3g}%", "layersAbove": 6
    }  # fmt: skip
    assert summarise(blocks, 1.0)["drifting"] != [], "what is clipped is drift, whatever the distance may be"


def test_nothing_seen_is_nothing_said() -> None:
    assert compare(measured(normal()), Statistics(COLUMNS, ("histogram", "range"))) is None
    assert bin_values().isnan().any(), "the histogram has bins for NaN, which are to be passed over"
