"""`kompressor plan --in-cluster` as the preflight's pod runs it: nothing that computes is there; its word is the termination message."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import pyarrow
import pytest
from hub_server import HubServer, Repository
from pyarrow import parquet
from test_plan_calibrated import GPTQ
from test_plan_calibrated import job as calibrated_job

import jobs
from jobs import Bucket
from kompressor_api.v1alpha1 import PlanStatus, Result
from kompressor_worker.cli import run_cli
from kompressor_worker.job import load_job
from kompressor_worker.plan import make_plan
from kompressor_worker.report import write_termination_message

ABSENT = ("torch", "transformers", "tokenizers", "rich", "kubernetes", "numpy", "safetensors", "jinja2")
"""What the planner's image does not have."""
PLANNER = f"""
import atexit, os, sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
def imported():
    with open(os.environ["IMPORTED"], "w") as file:
        file.writelines(f"{{name}}\\n" for name, module in sys.modules.items() if module)
atexit.register(imported)
from kompressor_worker.cli import main
main()
"""
S3 = {"boto3", "botocore", "s3transfer", "jmespath", "dateutil", "six", "certifi", "urllib3", "pyarrow"}
LIBRARIES = {"s3": S3, "hf": S3 | {"huggingface_hub"}, "pvc": {"pyarrow"}}
"""What the planner may import by the place of source and data, beside EVERYWHERE: each costs a part of its two seconds."""
EVERYWHERE = {
    "kompressor_api",
    "kompressor_worker",
    "pydantic",
    "pydantic_core",
    "annotated_types",
    "typing_extensions",
    "typing_inspection",
    "xxhash",
}


def planner(job: Path, environ: dict[str, str], command: tuple[str, ...] = ("plan",)) -> tuple[int, dict[str, Any], str]:
    """Exit code, termination message, log."""
    log = job.with_name("termination-log")
    log.write_text("")
    environ = {**environ, "IMPORTED": str(job.with_name("imported"))}
    done = subprocess.run(
        [sys.executable, "-c", PLANNER, *command, str(job), "--in-cluster"],
        env={**os.environ, **environ, "KOMPRESSOR_TERMINATION_LOG": str(log)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "", done.stdout
    assert log.read_text(), done.stderr
    return done.returncode, json.loads(log.read_text()), done.stderr


@pytest.fixture(params=["s3", "hf", "pvc"])
def ordered(request: pytest.FixtureRequest, bucket: Bucket, tmp_path: Path) -> Any:
    """A calibrated job, its source, data (Parquet) and output there; and the environment of its pod."""
    model = families.tiny_model("llama")
    parquet.write_table(pyarrow.table({"ids": [[5, 6, 7, 8] * 16] * 64}), tmp_path / "data.parquet")
    environ, extra = dict(bucket.environ), {"endpoint": bucket.server.endpoint}
    with HubServer() as hub:
        if request.param == "s3":
            bucket.upload(model, "source")
            bucket.server.client().upload_file(str(tmp_path / "data.parquet"), bucket.name, "data.parquet")
            source, data, out = ({"uri": f"s3://{bucket.name}/{name}", **extra} for name in ("source", "data.parquet", "out"))
        elif request.param == "hf":
            files = {p.name: p.read_bytes() for p in model.iterdir()}
            hub.repositories |= {
                "org/m": Repository(files),
                "datasets/org/d": Repository({"a.parquet": (tmp_path / "data.parquet").read_bytes()}),
            }
            environ |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
            source, data, out = {"uri": "hf://org/m"}, {"uri": "hf://datasets/org/d"}, {"uri": bucket.uri("out"), **extra}
        else:
            claim = tmp_path / "claims" / "models"
            claim.mkdir(parents=True)
            shutil.copytree(model, claim / "source")
            shutil.copy(tmp_path / "data.parquet", claim)
            environ["KOMPRESSOR_CLAIM_DIRECTORY"] = str(tmp_path / "claims")
            source, data, out = ({"uri": f"pvc://models/{name}"} for name in ("source", "data.parquet", "out"))
        body = jobs.manifest("s3://a/b", "s3://c/d", [{"gptq": {"scheme": "W8A16"}}])
        sample = {"dataset": {**data, "tokens": "ids"}, "samples": 32, "sequenceLength": 64}
        body["spec"] |= {"model": {"source": source}, "output": out, "calibration": sample}
        yield jobs.write(tmp_path / "job.json", body), environ


def test_it_says_what_comes_without_anything_that_computes(ordered: tuple[Path, dict[str, str]]) -> None:
    job, environ = ordered
    code, told, said = planner(job, environ)
    assert code == 0, said
    plan = make_plan(load_job(job, environ), environ).as_json()
    summary = told["summary"]
    assert (told["reason"], told["exitCode"]) == ("Valid", 0)
    assert set(summary) <= set(PlanStatus.model_fields) and PlanStatus.model_validate(summary)
    assert summary["outputBytes"] == plan["outputBytes"] and summary["hostMemoryBytes"] == plan["peakMemoryBytes"]
    assert summary["units"] == plan["units"] and summary["ratio"].endswith("x") and "gpuMemoryBytes" not in summary
    for part in ("writes ", " smaller", "needs ", "takes about "):
        assert part in told["message"]
    *warned, logged = [json.loads(line) for line in said.splitlines()]
    assert [line["message"] for line in warned if line["level"] == "warning"] == summary["warnings"]
    assert (logged["level"], logged["message"], logged["reason"]) == ("info", told["message"], "Valid")


def test_it_imports_what_it_reads_with_and_no_more(ordered: tuple[Path, dict[str, str]], request: pytest.FixtureRequest) -> None:
    """How many seconds that is: benchmarks/preflight.py."""
    job, environ = ordered
    assert planner(job, environ)[0] == 0
    names = {name.partition(".")[0] for name in job.with_name("imported").read_text().split()}
    site = {name for name in names - sys.stdlib_module_names if not name.startswith(("_", "cython"))}
    assert site - EVERYWHERE == LIBRARIES[request.node.callspec.params["ordered"]], sorted(site)


def test_errors_are_those_of_run(ordered: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    job, environ = ordered
    body = json.loads(job.read_text())
    body["spec"]["calibration"]["dataset"]["tokens"] = "idz"
    code, told, said = planner(jobs.write(job, body), environ)
    assert (code, told["reason"], told["exitCode"]) == (64, "BadData", 64), told
    assert "idz" in told["message"] and json.loads(said.splitlines()[-1])["reason"] == "BadData"
    body["spec"]["output"] = {"uri": "file:///tmp/out"}
    code, told, _ = planner(jobs.write(job, body), environ)
    assert code == 64 and "a pod's own disk" in told["message"]


def test_a_result_that_is_there_is_held_to_this_jobs_gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published by a job without gates; one with gates that it keeps, one with a gate that it cannot keep."""
    (claims := tmp_path / "claims" / "c").mkdir(parents=True)
    monkeypatch.setenv("KOMPRESSOR_CLAIM_DIRECTORY", str(tmp_path / "claims"))
    job = calibrated_job(claims, GPTQ, layers=1)
    body = json.loads(job.read_text())
    body = json.loads(json.dumps(body).replace(claims.as_uri(), "pvc://c"))
    assert run_cli(["run", str(jobs.write(job, body))]) == 0
    body["metadata"]["uid"] = "another"
    body["spec"]["evaluation"]["gates"] = [{"metric": "kl", "maxKL": 100.0}]
    code, told, said = planner(jobs.write(job, body), {})
    assert (code, told["reason"], told["exitCode"]) == (0, "AlreadyCompressed", 0), said
    report = json.loads((claims / "out" / "kompressor.json").read_text())
    summary = told["summary"]
    assert set(summary) <= set(Result.model_fields) and summary["resultDigest"] == report["result"]["digest"]
    assert summary["uri"] == "pvc://c/out" and float(summary["kl"]) > 0 and summary["evaluatedTokens"] > 0
    body["spec"]["evaluation"]["gates"] = [{"metric": "kl", "maxKL": 1e-9}]
    code, told, said = planner(jobs.write(job, body), {})
    assert (code, told["reason"], told["exitCode"]) == (67, "GateFailed", 67)
    assert told["summary"]["kl"] == summary["kl"] and "stays published" in told["message"]
    assert json.loads(said.splitlines()[-1])["result"] == told["summary"]


def test_memory_on_the_host_and_on_the_gpu(tmp_path: Path) -> None:
    job = calibrated_job(tmp_path, GPTQ, rows=64)
    alone = make_plan(load_job(job, {}), {})
    body = json.loads(job.read_text())
    body["spec"]["worker"] = {"resources": {"limits": {"nvidia.com/gpu": 1}}}
    beside = make_plan(load_job(jobs.write(job, body), {}), {})
    assert alone.memory.gpu is None and beside.memory.gpu is not None
    flow = beside.flow
    assert flow is not None and alone.flow == flow
    assert beside.memory.gpu - flow.activations > flow.block + flow.statistics, "what the CPU would hold is there"
    assert beside.status()["gpuMemoryBytes"] == beside.memory.gpu and "on the GPU" in beside.message("s3://b/o")["message"]
    del body["spec"]["calibration"], body["spec"]["evaluation"]
    body["spec"]["passes"] = [{"rtn": {"scheme": "W4A16", "groupSize": 64}}]
    weights = make_plan(load_job(jobs.write(job, body), {}), {})
    assert weights.memory.gpu is None
    assert any("asks for a GPU that it will not use" in warning for warning in weights.warnings)


def test_many_warnings_fit_into_a_termination_message(tmp_path: Path) -> None:
    (log := tmp_path / "log").touch()
    warnings = [f"{n}: " + "ü" * 100 for n in range(64)]
    write_termination_message({"reason": "Valid", "summary": {"units": 3, "warnings": warnings}}, {"KOMPRESSOR_TERMINATION_LOG": str(log)})
    assert len(log.read_bytes()) <= 4096
    kept = json.loads(log.read_text())["summary"]
    assert kept["units"] == 3 and kept["warnings"] == warnings[: len(kept["warnings"])] and len(kept["warnings"]) >= 5
