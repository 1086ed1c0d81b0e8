"""A calibrated job on another kind of device than it began on: refused, or gone on with where the job allows it, and the result says so.

The two devices are the compiled kernels and those in plain torch, whose sums round otherwise."""

from __future__ import annotations

import json
import random
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import families
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jobs
from kompressor_worker.cli import run_cli
from kompressor_worker.devices import Span, facts, spans
from kompressor_worker.errors import Terminated, UserError
from kompressor_worker.flow import device_fingerprint
from kompressor_worker.job import load_job
from kompressor_worker.progress import Progress, Snapshot
from kompressor_worker.run import Summary, run

UNITS = ["embeddings", "model.layers.0", "model.layers.1", "head"]


def job(folder: Path, out: str, worker: dict[str, Any] | None = None) -> Path:
    chance = random.Random(1)
    rows = folder / "rows.jsonl"
    if not rows.exists():
        rows.write_text("\n".join(json.dumps({"ids": [chance.randrange(3, 128) for _ in range(32)]}) for _ in range(16)))
    body = jobs.manifest(families.tiny_model("llama").as_uri(), (folder / out).as_uri(), [{"gptq": {"scheme": "W4A16", "groupSize": 32}}])
    sample = {"dataset": {"uri": rows.as_uri(), "tokens": "ids"}, "samples": 16, "sequenceLength": 32}
    body["spec"] |= {"calibration": sample, "evaluation": sample, "worker": worker or {}}
    return jobs.write(folder / f"{out}.json", body)


def go(path: Path, until: str = "") -> Summary:
    """Runs a job; cut off as soon as it is at the unit `until`."""
    stop = threading.Event()

    def listen(snapshot: Snapshot) -> None:
        if snapshot.unit == until:
            stop.set()

    return run(load_job(path, {}), {}, Progress([listen]), stop)


def cut_off(path: Path, until: str) -> str:
    """Which device it was on."""
    with pytest.raises(Terminated):
        go(path, until)
    return device_fingerprint()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("KOMPRESSOR_KERNELS", raising=False)
    return monkeypatch


def test_refused_unless_it_is_allowed(tmp_path: Path, elsewhere: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    go(job(tmp_path, "whole"))
    path = job(tmp_path, "out")
    first = cut_off(path, "model.layers.1")
    elsewhere.setenv("KOMPRESSOR_KERNELS", "eager")
    second = device_fingerprint()
    assert run_cli(["plan", str(path)]) == 0, "a plan is made anywhere"
    with pytest.raises(UserError) as refused:
        go(path)
    for part in (first, second, "worker.allowDeviceChange: true", "same kind of node", "to start afresh"):
        assert part in str(refused.value)
    assert not (tmp_path / "out").exists()

    summary = go(job(tmp_path, "out", {"allowDeviceChange": True}))
    report, whole = (json.loads((tmp_path / out / "kompressor.json").read_text()) for out in ("out", "whole"))
    assert report["devices"] == [
        {"device": first, "first": "embeddings", "last": "model.layers.0", "units": 2},
        {"device": second, "first": "model.layers.1", "last": "head", "units": 2},
    ]
    (warning,) = summary.result("x")["warnings"]
    assert warning in report["warnings"] and first in warning and f"model.layers.1 to head on {second}" in warning
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"made on {first}" in page and f"made on {second}" in page
    assert "devices" not in whole and whole["warnings"] == [] and "made on" not in (tmp_path / "whole" / "report.html").read_text()

    assert report["tensors"].keys() == whole["tensors"].keys()
    assert report["result"]["relativeError"] == pytest.approx(whole["result"]["relativeError"], rel=0.02)
    assert report["evaluation"]["kl"] == pytest.approx(whole["evaluation"]["kl"], rel=0.1)
    assert report["evaluation"]["perplexityBefore"] == pytest.approx(whole["evaluation"]["perplexityBefore"], rel=1e-3)
    same = [name for name, digest in whole["tensors"].items() if report["tensors"][name] == digest]
    assert all(name in same for name in whole["tensors"] if ".layers.0." in name)


def test_a_job_of_which_nothing_is_made_may_begin_anywhere(tmp_path: Path, elsewhere: pytest.MonkeyPatch) -> None:
    path = job(tmp_path, "out")
    cut_off(path, "embeddings")
    elsewhere.setenv("KOMPRESSOR_KERNELS", "eager")
    go(path)
    assert "devices" not in json.loads((tmp_path / "out" / "kompressor.json").read_text())


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from("ABC")), max_size=6))
def test_spans_say_who_made_what(workers: list[tuple[int, int, str]]) -> None:
    """Workers one after the other, each on its device: it begins where the one before had come to, or before that, and gets some way."""
    made, reached, device, known = ["A"] * 10, 0, "A", tuple[Span, ...]()
    for back, onward, here in workers:
        unit = max(0, reached - back)
        known, device = spans(known, unit, device, here), here
        made[unit:] = [here] * (10 - unit)
        reached = min(9, unit + onward)
    names = [str(unit) for unit in range(10)]
    said = [each for span in facts(known, names) for each in [span["device"]] * span["units"]] if known else [device] * 10
    assert said == made
    assert all(a.device != b.device and a.first < b.first for a, b in pairwise(known)) and len(known) != 1
