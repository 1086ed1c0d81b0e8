"""A target carried out: the plan that was promised, one that misses and the next one after it, and cut off at every point in between."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plants import loud_channels
from test_resume import files_of

import jobs
from calibrated_jobs import samples, write_data
from kompressor_api.names import Reason
from kompressor_api.v1alpha1 import PlanStatus, Result
from kompressor_api.v1alpha1 import Progress as ProgressStatus
from kompressor_worker.cli import run_cli
from kompressor_worker.errors import GateFailed, UserError
from kompressor_worker.job import Job, load_job
from kompressor_worker.journal import Journal, State
from kompressor_worker.plan import make_plan
from kompressor_worker.progress import Progress, Snapshot
from kompressor_worker.run import Summary, run
from models import trained_model

ROWS = 8
GPU = {"hardware": {"memory": "2G", "computeCapability": "8.9", "bandwidth": "1008G"}, "context": 512}


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model's function, but columns of its weights are sixteen times as large as the others: 4 bits lose them."""
    return loud_channels(trained_model("llama"), tmp_path_factory.mktemp("models") / "awkward", factor=1 / 16)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    files = write_data(tmp_path_factory.mktemp("data"), "llama", rows=ROWS)
    return samples({section: file.as_uri() for section, file in files.items()}, rows=ROWS)


def ordered(tmp_path: Path, model: Path, data: dict[str, Any], out: str = "out", gates: list[Any] | None = None, **target: Any) -> Job:
    body = jobs.manifest(model.as_uri(), (tmp_path / out).as_uri())
    del body["spec"]["passes"]
    body["spec"] |= data | {"target": GPU | {"prefer": "latency"} | target}
    body["spec"]["evaluation"] = data["evaluation"] | {"gates": gates or []}
    return load_job(jobs.write(tmp_path / f"{out}.json", body), {})


def carried_out(job: Job, heard: Callable[[Snapshot], None] = lambda _: None) -> Summary:
    return run(job, {}, Progress([heard]), threading.Event())


def test_a_miss_goes_one_plan_back_and_everybody_is_told(awkward: Path, data: dict[str, Any], tmp_path: Path) -> None:
    job, seen = ordered(tmp_path, awkward, data, pricePerHour=0.5), list[Snapshot]()
    plan = make_plan(job, {})
    told = PlanStatus.model_validate(plan.status())
    assert told.target is not None and told.target.passes == ["gptq: {scheme: W4A16, groupSize: 128}", "kvCache: {scheme: FP8}"]
    assert told.target.name == "W4A16, KV FP8" and told.target.fallbacks and told.target.totalBytes is not None
    assert told.target.totalBytes <= 2_000_000_000 and plan.message("x")["message"].startswith("W4A16, KV FP8: writes ")

    result = Result.model_validate(carried_out(job, seen.append).result(job.spec.output.uri))
    assert result.target is not None and result.target.tries is not None
    first, *_, last = result.target.tries
    assert first.startswith("W4A16, KV FP8: missed: perplexity rises by") and last.startswith(f"{result.target.plan}: kept")
    assert result.target.passes == ["gptq: {scheme: W8A8}", "kvCache: {scheme: FP8}"]
    assert result.target.plan == told.target.fallbacks[len(result.target.tries) - 2]
    assert (seen[0].tries, seen[0].plan) == (1, "W4A16, KV FP8")
    assert [s.tries for s in seen] == sorted(s.tries for s in seen) and seen[-1].tries == len(result.target.tries)
    assert ProgressStatus.model_validate(seen[-1].status()).plan == result.target.plan

    report = json.loads((tmp_path / "out/kompressor.json").read_text())
    assert report["target"]["tries"][0]["perplexityIncrease"] > 0.02 >= report["evaluation"]["perplexityIncrease"]
    assert report["target"]["need"]["weights"] == report["result"]["tensorBytes"] == result.outputBytes
    assert (result.target.bytesPerTokenBefore or 0) > (result.target.bytesPerTokenAfter or 0) > 0
    assert float(result.target.costPerMillionTokens or 0) > 0
    assert report["job"]["passes"] == next(p["passes"] for p in report["target"]["plans"] if p["plan"] == result.target.plan)
    page = (tmp_path / "out/report.html").read_text()
    for words in ("✕ missed", "✓ kept", "predicted by a roofline", "Cost of a million tokens", "All plans"):
        assert words in page
    assert carried_out(job).already, "the same target finds what it became"
    other = ordered(tmp_path, awkward, data, pricePerHour=0.5, maxPerplexityIncrease="3%")
    with pytest.raises(UserError) as caught:
        make_plan(other, {})
    assert caught.value.reason == Reason.OUTPUT_OCCUPIED


def test_the_safest_plan_that_fits_may_be_the_model_as_it_is(awkward: Path, data: dict[str, Any], tmp_path: Path) -> None:
    job = ordered(tmp_path, awkward, data, prefer="quality")
    result = carried_out(job).result(job.spec.output.uri)
    assert (result["target"]["plan"], result["quantizedTensors"]) == ("16 bits", 0)
    assert result["sourceBytes"] == result["outputBytes"] and float(result["kl"]) == 0


def test_no_plan_left_says_what_was_tried_and_publishes_nothing(awkward: Path, data: dict[str, Any], tmp_path: Path) -> None:
    """A limit that rounding of any kind misses: the plans are tried one after the other, no more than three."""
    job = ordered(tmp_path, awkward, data, gates=[{"metric": "kl", "maxKL": 1e-9}])
    with pytest.raises(GateFailed) as caught:
        carried_out(job)
    tried = caught.value.result["target"]["tries"]
    assert len(tried) == 3 and all(": missed: " in each for each in tried)
    assert all(each.split(":")[0] in str(caught.value) for each in tried) and "nothing was published" in str(caught.value)
    assert not (tmp_path / "out").exists()
    (report,) = tmp_path.glob(".out.kompressor/work/kompressor.json")
    assert len(json.loads(report.read_text())["target"]["tries"]) == 3


class Killed(BaseException):
    """As SIGKILL: nothing is tidied up."""


def moments() -> list[tuple[str, Callable[[State, State], bool]]]:
    """What is true of the journal's state before and after the commit that is the last."""
    return [
        ("in the first try", lambda old, new: not new.tries and new.unit == 2),
        ("the miss is told", lambda old, new: len(new.tries) == 1 and not old.tries),
        ("the step is done", lambda old, new: len(new.tries) == 1 and new.unit == 0 and old.unit > 0),
        ("in the second try", lambda old, new: len(new.tries) == 1 and new.unit == 3),
    ]


def test_cut_off_between_tries_the_same_bytes_come_out(
    awkward: Path, data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried_out(ordered(tmp_path, awkward, data, "whole"))
    whole = files_of(tmp_path / "whole")
    commit = Journal.commit
    for name, when in moments():

        def cut(journal: Journal, state: State, when: Callable[[State, State], bool] = when) -> None:
            before = journal.state
            commit(journal, state)
            if when(before, state):
                raise Killed

        job = ordered(tmp_path, awkward, data, "cut")
        with monkeypatch.context() as patched:
            patched.setattr(Journal, "commit", cut)
            with pytest.raises(Killed):
                carried_out(job)
        carried_out(job)
        made = files_of(tmp_path / "cut")
        assert made.keys() == whole.keys(), name
        assert [file for file in whole if file != "report.html" and made[file] != whole[file]] == [], name
        assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == [], f"{name}: working objects were left behind"
        shutil.rmtree(tmp_path / "cut")


def test_findings_of_a_survey_that_both_plans_make_are_not_sought_again(
    data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows and 8 bits after windows and 4: the same survey, on the same rows through the same source."""
    from kompressor_worker.survey import Survey

    surveyed: list[int] = []
    go = Survey.run

    def counted(survey: Survey, *args: Any) -> None:
        surveyed.append(survey.number)
        go(survey, *args)

    monkeypatch.setattr(Survey, "run", counted)
    from kompressor_worker.target import planner

    def only_windows(self: planner.Fit) -> tuple[planner.Row, ...]:
        rows = {row.name: row for row in self.rows}
        name = next(name for name in rows if name.startswith("windows") and name.endswith(", W4A16"))
        return rows[name], rows[name.replace("W4A16", "W8A16")]

    monkeypatch.setattr(planner.Fit, "ladder", property(only_windows))
    long = {section: data[section] | {"sequenceLength": 256, "samples": 4} for section in data}
    job = ordered(tmp_path, trained_model("llama"), long, gates=[{"metric": "kl", "maxKL": 1e-9}])
    with pytest.raises(GateFailed) as caught:
        carried_out(job)
    assert len(caught.value.result["target"]["tries"]) == 2 and surveyed == [0, 1], "each of the two surveys once"


def test_what_cannot_fit_is_said_before_anything_is_read(
    awkward: Path, data: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    small = GPU["hardware"] | {"memory": "1770M"}  # type: ignore[operator]
    job = ordered(tmp_path, awkward, data, hardware=small, concurrency=64)
    for look in (lambda: make_plan(job, {}), lambda: carried_out(job)):
        with pytest.raises(UserError) as caught:
            look()
        assert caught.value.reason == Reason.DOES_NOT_FIT and "it would fit with" in str(caught.value)
    assert run_cli(["plan", str(tmp_path / "out.json")]) == 64
    assert "DoesNotFit" in capfd.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]
