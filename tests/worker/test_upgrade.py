"""After an upgrade a job goes on where the release before stopped, and a result that is there counts as done."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from nursery import Nursery
from test_resume import kill_after

import jobs
from jobs import Bucket
from kompressor_worker.journal import decode
from kompressor_worker.storage import JOURNAL

OLD = "0.0.9"
YOUNGER = ("job", "files", "devices")
"""Fields that the first release did not write into its journal."""


def edit(bucket: Bucket, name: str, **fingerprint: str) -> dict[str, Any]:
    """Changes the fingerprint in a stored JSON object."""
    client, key = bucket.server.client(), {"Bucket": bucket.name, "Key": f"out/{name}"}
    stored: dict[str, Any] = json.loads(client.get_object(**key)["Body"].read())
    stored["fingerprint"] |= fingerprint
    if name == JOURNAL:
        stored = {k: v for k, v in stored.items() if k not in YOUNGER}
    client.put_object(**key, Body=json.dumps(stored).encode())
    return stored


@pytest.fixture
def job(bucket: Bucket, shallow_model: Path, tmp_path: Path) -> Path:
    bucket.upload(shallow_model, "source")
    body = jobs.manifest(bucket.uri("source"), bucket.uri("out"), endpoint=bucket.server.endpoint)
    return jobs.write(tmp_path / "j.json", body)


def test_it_goes_on_and_counts_as_done(nursery: Nursery, job: Path, bucket: Bucket) -> None:
    kill_after(nursery.worker(job, bucket.environ), 5, 0, signal.SIGKILL)
    unit = edit(bucket, JOURNAL, kompressor=OLD)["unit"]
    code, said = nursery.run(job, bucket.environ)
    assert code == 0, said
    assert f"going on at unit {unit} of" in said and unit > 0
    whole = bucket.files("out")
    edit(bucket, "kompressor.json", kompressor=OLD)
    code, said = nursery.run(job, bucket.environ)
    assert (code, "already holds this result" in said) == (0, True), said
    assert json.loads(bucket.files("out")["kompressor.json"])["fingerprint"]["kompressor"] == OLD, "who made it stays recorded"
    assert {k: v for k, v in bucket.files("out").items() if k != "kompressor.json"} == {
        k: v for k, v in whole.items() if k != "kompressor.json"
    }


def test_all_else_is_compared_as_before(nursery: Nursery, job: Path, bucket: Bucket) -> None:
    kill_after(nursery.worker(job, bucket.environ), 3, 0, signal.SIGKILL)
    edit(bucket, JOURNAL, kompressor=OLD, source="sha256:0")
    code, said = nursery.run(job, bucket.environ)
    assert code == 64 and "JournalMismatch" in said and "source" in said, said


def test_the_journal_says_whose_work_it_is(nursery: Nursery, job: Path, bucket: Bucket) -> None:
    """The uid of the job that goes on, not of the one that began."""
    uid = json.loads(job.read_text())["metadata"]["uid"]
    kill_after(nursery.worker(job, bucket.environ), 3, 0, signal.SIGKILL)
    assert decode(bucket.files("out")[JOURNAL], "").job == uid
    body = json.loads(job.read_text())
    body["metadata"]["uid"] = "another"
    kill_after(nursery.worker(jobs.write(job, body), bucket.environ), 3, 0, signal.SIGKILL)
    assert decode(bucket.files("out")[JOURNAL], "").job == "another"
