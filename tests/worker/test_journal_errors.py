"""A journal that is damaged, foreign or incomplete: one clear error that says what to delete, from `run` and `plan`; no traceback."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nursery import Nursery
from test_resume import kill_after

import jobs
from jobs import Bucket
from kompressor_worker.cli import run_cli
from kompressor_worker.errors import ClaimLost, KompressorError
from kompressor_worker.job import Job, load_job
from kompressor_worker.journal import decode, encode
from kompressor_worker.progress import Progress, Snapshot
from kompressor_worker.publish import already_published
from kompressor_worker.run import run
from kompressor_worker.storage import JOURNAL, ObjectInfo
from kompressor_worker.storage.locations import open_output

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


def cut_off(nursery: Nursery, bucket: Bucket, model: Path, folder: Path) -> tuple[Path, dict[str, str]]:
    """A job that was killed after a few units."""
    bucket.upload(model, "source")
    job = jobs.write(folder / "j.json", jobs.manifest(bucket.uri("source"), bucket.uri("out"), endpoint=bucket.server.endpoint))
    kill_after(nursery.worker(job, bucket.environ), 3, 0, signal.SIGKILL)
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


MINE, OTHER = "11111111-2222-3333-4444-555555555555", "99999999-2222-3333-4444-555555555555"


def loaded(body: dict[str, Any], folder: Path, uid: str = MINE) -> Job:
    metadata = {**body["metadata"], "uid": uid}
    return load_job(jobs.write(folder / f"{uid}.json", {**body, "metadata": metadata}), {})


def once(do: Callable[[], None]) -> Progress:
    """Does it when the second unit is finished."""
    done: list[bool] = []

    def listen(seen: Snapshot) -> None:
        if seen.units_done >= 2 and not done:
            done.append(True)
            do()

    return Progress([listen])


@pytest.mark.parametrize("where", ["s3", "file"])
@pytest.mark.parametrize("to", [OTHER, MINE, ""], ids=["another job", "its next pod", "nobody in a cluster"])
def test_an_output_that_another_job_takes_over_is_left_to_it(bucket: Bucket, deep_model: Path, tmp_path: Path, where: str, to: str) -> None:
    """Of two jobs that ask for the very same the earlier one fails for good: were it tried again, the two would go on for ever."""
    if where == "s3":
        bucket.upload(deep_model, "source")
        body = jobs.manifest(bucket.uri("source"), bucket.uri("out"), endpoint=bucket.server.endpoint)
    else:
        body = jobs.manifest(deep_model.as_uri(), (tmp_path / "out").as_uri())
    job = loaded(body, tmp_path)
    taken: list[bytes] = []

    def take_over() -> None:
        other = open_output(job.spec.output, bucket.environ)
        other.probe()
        while not taken:
            journal = other.read(JOURNAL)
            assert journal is not None
            data = encode(replace(decode(journal[0], other.uri), owner="other", job=to))
            with contextlib.suppress(ClaimLost):  # the worker commits at this very moment
                other.replace(JOURNAL, data, journal[1])
                taken.append(data)

    with pytest.raises(KompressorError) as lost:
        run(job, bucket.environ, once(take_over), threading.Event())
    if to == OTHER:
        assert (lost.value.exit_code, lost.value.reason) == (64, "OutputOccupied")
        assert OTHER in str(lost.value) and "choose another output.uri" in str(lost.value)
    else:
        assert (lost.value.exit_code, lost.value.reason) == (75, "ClaimLost")
    kept = open_output(job.spec.output, bucket.environ).read(JOURNAL)
    assert kept is not None and kept[0] == taken[0], "the other's work is untouched"


def test_what_another_job_has_published_meanwhile_is_found_by_the_next_pod(bucket: Bucket, deep_model: Path, tmp_path: Path) -> None:
    """It is what this job wanted, so it is no failure."""
    bucket.upload(deep_model, "source")
    body = jobs.manifest(bucket.uri("source"), bucket.uri("out"), endpoint=bucket.server.endpoint)
    mine, other = loaded(body, tmp_path), loaded(body, tmp_path, OTHER)

    def publish() -> None:
        assert run(other, bucket.environ, Progress(), threading.Event()).resumed_from

    with pytest.raises(ClaimLost):
        run(mine, bucket.environ, once(publish), threading.Event())
    published = bucket.files("out")
    assert run(mine, bucket.environ, Progress(), threading.Event()).already
    assert bucket.files("out") == published


@pytest.mark.parametrize("victim", ["units/00000.json", "tail-"])
def test_incomplete(nursery: Nursery, victim: str, bucket: Bucket, deep_model: Path, tmp_path: Path) -> None:
    """What the journal counts on has gone, cleaned away by somebody."""
    job, environ = cut_off(nursery, bucket, deep_model, tmp_path)
    client = bucket.server.client()
    gone = [n for n in bucket.names("out") if n.startswith(f".kompressor/{victim}")]
    assert gone
    for name in gone:
        client.delete_object(Bucket=bucket.name, Key=f"out/{name}")
    code, said = nursery.run(job, environ)
    assert code == 64, said
    last = said.strip().splitlines()[-1]
    assert "JournalMismatch" in last
    assert gone[0] in last or victim in last
    assert "config.json" not in bucket.names("out")


def test_plan_knows_that_another_job_is_unfinished_there(nursery: Nursery, deep_model: Path, tmp_path: Path, capfd: Any) -> None:
    out = (tmp_path / "out").as_uri()
    job = jobs.write(tmp_path / "a.json", jobs.manifest(deep_model.as_uri(), out))
    kill_after(nursery.worker(job), 3, 0, signal.SIGKILL)
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
