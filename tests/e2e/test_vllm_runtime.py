"""A job that serves its result with vLLM before it publishes: what it says, and what becomes of it where a gate on speed is not met."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import jobs
from calibrated_jobs import samples, write_data
from kompressor_api.names import ExitCode
from kompressor_api.v1alpha1 import Result
from kompressor_worker.cli import run_cli
from models import trained_model
from setup import other_python

pytestmark = pytest.mark.vllm
RUNTIME = {"engine": "vllm", "prompt": 32, "generate": 16, "batch": [1, 4], "rounds": 2, "pricePerHour": 2}
WRITTEN = 600 << 20
"""Bytes of memory that vLLM takes at least: its libraries alone."""


@pytest.fixture
def evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("KOMPRESSOR_VLLM_PYTHON", str(other_python("vllm")))
    monkeypatch.setenv("KOMPRESSOR_ENGINE_ARGUMENTS", json.dumps({"enforce_eager": True}))  # compiling takes longer than all else
    data = write_data(tmp_path, "llama", rows=4)
    return samples({"evaluation": data["evaluation"].as_uri()}, rows=4)["evaluation"] | {"runtime": RUNTIME}


def ordered(folder: Path, evaluation: dict[str, Any], out: str) -> Path:
    body = jobs.manifest(trained_model("llama").as_uri(), (folder / out).as_uri(), [{"rtn": {"scheme": "W8A8"}}])
    body["spec"]["evaluation"] = evaluation
    return jobs.write(folder / f"{out}.json", body)


def test_vllm_serves_both_and_the_report_says_how_fast(
    evaluation: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(["run", str(ordered(tmp_path, evaluation, "out")), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    status = Result.model_validate(said).runtime
    assert status is not None and status.failed is None, status
    assert str(status.engine).startswith("vllm ") and status.batch == 4
    found = json.loads((tmp_path / "out" / "kompressor.json").read_text())["runtime"]
    print(json.dumps(found))
    for when in ("before", "after"):
        side = found[when]
        assert side["peakBytes"] > WRITTEN + side["weightBytes"]
        for each in side["batches"]:
            decoding = each["batch"] * (RUNTIME["generate"] - 1) / each["tokensPerSecond"]  # type: ignore[operator]
            assert 0 < each["firstToken"] < each["latency"]
            assert each["firstToken"] + decoding == pytest.approx(each["latency"], rel=0.5), "of medians, whose rounds may differ"
            assert each["costPerMillionTokens"] > 0
        one, four = (each["tokensPerSecond"] for each in side["batches"])
        assert four > 1.2 * one, "a batch shares the weights"
    assert "<h2>Serving</h2>" in (tmp_path / "out" / "report.html").read_text()


def test_where_vllm_is_too_slow_nothing_is_published(evaluation: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gates = [{"metric": "latency", "maxLatency": "1ms"}, {"metric": "memory", "maxMemory": "1Ti"}, {"metric": "kl", "maxKL": 9}]
    runtime = RUNTIME | {"batch": [1], "rounds": 1}
    job = ordered(tmp_path, evaluation | {"runtime": runtime, "gates": gates}, "slow")
    assert run_cli(["run", str(job), "--json"]) == ExitCode.GATE_FAILED
    said = json.loads(capfd.readouterr().out)
    assert "a request takes" in said["error"]["message"] and "served by vllm" in said["error"]["message"]
    assert [(gate["metric"], gate["met"]) for gate in said["result"]["gates"]] == [("latency", False), ("memory", True), ("kl", True)]
    assert not (tmp_path / "slow").exists()
    left = {p.name for p in (tmp_path / ".slow.kompressor").rglob("*") if p.is_file()}
    assert left == {"kompressor.json", "report.html"}
