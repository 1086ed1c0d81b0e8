"""On a model that copies from further back than the window, the layers that are chosen pay: against evenly spaced ones, and the mean of ten
random draws, with as many bytes of cache. Real jobs, judged by their KL on held-out rows; other choices are the same files with windows
elsewhere, which transformers reads."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import smaller
import torch
from copying import HALF, LAYERS, WINDOW, copying_model, copying_rows
from quality import require_ratio
from test_hybrid_attention import FULL, SLIDING, variant
from torch import Tensor

import jobs
from kompressor_worker.job import load_job
from kompressor_worker.progress import Progress
from kompressor_worker.run import run

ROWS, DRAWS = 48, 10
EVEN = {2: 1.05, 3: 0.8}
"""By number of layers, what the chosen ones lose is less than so much of what evenly spaced ones do. Three layers of this model copy; every
third layer, from the third on, hits two of them by luck."""


@pytest.fixture(scope="module", params=[2, 3])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The published folder and its kompressor.json, with so many layers that see everything."""
    folder = tmp_path_factory.mktemp("copies")
    passes = [{"hybridAttention": {"window": WINDOW, "fullLayers": request.param, "samples": ROWS}}]
    body = jobs.manifest(copying_model().as_uri(), (folder / "out").as_uri(), passes)
    for section, seed in (("calibration", 1), ("evaluation", 2)):
        path = folder / f"{section}.jsonl"
        path.write_text("".join(json.dumps({"ids": row}) + "\n" for row in copying_rows(ROWS, seed).tolist()))
        body["spec"][section] = {"dataset": {"uri": path.as_uri(), "tokens": "ids"}, "samples": ROWS, "sequenceLength": 2 * HALF}
    run(load_job(jobs.write(folder / "job.json", body), {}), {}, Progress(), threading.Event())
    return folder / "out", json.loads((folder / "out" / "kompressor.json").read_text())


def divergence(out: Path, full: list[int], name: str) -> Tensor:
    """fp64 [rows]"""
    made = variant(out, name, [FULL if layer in full else SLIDING for layer in range(LAYERS)])
    return smaller.divergences(copying_model(), made, copying_rows(ROWS, 2)).mean(-1)


def test_the_model_copies_from_beyond_the_window() -> None:
    losses = -smaller.log_probabilities(copying_model(), rows := copying_rows(ROWS, 2)).gather(-1, rows[:, 1:, None])[..., 0]
    assert HALF > 2 * WINDOW
    assert float(losses[:, HALF:].mean()) < 0.2 * float(losses[:, : HALF - 1].mean())


def test_chosen_layers_beat_even_and_random_ones(report: tuple[Path, dict[str, Any]]) -> None:
    out, said = report
    full = said["attention"]["windows"]["fullLayers"]
    count = len(full)
    chosen = divergence(out, full, "chosen")
    assert float(chosen.mean()) == pytest.approx(said["evaluation"]["kl"], rel=1e-3)
    step = LAYERS // count
    even = [list(range(first, LAYERS, step)) for first in (0, step - 1)]
    chance = torch.Generator().manual_seed(0)
    draws = [tuple(sorted(torch.randperm(LAYERS, generator=chance)[:count].tolist())) for _ in range(DRAWS)]
    known = {each: divergence(out, list(each), "-".join(map(str, each))) for each in set(draws)}
    random = torch.stack([known[each] for each in draws]).mean(0)
    others = [divergence(out, each, f"even-{each[0]}") for each in even]
    means = [float(kl.mean()) for kl in (chosen, *others, random)]
    print(f"{count} of {LAYERS}: chosen {full}, even {even}; KL of chosen, even, ten random draws: {means}")
    require_ratio(chosen, random, 0.8)
    for each in others:
        require_ratio(chosen, each, EVEN[count])
