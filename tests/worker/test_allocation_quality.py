"""Zeros where they cost least leave less divergence than as many zeros that are everywhere alike.

Real jobs on trained models, judged as in `test_quality`; and each claim once more with the trials of whole blocks switched off: each
linear's error then counts relative to its own output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quality import Laboratory, require_ratio

from calibrated_jobs import write_data
from kompressor_worker.passes.error_curves import ErrorCurves
from models import held_out_tokens, trained_model

ROWS, LENGTH = 128, 128
CLAIMS: dict[str, tuple[str, str, float, float]] = {
    "wanda 60%": ("llama", "wanda", 0.6, 0.5),
    "sparseGPT 60%": ("llama", "sparseGPT", 0.6, 0.5),
    "learned, wanda 60%": ("llama_learned", "wanda", 0.6, 0.7),
}
"""Model, pass and sparsity: allocated, it leaves less than so much of the KL that it leaves where it is uniform."""


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    folder = tmp_path_factory.mktemp("allocation")
    return Laboratory(folder, write_data(folder, "llama", ROWS)["calibration"], held_out_tokens("llama", ROWS, LENGTH))


@pytest.mark.parametrize("name", CLAIMS)
def test_allocation_pays_and_switched_off_it_does_not(name: str, laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, algorithm, sparsity, below = CLAIMS[name]
    source: Path = trained_model(kind)
    uniform: list[dict[str, Any]] = [{algorithm: {"sparsity": sparsity}}]
    allocated = [{algorithm: {"sparsity": sparsity, "allocation": "error"}}]
    baseline = laboratory.baseline(source, uniform)
    require_ratio(laboratory.divergence(source, allocated), baseline, below)
    monkeypatch.setattr(ErrorCurves, "_heights", lambda _, seen, squares, together: torch.full((len(together),), 1 / together[-1]))
    with pytest.raises(AssertionError, match=f"allowed is less than {below}"):
        require_ratio(laboratory.divergence(source, allocated), baseline, below)
