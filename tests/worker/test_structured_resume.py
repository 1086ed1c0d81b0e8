"""A job with surveys that is cut off in them, or behind them, goes on with the same activations and decisions: the same bytes come out."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nursery import Nursery
from test_calibrated_resume import data
from test_resume import TRIES, files_of
from thin_models import thin_qwen3

import jobs
from kompressor_worker.job import load_job
from kompressor_worker.journal import State, decode
from kompressor_worker.storage import JOURNAL
from kompressor_worker.storage.locations import open_output

PASSES = [
    {"pruneLayers": {"layers": 9, "measure": "divergence", "samples": 4}},
    {"pruneHidden": {"hiddenSize": 48}},
    {"pruneHeads": {"kvHeads": 1}},
    {"pruneWidth": {"ratio": 0.25, "multiple": 32}},
    {"gptq": {"scheme": "W4A16", "groupSize": 32, "ignore": ["re:.*(q|k|v|gate|up)_proj"]}},
]
ALWAYS_SAVES = """
import kompressor_worker.commands
from kompressor_worker.pipeline import Limits
kompressor_worker.commands.memory_plan = lambda: Limits(snapshot_seconds=0)
"""
GOES_ON = re.compile(r"survey (\d) goes on at unit (\d+)|going on at unit (\d+) of")


@pytest.fixture(scope="module")
def nursery(nursery: Nursery) -> Nursery:
    return nursery.after(ALWAYS_SAVES)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve of them."""
    return thin_qwen3(tmp_path_factory.mktemp("blocks"), 12)


def job(tmp_path: Path, model: Path, out: str, passes: list[dict[str, Any]] = PASSES) -> Path:
    body = jobs.manifest(model.as_uri(), (tmp_path / out).as_uri(), passes)
    for seed, name in enumerate(("calibration", "evaluation")):
        dataset = {"uri": data(tmp_path / f"{name}.jsonl", 16, 24, seed), "tokens": "ids"}
        body["spec"][name] = {"dataset": dataset, "samples": 16, "sequenceLength": 24}
    return jobs.write(tmp_path / f"{out}.json", body)


def cut_off(nursery: Nursery, job: Path, moment: Callable[[State], bool]) -> str:
    """A worker that is killed as soon as the journal says so; all that it said."""
    output = open_output(load_job(job, {}).spec.output, {})
    worker = nursery.worker(job)
    while worker.poll() is None:
        found = output.read(JOURNAL)
        if found is not None and moment(decode(found[0], "")):
            worker.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    return worker.communicate()[1]


def moments(chance: random.Random) -> list[Callable[[State], bool]]:
    """Twice in the first survey, once in the second, twice in the stream."""
    early, late, second = chance.randint(2, 5), chance.randint(6, 9), chance.randint(2, 9)
    first, last = chance.randint(1, 4), chance.randint(6, 9)
    return [
        lambda state: (state.survey or 0) >= early,
        lambda state: (state.survey or 0) >= late or state.surveys > 0,
        lambda state: (state.surveys == 1 and (state.survey or 0) >= second) or state.surveys > 1,
        lambda state: state.unit >= first,
        lambda state: state.unit >= last,
    ]


def test_killed_anywhere_the_same_bytes_come_out(nursery: Nursery, blocks: Path, tmp_path: Path) -> None:
    """Inside of both surveys and inside of the stream."""
    whole = nursery.worker(job(tmp_path, blocks, "whole"))
    said = whole.communicate()[1]
    assert whole.returncode == 0, said
    wanted = files_of(tmp_path / "whole")
    report = json.loads(wanted["kompressor.json"])
    assert report["evaluation"]["kl"] > 0
    seen: set[str] = set()
    for number, out in enumerate(TRIES):
        cut = job(tmp_path, blocks, out)
        heard = "".join(cut_off(nursery, cut, moment) for moment in moments(random.Random(number)))
        last = nursery.worker(cut)
        heard += last.communicate()[1]
        assert last.returncode == 0, heard
        made = files_of(tmp_path / out)
        assert made.keys() == wanted.keys()
        assert [name for name in wanted if name != "report.html" and made[name] != wanted[name]] == []
        assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == [], "working objects were left behind"
        seen |= {f"survey {survey}" if survey else "stream" for survey, _, _ in GOES_ON.findall(heard)}
        if {"survey 1", "survey 2", "stream"} <= seen:
            return
    pytest.fail(f"workers were only ever killed in {sorted(seen)}")


def test_what_a_survey_saved_is_of_one_job_only(nursery: Nursery, blocks: Path, tmp_path: Path) -> None:
    """Cut off before the first unit is done, another job is told so; the first one then goes on as if nothing had been."""
    cut_off(nursery, job(tmp_path, blocks, "out"), lambda state: (state.survey or 0) >= 3)
    other = nursery.worker(job(tmp_path, blocks, "out", [{"pruneLayers": {"layers": 8}}, *PASSES[1:]]))
    said = other.communicate()[1]
    assert other.returncode == 64 and "JournalMismatch" in said and "passes" in said, said
    again = nursery.worker(job(tmp_path, blocks, "out"))
    said = again.communicate()[1]
    assert again.returncode == 0 and "survey" in said, said
