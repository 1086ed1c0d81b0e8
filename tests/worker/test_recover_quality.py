"""How much of what a compression loses comes back when blocks are tuned, on a trained model: real jobs judged by their KL from the source
on held-out rows. The longer table: benchmarks/recovery.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import quality
from quality import Laboratory, Passes, require_ratio

from calibrated_jobs import samples, write_data
from models import held_out_tokens, trained_model

ROWS, LENGTH = 128, 128
"""Of the calibration."""
RECOVER = {"recover": {"steps": 40, "batchRows": 8}}
W2 = {"scheme": "W2A16", "groupSize": 64}
CASES: dict[str, tuple[Passes, Passes, float]] = {
    "2:4": ([{"sparseGPT": {"pattern": "2:4"}}], [{"sparseGPT": {"pattern": "2:4"}}, RECOVER], 0.4),
    "2 bits": ([{"gptq": W2}], [{"rtn": W2}, RECOVER], 0.62),
    "the last block": ([{"pruneLayers": {"layers": 3}}], [{"pruneLayers": {"layers": 3}}, RECOVER], 0.65),
}


@pytest.mark.parametrize("case", CASES)
def test_much_of_what_was_lost_comes_back(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without, tuned, left = CASES[case]
    monkeypatch.setattr(quality, "samples", lambda uris: samples(uris, ROWS))
    laboratory = Laboratory(tmp_path, write_data(tmp_path, "llama", ROWS)["calibration"], held_out_tokens("llama", 64, LENGTH))
    source = trained_model("llama")
    require_ratio(laboratory.divergence(source, tuned), laboratory.divergence(source, without), left)
