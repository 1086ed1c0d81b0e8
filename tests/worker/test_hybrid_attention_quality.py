"""On models that copy from further back than the window, the layers that are chosen pay, with as many bytes of cache: beside evenly spaced
ones, the mean of ten random draws, and the best that there is.

Real jobs on three trained models, judged together by their KL on held-out rows. Which layers copy is each model's own, so that one of the
even spacings hits two of them by luck here and there; over the three the better one of each does not do as well."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import smaller
import torch
from copying import DEEP, HALF, LAYERS, WINDOW, Windows, copying_model, copying_rows
from quality import require_ratio

DRAWS, SEEDS = 10, (0, 1, 2)


@pytest.fixture(scope="module", params=[2, 3])
def windows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Windows]:
    """A job a model, with so many layers that see everything."""
    count: int = request.param
    return [Windows.of(seed, count, tmp_path_factory.mktemp(f"{seed}-{count}")) for seed in SEEDS]


def test_the_model_copies_from_beyond_the_window() -> None:
    losses = -smaller.log_probabilities(copying_model(), rows := copying_rows(48, 2)).gather(-1, rows[:, 1:, None])[..., 0]
    assert HALF > 2 * WINDOW
    assert float(losses[:, HALF:].mean()) < 0.2 * float(losses[:, : HALF - 1].mean())


def test_chosen_layers_beat_even_and_random_ones(windows: list[Windows]) -> None:
    count = len(windows[0].chosen)
    chosen = [each.divergence(each.chosen) for each in windows]
    for each, kl in zip(windows, chosen, strict=True):
        assert float(kl.mean()) == pytest.approx(each.said["evaluation"]["kl"], rel=1e-3)
    even = [min((each.divergence(spacing) for spacing in each.even()), key=lambda kl: float(kl.mean())) for each in windows]
    chance = torch.Generator().manual_seed(0)
    draws = [tuple(sorted(torch.randperm(LAYERS, generator=chance)[:count].tolist())) for _ in range(DRAWS)]
    random = [torch.stack([each.divergence(draw) for draw in draws]).mean(0) for each in windows]
    means = [[f"{float(kl.mean()):.3f}" for kl in found] for found in (chosen, even, random)]
    print(f"{count} of {LAYERS}: chosen {[each.chosen for each in windows]}; KL of chosen, better even, ten random draws: {means}")
    require_ratio(torch.cat(chosen), torch.cat(even), 0.9)
    require_ratio(torch.cat(chosen), torch.cat(random), 0.7)


def test_no_other_choice_is_better(windows: list[Windows]) -> None:
    """Of all there are, by more than rows decide."""
    count = len(windows[0].chosen)
    for each in windows:
        best = min((each.divergence(other) for other in itertools.combinations(range(LAYERS), count)), key=lambda kl: float(kl.mean()))
        require_ratio(each.divergence(each.chosen), best, 1.1)


@pytest.mark.parametrize("count", [3, 4])
def test_tried_together_layers_are_better_than_by_themselves(count: int, tmp_path: Path) -> None:
    """In a deeper model, where two of the layers that are missed most by themselves are not the best company."""
    found = Windows.of(0, count, tmp_path, DEEP)
    assert found.chosen != found.alone
    require_ratio(found.divergence(found.chosen), found.divergence(found.alone), 0.95)
    for spacing in found.even():
        require_ratio(found.divergence(found.chosen), found.divergence(spacing), 0.8)
