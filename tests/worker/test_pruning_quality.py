"""The published orderings: SparseGPT leaves less divergence than Wanda, Wanda less than magnitude, at 50 % and at 2:4.

Real jobs on a trained model, judged as in `test_quality`, and each claim with its algorithm switched off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quality import Laboratory, Passes, require_ratio

from calibrated_jobs import write_data
from kompressor_worker import kernels
from kompressor_worker.passes.wanda import Wanda
from models import held_out_tokens

ROWS, LENGTH = 128, 128
HALF, TWO_OF_FOUR = {"sparsity": 0.5}, {"pattern": "2:4"}
SPARSE, W3 = {"sparseGPT": TWO_OF_FOUR}, {"scheme": "W3A16", "groupSize": 64}

Patch = pytest.MonkeyPatch


def no_correction(patch: Patch) -> None:
    """Nothing is made good, and every column counts the same."""
    loop = kernels.prune
    patch.setattr(kernels, "prune", lambda weight, inverse, *rest: loop(weight, torch.eye(len(inverse)), *rest))


def no_norms(patch: Patch) -> None:
    patch.setattr(Wanda, "_scores", lambda _, weight, squares: weight.abs().float())


def no_update(patch: Patch) -> None:
    loop = kernels.gptq
    patch.setattr(kernels, "gptq", lambda weight, inverse, *rest, **more: loop(weight, torch.eye(len(inverse)), *rest, **more))


CLAIMS: dict[str, tuple[Passes, Passes, float, Callable[[Patch], None]]] = {
    "wanda 50%": ([{"wanda": HALF}], [{"magnitude": HALF}], 0.95, no_norms),
    "wanda 2:4": ([{"wanda": TWO_OF_FOUR}], [{"magnitude": TWO_OF_FOUR}], 1.0, no_norms),
    "sparseGPT 50%": ([{"sparseGPT": HALF}], [{"wanda": HALF}], 0.6, no_correction),
    "sparseGPT 2:4": ([SPARSE], [{"wanda": TWO_OF_FOUR}], 0.6, no_correction),
    "gptq behind it": ([SPARSE, {"gptq": W3}], [SPARSE, {"rtn": W3 | {"observer": "mse"}}], 1.0, no_update),
}
"""These passes leave less than so much of the KL that those leave; not so once that has been called. 3 bits, so that what rounding costs is
not lost beside what pruning does."""


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    folder = tmp_path_factory.mktemp("pruning")
    return Laboratory(folder, write_data(folder, "llama", ROWS)["calibration"], held_out_tokens("llama", ROWS, LENGTH))


@pytest.mark.parametrize("name", CLAIMS)
def test_the_algorithm_pays_and_switched_off_it_does_not(
    name: str, trained_llama: Path, laboratory: Laboratory, monkeypatch: Patch
) -> None:
    passes, than, below, off = CLAIMS[name]
    baseline = laboratory.baseline(trained_llama, than)
    require_ratio(laboratory.divergence(trained_llama, passes), baseline, below)
    off(monkeypatch)
    with pytest.raises(AssertionError, match=f"allowed is less than {below}"):
        require_ratio(laboratory.divergence(trained_llama, passes), baseline, below)
