"""A job that serves its result before it publishes: by a stand-in for the engine, which opens what it is given. The real one: tests/e2e."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_stand_in import IDLE, SECONDS_A_BYTE, seen, stand_in
from nursery import Nursery

import jobs
from calibrated_jobs import samples, write_data
from jobs import Bucket
from kompressor_api.names import ExitCode, Reason
from kompressor_api.v1alpha1 import PlanStatus, Result
from kompressor_worker.cli import run_cli
from kompressor_worker.errors import EngineFailed, EngineMissing, GateFailed, NoSpaceLeft, UserError
from kompressor_worker.job import load_job
from kompressor_worker.plan import make_plan
from kompressor_worker.progress import Progress
from kompressor_worker.run import Summary, run
from kompressor_worker.runtime.room import host_free
from models import trained_model

ROWS = 4
RUNTIME = {"engine": "vllm", "prompt": 32, "generate": 16, "batch": [1, 3], "rounds": 2, "pricePerHour": 3.6}
SLOW = [{"metric": "latency", "maxLatency": "1ms"}]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    files = write_data(tmp_path_factory.mktemp("data"), "llama", rows=ROWS)
    return samples({"evaluation": files["evaluation"].as_uri()}, rows=ROWS)


def ordered(folder: Path, data: dict[str, Any], out: str = "out", gates: list[Any] | None = None, **runtime: Any) -> Path:
    body = jobs.manifest(trained_model("llama").as_uri(), (folder / out).as_uri())
    asked = {"runtime": RUNTIME | runtime} if runtime.get("engine", "vllm") else {}
    body["spec"]["evaluation"] = data["evaluation"] | {"gates": gates or []} | asked
    return jobs.write(folder / f"{out}.json", body)


def carried_out(job: Path, engine: dict[str, str], stop: threading.Event | None = None) -> Summary:
    return run(load_job(job, {}), {**os.environ, **engine}, Progress(), stop or threading.Event())


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def served(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    """A job's folder (out, engine) and what it says."""
    folder = tmp_path_factory.mktemp("served")
    keys = {f"{role}_AWS_{key}": "hush" for role in ("SOURCE", "OUTPUT") for key in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")}
    return folder, carried_out(ordered(folder, data), {**stand_in(folder / "engine"), **keys, "HF_TOKEN": "hush", "PYTHONPATH": "/x"})


def test_what_is_measured_is_what_is_published_and_the_original_as_it_is(served: tuple[Path, Summary]) -> None:
    folder, _ = served
    published, source = digests(folder / "out"), digests(trained_model("llama"))
    original, result = seen(folder / "engine")
    assert result["files"] == {name: published[name] for name in ("config.json", "model.safetensors")}
    assert original["files"] == {name: source[name] for name in ("config.json", "model.safetensors")}
    assert (original["asked"]["tokens"], original["asked"]["requests"]) == (48, 3)
    for one in (original, result):
        assert not Path(one["asked"]["model"]).exists(), "the scratch folder is gone"
        assert "hush" not in one["environ"].values() and "PYTHONPATH" not in one["environ"]


def test_figures_are_medians_before_and_after_with_costs(served: tuple[Path, Summary]) -> None:
    folder, summary = served
    found = json.loads((folder / "out" / "kompressor.json").read_text())["runtime"]
    assert (found["engine"], found["prompt"], found["generate"], found["rounds"], found["inTurns"]) == (
        "vllm 0.0-stand-in",
        32,
        16,
        2,
        True,
    )
    for when, model in (("before", trained_model("llama")), ("after", folder / "out")):
        step = size_of(model) * SECONDS_A_BYTE
        assert found[when]["peakBytes"] == size_of(model) + IDLE
        for each in found[when]["batches"]:
            requests = each["batch"]
            assert each["firstToken"] == pytest.approx(step * (requests + 1) / 2, rel=1e-4)
            assert each["tokensPerSecond"] == pytest.approx(requests / step, rel=1e-4)
            assert each["latency"] == pytest.approx(step * (requests + 15), rel=1e-4)
            assert each["costPerMillionTokens"] == pytest.approx(3.6 / 3600 * each["latency"] / (16 * requests) * 1e6, rel=1e-3)
    status = Result.model_validate(summary.result("file:///x")).runtime
    assert status is not None and status.batch == 3 and status.memoryBytesAfter == found["after"]["peakBytes"]
    assert float(str(status.tokensPerSecondAfter)) > 1.5 * float(str(status.tokensPerSecondBefore))
    page = (folder / "out" / "report.html").read_text()
    assert "<h2>Serving</h2>" in page and "batch 3" in page and "A million generated tokens, at 3.6 an hour" in page


def test_nothing_but_the_report_tells_that_it_was_measured(served: tuple[Path, Summary], data: dict[str, Any], tmp_path: Path) -> None:
    folder, _ = served
    carried_out(ordered(tmp_path, data, engine=None), {})
    plain, measured = digests(tmp_path / "out"), digests(folder / "out")
    assert {name for name in measured if measured[name] != plain[name]} == {"kompressor.json", "report.html"}
    reports = [json.loads((where / "out" / "kompressor.json").read_text()) for where in (folder, tmp_path)]
    assert {key for key in reports[0] if reports[0][key] != reports[1].get(key)} == {"runtime"}
    assert reports[0]["fingerprint"] == reports[1]["fingerprint"]


def test_a_result_that_is_there_is_measured_for_another_job_and_judged(
    served: tuple[Path, Summary], data: dict[str, Any], tmp_path: Path
) -> None:
    folder, _ = served
    before = digests(folder / "out")
    (folder / "engine" / "seen").unlink()
    engine = stand_in(folder / "engine")
    assert carried_out(ordered(folder, data), engine).already and not (folder / "engine" / "seen").exists(), "measured as asked already"
    other = ordered(folder, data, generate=8)
    plan = make_plan(load_job(other, {}), {**os.environ, **engine})
    assert plan.published is None and any("the status alone says" in warning for warning in plan.warnings)
    summary = carried_out(other, engine)
    assert summary.already and summary.report["runtime"]["generate"] == 8 and len(seen(folder / "engine")) == 2
    with pytest.raises(GateFailed, match=r"a request takes .* s in a batch of 3, served by vllm .* the result of an earlier job"):
        carried_out(ordered(folder, data, generate=4, gates=SLOW), engine)
    with pytest.raises(GateFailed, match=r"allowed are 0.001 s"):
        make_plan(load_job(ordered(folder, data, gates=SLOW), {}), {**os.environ, **engine})
    assert digests(folder / "out") == before


def test_gates_on_latency_and_memory(data: dict[str, Any], tmp_path: Path) -> None:
    gates = [{"metric": "latency", "maxLatency": "10s"}, {"metric": "kl", "maxKL": 9}, {"metric": "memory", "maxMemory": "64Mi"}]
    summary = carried_out(ordered(tmp_path, data, gates=gates), stand_in(tmp_path / "engine"))
    met = Result.model_validate(summary.result("file:///x")).gates
    assert met and [(g.metric, g.met) for g in met] == [("latency", True), ("kl", True), ("memory", True)]
    assert met[0].limit == "10s" and met[2].limit == str(64 << 20)
    gates[2] = {"metric": "memory", "maxMemory": "1Mi"}
    with pytest.raises(GateFailed, match=r"takes .*Mi of the host's memory, allowed are 1Mi: choose a scheme with fewer bits") as caught:
        carried_out(ordered(tmp_path, data, "tight", gates), stand_in(tmp_path / "engine"))
    assert not (tmp_path / "tight").exists()
    assert [gate["met"] for gate in caught.value.result["gates"]] == [True, True, False]
    assert caught.value.result["runtime"]["memoryBytesAfter"] > 1 << 20
    left = {p.name for p in (tmp_path / ".tight.kompressor").rglob("*") if p.is_file()}
    assert left == {"kompressor.json", "report.html"}


def test_an_engine_that_fails_costs_figures_or_where_a_gate_waits_the_publication(data: dict[str, Any], tmp_path: Path) -> None:
    summary = carried_out(ordered(tmp_path, data), stand_in(tmp_path / "engine", "refuses"))
    (warning,) = [w for w in summary.result("x")["warnings"] if "evaluation.runtime" in w]
    assert "vllm, serving the original: ValueError: no kernel for this scheme; its log ends: stand-in starts | stand-in warns" in warning
    assert "no kernel" in summary.result("x")["runtime"]["failed"] and (tmp_path / "out" / "config.json").exists()
    assert "measured nothing" in (tmp_path / "out" / "report.html").read_text()
    gated = ordered(tmp_path, data, "gated", [{"metric": "latency", "maxLatency": "10s"}])
    with pytest.raises(
        EngineFailed, match=r"killed by signal 11.*Segmentation fault.*nothing was published, and all of it is kept"
    ) as caught:
        carried_out(gated, stand_in(tmp_path / "engine", "dies"))
    assert (caught.value.exit_code, caught.value.reason) == (ExitCode.USER_ERROR, Reason.ENGINE_FAILED)
    assert not (tmp_path / "gated").exists()
    units = len(make_plan(load_job(gated, {}), stand_in(tmp_path / "engine")).layout.units)
    assert carried_out(gated, stand_in(tmp_path / "engine")).resumed_from == units
    assert digests(tmp_path / "gated")["model.safetensors"] == digests(tmp_path / "out")["model.safetensors"]


def test_a_target_is_told_beside_what_was_predicted_and_a_slow_plan_ends_it(data: dict[str, Any], tmp_path: Path) -> None:
    """A safer plan would be larger and slower, so none is tried."""
    body = json.loads(ordered(tmp_path, data, gates=SLOW).read_text())
    del body["spec"]["passes"]
    hardware = {"memory": "2G", "computeCapability": "8.9", "bandwidth": "1008G"}
    body["spec"]["target"] = {"hardware": hardware, "context": 512, "maxPerplexityIncrease": "50%", "prefer": "latency"}
    with pytest.raises(GateFailed, match=r"a request takes .*: choose a scheme with fewer bits"):
        carried_out(jobs.write(tmp_path / "target.json", body), stand_in(tmp_path / "engine"))
    left = {p.name: p for p in (tmp_path / ".out.kompressor").rglob("*") if p.is_file()}
    target = json.loads(left["kompressor.json"].read_text())["target"]
    assert len(target["tries"]) == 1 and [each["batch"] for each in target["predicted"]] == [1, 3]
    assert all(each["after"] > each["before"] > 0 for each in target["predicted"])
    page = left["report.html"].read_text()
    assert "Predicted and measured" in page and "Predicted for a GPU of 2G, by roofline" in page


def test_where_there_is_no_engine_nothing_is_begun(data: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = ordered(tmp_path, data)
    body = json.loads(job.read_text())
    body["spec"]["worker"] = {"image": "registry/worker:1"}
    jobs.write(job, body)
    for act in (carried_out, lambda job, engine: make_plan(load_job(job, {}), engine)):
        with pytest.raises(EngineMissing, match=r"vllm is not in image registry/worker:1: KOMPRESSOR_VLLM_PYTHON is not set.*worker-vllm"):
            act(job, {})
        with pytest.raises(EngineMissing, match=r"python-missing has no vllm; .* or leave evaluation.runtime out"):
            act(job, stand_in(tmp_path / "engine", "missing"))
        with pytest.raises(EngineMissing, match=r"KOMPRESSOR_VLLM_PYTHON=/no/python cannot be run \(No such file or directory\)"):
            act(job, {"KOMPRESSOR_VLLM_PYTHON": "/no/python"})
    assert run_cli(["plan", str(job), "--json"]) == ExitCode.USER_ERROR
    assert json.loads(capfd.readouterr().out)["error"]["reason"] == Reason.ENGINE_MISSING
    assert not (tmp_path / ".out.kompressor").exists()


def test_what_cannot_be_served_is_refused_from_headers(data: dict[str, Any], tmp_path: Path) -> None:
    engine = stand_in(tmp_path / "engine")
    with pytest.raises(UserError, match=r"prompt 500 and generate 16 are 516 tokens, this model's max_position_embeddings are 512"):
        carried_out(ordered(tmp_path, data, prompt=500), engine)
    pruned = json.loads(ordered(tmp_path, data).read_text())
    pruned["spec"]["passes"] = [{"magnitude": {"sparsity": 0.5}}]
    pruned["spec"]["output"]["sparseStorage"] = "bitmask"
    with pytest.raises(UserError, match=r"no engine loads output.sparseStorage: bitmask"):
        carried_out(jobs.write(tmp_path / "bitmask.json", pruned), engine)
    with pytest.raises(UserError, match=r"KOMPRESSOR_ENGINE_ARGUMENTS=eager: is no JSON object"):
        carried_out(ordered(tmp_path, data), engine | {"KOMPRESSOR_ENGINE_ARGUMENTS": "eager"})
    assert not (tmp_path / ".out.kompressor").exists() and not (tmp_path / "engine" / "seen").exists()


def test_memory_is_what_the_container_may_still_take(tmp_path: Path) -> None:
    """Files that are only cached do not count; a container without a limit has what the machine has."""
    for name, said in {"memory.max": "3000000", "memory.current": "2500000", "memory.stat": "file 900000\ninactive_file 400000"}.items():
        (tmp_path / name).write_text(said + "\n")
    assert host_free(tmp_path) == 900_000
    (tmp_path / "memory.max").write_text("max\n")
    assert host_free(tmp_path) > 1 << 20 and host_free(tmp_path / "none") > 1 << 20


class Elsewhere:
    """A job from bucket to bucket, whose checkpoints are not on this machine."""

    def __init__(self, bucket: Bucket, data: dict[str, Any], folder: Path) -> None:
        self.bucket, self.folder = bucket, folder
        bucket.upload(trained_model("llama"), "source")
        self.environ = {**bucket.environ, "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
        (folder / "tmp").mkdir()
        self.body = jobs.manifest(bucket.uri("source"), bucket.uri("out"), endpoint=bucket.server.endpoint)
        self.body["spec"]["evaluation"] = data["evaluation"] | {"runtime": RUNTIME}

    def job(self, gates: list[Any] | None = None) -> Path:
        self.body["spec"]["evaluation"]["gates"] = gates or []
        return jobs.write(self.folder / "job.json", self.body)


@pytest.fixture
def elsewhere(bucket: Bucket, data: dict[str, Any], tmp_path: Path) -> Elsewhere:
    return Elsewhere(bucket, data, tmp_path)


def test_killed_while_it_is_measured_it_is_measured_anew_and_nothing_else_is_done(elsewhere: Elsewhere, nursery: Nursery) -> None:
    folder, environ = elsewhere.folder, {**os.environ, **elsewhere.environ}
    worker = nursery.worker(elsewhere.job(), {**environ, **stand_in(folder / "engine", "hangs")})
    wait_for(lambda: (folder / "engine" / "seen").exists())
    assert "model.safetensors" in elsewhere.bucket.names("out") and "config.json" not in elsewhere.bucket.names("out")
    os.kill(worker.pid, signal.SIGKILL)
    worker.communicate()
    assert list((folder / "tmp").glob("kompressor-runtime-*")), "killed, it could not tidy up"
    told = nursery.worker(elsewhere.job(), {**environ, **stand_in(folder / "engine", "hangs")})
    wait_for(lambda: len(seen(folder / "engine")) == 2)
    os.kill(told.pid, signal.SIGTERM)
    _, said = told.communicate()
    assert told.returncode == ExitCode.TERMINATED, said
    made = elsewhere.bucket.files("out")["model.safetensors"]
    last = nursery.worker(elsewhere.job(), {**environ, **stand_in(folder / "engine")})
    _, said = last.communicate()
    assert last.returncode == 0, said
    assert "finished unit" not in said and "measuring with vllm" in said
    files = elsewhere.bucket.files("out")
    assert files["model.safetensors"] == made and "after" in json.loads(files["kompressor.json"])["runtime"]
    assert seen(folder / "engine")[-1]["files"]["model.safetensors"] == hashlib.sha256(made).hexdigest()
    assert not list((folder / "tmp").glob("kompressor-runtime-*")), "nor is left what the killed one had"


def test_a_gate_that_is_not_met_takes_the_shards_back(elsewhere: Elsewhere) -> None:
    engine = stand_in(elsewhere.folder / "engine")
    with pytest.raises(GateFailed, match=r"a request takes"):
        carried_out(elsewhere.job(SLOW), {**elsewhere.environ, **engine})
    assert sorted(elsewhere.bucket.names("out")) == [".kompressor/kompressor.json", ".kompressor/report.html"]
    assert elsewhere.bucket.uploads("out") == []


def test_copies_are_planned_and_refused_without_room(elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {**os.environ, **elsewhere.environ, **stand_in(elsewhere.folder / "engine")}
    job = load_job(elsewhere.job(), {})
    plan = make_plan(job, environ)
    both = size_of(trained_model("llama")) + sum(shard.size for shard in plan.output.shards)
    assert plan.as_json()["scratchBytes"] == PlanStatus.model_validate(plan.status()).scratchBytes == both
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": both})())
    with pytest.raises(NoSpaceLeft, match=f"copies of both checkpoints take {both:,} bytes in .* {both:,} are free"):
        run(job, environ, Progress(), threading.Event())
    assert elsewhere.bucket.names("out") == []


def wait_for(happened: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < until, "it did not happen within two minutes"
        time.sleep(0.05)
