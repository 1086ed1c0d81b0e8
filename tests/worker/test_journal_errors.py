"""A journal that is damaged, foreign or incomplete: one clear error that says what to delete, from `run` and `plan`; no traceback."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from test_resume import kill_after

import jobs
from jobs import Bucket
from kompressor_worker.cli import run_cli
from kompressor_worker.journal import decode
from kompressor_worker.publish import already_published
from kompressor_worker.storage import JOURNAL, ObjectInfo

GOOD: dict[str, Any] = {
    "version": 1,
    "fingerprint": {"source": "sha256:0"},
    "owner": "me",
    "unit": 1,
    "uploads": [],
    "tail": None,
    "publishing": False,
}
DAMAGED = {
    "empty": b"",
    "cut": json.dumps(GOOD).encode()[:40],
    "a list": b"[]",
    "no version": b"{}",
    "another version": json.dumps(GOOD | {"version": 99}).encode(),
    "an unknown field": json.dumps(GOOD | {"colour": "red"}).encode(),
    "no uploads": json.dumps({k: v for k, v in GOOD.items() if k != "uploads"}).encode(),
    "strange parts": json.dumps(GOOD | {"uploads": [{"name": "x", "id": "y", "parts": [{"number": 1}]}]}).encode(),
    "a negative unit": json.dumps(GOOD | {"unit": -1}).encode(),
    "not UTF-8": b"\xff\xfe{}",
}


def cut_off(bucket: Bucket, model: Path, folder: Path) -> tuple[Path, dict[str, str]]:
    """A job that was killed after a few units."""
    bucket.upload(model, "source")
    job = jobs.write(folder / "j.json", jobs.manifest(bucket.uri("source"), bucket.uri("out"), endpoint=bucket.server.endpoint))
    kill_after(jobs.worker(job, bucket.environ), 3, 0, signal.SIGKILL)
    return job, bucket.environ


def test_a_good_one_is_read() -> None:
    assert decode(json.dumps(GOOD).encode(), "s3://b/out").unit == 1


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged(damage: str, bucket: Bucket, deep_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    bucket.upload(deep_model, "source")
    bucket.server.client().put_object(Bucket=bucket.name, Key=f"out/{JOURNAL}", Body=DAMAGED[damage])
    for name, value in bucket.environ.items():
        monkeypatch.setenv(name, value)
    job = jobs.write(tmp_path / "j.json", jobs.manifest(bucket.uri("source"), bucket.uri("out"), endpoint=bucket.server.endpoint))
    for command in ("plan", "run"):
        assert run_cli([command, str(job)]) == 64
        said = capfd.readouterr().err.strip().splitlines()[-1]
        assert "JournalMismatch" in said
        assert f"delete {bucket.uri('out')}/.kompressor/" in said
    assert bucket.names("out") == [JOURNAL]


@pytest.mark.parametrize("victim", ["units/00000.json", "tail-"])
def test_incomplete(victim: str, bucket: Bucket, deep_model: Path, tmp_path: Path) -> None:
    """What the journal counts on has gone, cleaned away by somebody."""
    job, environ = cut_off(bucket, deep_model, tmp_path)
    client = bucket.server.client()
    gone = [n for n in bucket.names("out") if n.startswith(f".kompressor/{victim}")]
    assert gone
    for name in gone:
        client.delete_object(Bucket=bucket.name, Key=f"out/{name}")
    code, said = jobs.run(job, environ)
    assert code == 64, said
    last = said.strip().splitlines()[-1]
    assert "JournalMismatch" in last
    assert gone[0] in last or victim in last
    assert "config.json" not in bucket.names("out")


def test_plan_knows_that_another_job_is_unfinished_there(deep_model: Path, tmp_path: Path, capfd: Any) -> None:
    out = (tmp_path / "out").as_uri()
    job = jobs.write(tmp_path / "a.json", jobs.manifest(deep_model.as_uri(), out))
    kill_after(jobs.worker(job), 3, 0, signal.SIGKILL)
    assert run_cli(["plan", str(job)]) == 0, "its own journal is fine"
    other = jobs.write(tmp_path / "b.json", jobs.manifest(deep_model.as_uri(), out, [{"rtn": {"scheme": "W8A8"}}]))
    assert run_cli(["plan", str(other)]) == 64
    said = capfd.readouterr().err
    assert "JournalMismatch" in said
    assert str(tmp_path / ".out.kompressor") in said, "the remedy names what is really there"


class Publishing:
    """An output whose other worker publishes and cleans up between two looks at it."""

    uri = "s3://bucket/out"

    def __init__(self) -> None:
        self.names = ["model.safetensors"]

    def existing(self) -> dict[str, ObjectInfo]:
        found, self.names = self.names, ["config.json", "kompressor.json", "model.safetensors"]
        return {name: ObjectInfo(name, 1, "e") for name in found}

    def read(self, name: str) -> None:
        return None

    def read_published(self, name: str) -> bytes:
        return json.dumps({"fingerprint": {"source": "sha256:0"}}).encode()


def test_a_result_that_appears_while_it_is_looked_for() -> None:
    """Not somebody else's objects: this job's own result, published by the worker before."""
    output: Any = Publishing()
    assert already_published(output, {"source": "sha256:0"}) == {"fingerprint": {"source": "sha256:0"}}
