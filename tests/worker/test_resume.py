"""Cut off anywhere, a job goes on where it was and ends with the same bytes; two workers never publish both."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from nursery import Forked, Nursery

import jobs
from jobs import Bucket
from kompressor_api.v1alpha1 import OutputSpec
from kompressor_worker.storage import JOURNAL, Output
from kompressor_worker.storage.locations import open_output

FINISHED = re.compile(r"finished unit (\d+)")
DIES_BEFORE_PUBLISHING = """
import os, signal
import kompressor_worker.trying
kompressor_worker.trying.publish = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
"""
TRIES = [f"try{number}" for number in range(5)]
"""Outputs, one after the other, until the signal hits the moment that is meant: a test that does not run for a while is too late."""


Worker = jobs.subprocess.Popen[str] | Forked


def kill_after(process: Worker, units: int, delay: float, how: signal.Signals) -> tuple[list[int], str]:
    """Lets a worker finish some units, waits a little more, then ends it; which units it had finished, and all it said."""
    assert process.stderr is not None
    said, finished = "", []
    while len(finished) < units and (line := process.stderr.readline()):
        said += line
        if found := FINISHED.search(line):
            finished.append(int(found[1]))
    time.sleep(delay)
    if process.poll() is None:
        process.send_signal(how)
    said += process.communicate()[1]
    return [int(u) for u in FINISHED.findall(said)], said


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def resumes(nursery: Nursery, job: Path, environ: dict[str, str], kills: int, seed: int) -> bool:
    """Kills `kills` workers at random moments; no unit but the last finished one may be done twice. The final run goes to the end.

    False where a busy machine let a worker come to its end before it could be killed: then nothing was left to resume."""
    chance = random.Random(seed)
    before: list[int] = []
    for _ in range(kills):
        finished, said = kill_after(nursery.worker(job, environ), chance.randrange(0, 4), chance.uniform(0, 0.02), signal.SIGKILL)
        if finished and before:
            assert finished[0] >= before[-1], f"unit {finished[0]} done again, {before[-1]} was the last to be finished\n{said}"
        before = finished or before
    last = nursery.worker(job, environ)
    said = last.communicate()[1]
    assert last.returncode == 0, said
    assert "going on at unit" in said or "already holds this result" in said
    return "going on at unit" in said


def refuse_other_bytes(nursery: Nursery, job: Callable[[str], Path], kills: int, seed: int) -> None:
    """`job` makes one for an output beside its manifest, of which `whole` is there already."""
    whole = files_of(job("whole").parent / "whole")
    for number, out in enumerate(TRIES):
        cut = job(out)
        resumed = resumes(nursery, cut, {}, kills, seed + number)
        made = files_of(cut.parent / out)
        assert made.keys() == whole.keys()
        assert [name for name in whole if name != "report.html" and made[name] != whole[name]] == []
        if resumed:
            return
    pytest.fail("no worker was killed in time")


def test_killed_twenty_times_on_s3(nursery: Nursery, bucket: Bucket, deep_model: Path, tmp_path: Path) -> None:
    bucket.upload(deep_model, "source")
    endpoint = bucket.server.endpoint
    whole = jobs.write(tmp_path / "whole.json", jobs.manifest(bucket.uri("source"), bucket.uri("whole"), endpoint=endpoint))
    assert nursery.run(whole, bucket.environ)[0] == 0
    for cut in TRIES:
        job = jobs.write(tmp_path / "cut.json", jobs.manifest(bucket.uri("source"), bucket.uri(cut), endpoint=endpoint))
        resumed = resumes(nursery, job, bucket.environ, kills=20, seed=1)
        assert bucket.files(cut) == bucket.files("whole")
        assert bucket.uploads(cut) == [], "an upload was left behind"
        if resumed:
            return
    pytest.fail("no worker was killed in time")


def test_killed_on_a_file_system(nursery: Nursery, deep_model: Path, tmp_path: Path) -> None:
    def job(name: str) -> Path:
        return jobs.write(tmp_path / f"{name}.json", jobs.manifest(deep_model.as_uri(), (tmp_path / name).as_uri()))

    assert nursery.run(job("whole"))[0] == 0
    for cut in TRIES:
        resumed = resumes(nursery, job(cut), {}, kills=6, seed=2)
        assert files_of(tmp_path / cut) == files_of(tmp_path / "whole")
        assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == [], "a staging folder was left behind"
        if resumed:
            return
    pytest.fail("no worker was killed in time")


@pytest.mark.parametrize("units", [0, 3])
def test_sigterm_commits_and_exits_75(nursery: Nursery, bucket: Bucket, shallow_model: Path, tmp_path: Path, units: int) -> None:
    bucket.upload(shallow_model, "source")
    for out in TRIES:
        job = jobs.write(tmp_path / "j.json", jobs.manifest(bucket.uri("source"), bucket.uri(out), endpoint=bucket.server.endpoint))
        process = nursery.worker(job, bucket.environ)
        finished, said = kill_after(process, units, 0, signal.SIGTERM) if units else stop_at_start(process)
        if process.returncode == 0 and "100 %" in said:
            continue  # it was publishing already
        assert process.returncode == 75, said
        assert not [n for n in bucket.names(out) if not n.startswith(".kompressor/")], "readers see something"
        code, said = nursery.run(job, bucket.environ)
        assert code == 0
        if finished:
            assert f"going on at unit {finished[-1] + 1} " in said, "what was finished before SIGTERM was not committed"
        return
    pytest.fail("no worker was told in time")


def stop_at_start(process: Worker) -> tuple[list[int], str]:
    assert process.stderr is not None
    said = process.stderr.readline()  # the first progress line: the journal is claimed
    process.send_signal(signal.SIGTERM)
    said += process.communicate()[1]
    return [int(u) for u in FINISHED.findall(said)], said


@pytest.mark.parametrize("where", ["s3", "file"])
def test_a_worker_that_wakes_up_late_stops(nursery: Nursery, bucket: Bucket, deep_model: Path, tmp_path: Path, where: str) -> None:
    """SIGSTOP freezes the first worker; a second takes over and publishes; the first wakes up, notices, and changes nothing."""
    bucket.upload(deep_model, "source")
    for out in TRIES:
        if where == "s3":
            body = jobs.manifest(bucket.uri("source"), bucket.uri(out), endpoint=bucket.server.endpoint)
        else:
            body = jobs.manifest(deep_model.as_uri(), (tmp_path / out).as_uri())
        job = jobs.write(tmp_path / "j.json", body)
        first = nursery.worker(job, bucket.environ)
        if not freeze(first, "finished unit 2", open_output(OutputSpec.model_validate(body["spec"]["output"]), bucket.environ)):
            continue
        code, said = nursery.run(job, bucket.environ)
        assert code == 0, said
        published = bucket.files(out) if where == "s3" else files_of(tmp_path / out)
        os.kill(first.pid, signal.SIGCONT)
        said = first.communicate(timeout=60)[1]
        assert first.returncode == 75, said
        assert "ClaimLost" in said
        assert (bucket.files(out) if where == "s3" else files_of(tmp_path / out)) == published
        assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []
        return
    pytest.fail("no worker was frozen in time")


def freeze(process: Worker, word: str, output: Output) -> bool:
    """Stops a worker once it has said `word`. False, and the worker has ended, where it was publishing by then."""
    assert process.stderr is not None
    while (line := process.stderr.readline()) and word not in line:
        pass
    assert line, "it ended too early"
    os.kill(process.pid, signal.SIGSTOP)
    journal = output.read(JOURNAL)
    if journal is not None and not json.loads(journal[0])["publishing"]:
        return True
    os.kill(process.pid, signal.SIGCONT)
    process.communicate(timeout=60)
    return False


def test_two_live_workers_one_result(nursery: Nursery, bucket: Bucket, deep_model: Path, tmp_path: Path) -> None:
    """The later one takes the claim, the earlier one stops at its next commit."""
    bucket.upload(deep_model, "source")
    job = jobs.write(tmp_path / "j.json", jobs.manifest(bucket.uri("source"), bucket.uri("out"), endpoint=bucket.server.endpoint))
    both = [nursery.worker(job, bucket.environ) for _ in range(2)]
    codes = sorted(p.wait(timeout=120) or 0 for p in both if p.communicate(timeout=120))
    assert codes in ([0, 75], [0, 0]), codes  # 0, 0: the second came when the first was done
    assert "config.json" in bucket.names("out")
    assert not [n for n in bucket.names("out") if n.startswith(".kompressor/")]
    code, said = nursery.run(job, bucket.environ)
    assert code == 0
    assert "already holds this result" in said


def test_a_journal_of_another_job_is_refused(nursery: Nursery, deep_model: Path, tmp_path: Path) -> None:
    out = (tmp_path / "out").as_uri()
    job = jobs.write(tmp_path / "a.json", jobs.manifest(deep_model.as_uri(), out))
    kill_after(nursery.worker(job), 3, 0, signal.SIGKILL)
    other = jobs.write(tmp_path / "b.json", jobs.manifest(deep_model.as_uri(), out, [{"rtn": {"scheme": "W8A8"}}]))
    code, said = nursery.run(other)
    assert code == 64
    assert "JournalMismatch" in said
    assert "passes" in said


def test_an_upload_that_the_store_took_away_is_made_again(nursery: Nursery, bucket: Bucket, shallow_model: Path, tmp_path: Path) -> None:
    """A lifecycle rule aborts old multipart uploads."""
    bucket.upload(shallow_model, "source")
    job = jobs.write(tmp_path / "j.json", jobs.manifest(bucket.uri("source"), bucket.uri("out"), endpoint=bucket.server.endpoint))
    whole = jobs.write(tmp_path / "w.json", jobs.manifest(bucket.uri("source"), bucket.uri("whole"), endpoint=bucket.server.endpoint))
    assert nursery.run(whole, bucket.environ)[0] == 0
    kill_after(nursery.worker(job, bucket.environ), 5, 0, signal.SIGKILL)
    client = bucket.server.client()
    for upload in client.list_multipart_uploads(Bucket=bucket.name)["Uploads"]:
        client.abort_multipart_upload(Bucket=bucket.name, Key=upload["Key"], UploadId=upload["UploadId"])
    code, said = nursery.run(job, bucket.environ)
    assert code == 0, said
    assert "no longer has the upload" in said
    assert bucket.files("out") == bucket.files("whole")


def test_an_upload_lost_while_publishing_is_made_again(nursery: Nursery, bucket: Bucket, shallow_model: Path, tmp_path: Path) -> None:
    """All units are committed, then the store forgets the upload before it is completed: one try fails, the next goes back."""
    bucket.upload(shallow_model, "source")
    client = bucket.server.client()
    job = jobs.write(tmp_path / "j.json", jobs.manifest(bucket.uri("source"), bucket.uri("out"), endpoint=bucket.server.endpoint))
    worker = nursery.after(DIES_BEFORE_PUBLISHING).worker(job, bucket.environ)
    said = worker.communicate()[1]
    assert worker.returncode == -signal.SIGKILL, said
    names = set(bucket.names("out"))
    assert {".kompressor/units/00011.json", ".kompressor/journal.json"} <= names and "model.safetensors" not in names
    key = {"Bucket": bucket.name, "Key": "out/.kompressor/journal.json"}
    journal = json.loads(client.get_object(**key)["Body"].read())
    client.put_object(**key, Body=json.dumps(journal | {"publishing": True, "unit": 12}).encode())
    for upload in client.list_multipart_uploads(Bucket=bucket.name).get("Uploads", []):
        client.abort_multipart_upload(Bucket=bucket.name, Key=upload["Key"], UploadId=upload["UploadId"])
    code, said = nursery.run(job, bucket.environ)
    assert code == 74, said
    assert "its upload is gone" in said
    code, said = nursery.run(job, bucket.environ)
    assert code == 0, said
    assert "no longer has the upload" in said
