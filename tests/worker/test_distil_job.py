"""Jobs whose last pass trains, as whole jobs: what is published loads elsewhere, and says what the job says of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from untrained import STEPS, untrain

import jobs
from calibrated_jobs import evaluation_rows, samples, write_data
from kompressor_worker.job import load_job
from kompressor_worker.progress import Progress, Snapshot
from kompressor_worker.run import Summary, run
from models import perplexity

DISTIL = {"distil": {"sequenceLength": 128, "batch": 8, "validationRows": 4}}
STUDENTS: dict[str, list[dict[str, Any]]] = {
    "narrower": [{"pruneWidth": {"ratio": 0.25}}],
    "shallower": [{"pruneLayers": {"layers": 3}}],
    "2:4": [{"sparseGPT": {"pattern": "2:4"}}],
    "gptq": [{"gptq": {"scheme": "W4A16", "groupSize": 64}}, {"kvCache": {"scheme": "FP8"}}],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {section: path.as_uri() for section, path in write_data(tmp_path_factory.mktemp("data"), "llama", 32).items()}


def job_of(folder: Path, source: Path, data: Mapping[str, str], passes: Sequence[Mapping[str, Any]], out: str = "out") -> Path:
    body = jobs.manifest(source.as_uri(), (folder / out).as_uri(), passes)
    body["spec"] |= samples(dict(data), 16)
    return jobs.write(folder / f"{out}.json", body)


def done(job: Path, seen: list[Snapshot] | None = None) -> Summary:
    return run(load_job(job, {}), {}, Progress([] if seen is None else [seen.append]), threading.Event())


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_student_that_is_left_as_it_is(
    kind: str, trained_llama: Path, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three phases, and no training: what is published is, byte for byte, what the same passes publish by themselves."""
    untrain(monkeypatch)
    seen: list[Snapshot] = []
    summary = done(job_of(tmp_path, trained_llama, data, [*STUDENTS[kind], DISTIL]), seen)
    alone = done(job_of(tmp_path, trained_llama, data, STUDENTS[kind], "alone"))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    assert summary.report["evaluation"] == alone.report["evaluation"] == summary.report["distillation"]["before"]
    assert summary.report["distillation"]["recovered"]["kl"] == 0
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert [s.percent for s in seen] == sorted(s.percent for s in seen), "back again"
    assert [s.step.step for s in seen if s.step is not None] == [*range(1, STEPS + 1)]
    assert done(tmp_path / "out.json").already


def test_what_is_published_loads_with_the_same_perplexity(
    trained_llama: Path, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    untrain(monkeypatch)
    job = job_of(tmp_path, trained_llama, data, [{"pruneWidth": {"ratio": 0.25}}, {"rtn": {"scheme": "W8A8"}}, DISTIL])
    report = done(job).report
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert perplexity(model, evaluation_rows(job)) == pytest.approx(report["evaluation"]["perplexityAfter"], rel=5e-3)
    written = json.loads((tmp_path / "out" / "kompressor.json").read_text())
    assert written["distillation"]["steps"] == STEPS and written["data"]["training"]["samples"] >= 8
