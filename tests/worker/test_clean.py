"""`kompressor clean` removes what one job has left, whenever it was cut off, and not a byte of anybody else's."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nursery import Nursery
from test_resume import kill_after

import jobs
from jobs import Bucket
from kompressor_api.v1alpha1 import OutputSpec
from kompressor_worker.clean import clean
from kompressor_worker.cli import run_cli
from kompressor_worker.errors import ClaimLost, StorageError, UserError
from kompressor_worker.journal import State, Upload, encode
from kompressor_worker.storage import JOURNAL, WORK, Output
from kompressor_worker.storage.locations import open_output
from kompressor_worker.storage.s3 import S3Store
from kompressor_worker.storage.s3_output import S3Output

MINE, OTHER = "11111111-2222-3333-4444-555555555555", "99999999-2222-3333-4444-555555555555"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
COPIED = ("tokenizer.json", "additional/template.jinja")
FILES = (*SHARDS, *COPIED, "config.json", "kompressor.json", "report.html")
PHASES = ("streaming", "publishing", "reported", "published", "cleared", "refused by a gate")
"""How far a worker came."""


def leave(output: Output, phase: str, uid: str = MINE, gap: Callable[[], None] = lambda: None) -> None:
    """What a worker leaves that ends in that phase; `gap` is called before it publishes."""
    report = json.dumps({"job": {"uid": uid}, "files": sorted(FILES)}).encode()
    if phase == "refused by a gate":
        output.write(f"{WORK}kompressor.json", report)
        output.write(f"{WORK}report.html", b"<html>")
        return
    output.probe()
    etag = output.replace(JOURNAL, encode(State({"source": "x"}, "me", job=uid)), None)
    output.write(f"{WORK}units/00000.json", b"{}")
    uploads = []
    for name in SHARDS:
        upload = output.begin(name, 3)
        uploads.append(Upload(name, upload, (output.write_part(name, upload, 1, 0, [memoryview(b"abc")]),)))
    state = State({"source": "x"}, "me", 2, tuple(uploads), job=uid)
    if phase == "streaming":
        output.replace(JOURNAL, encode(state), etag)
        output.begin(SHARDS[0], 3)  # and one that no commit counts
        return
    output.replace(JOURNAL, encode(State({"source": "x"}, "me", 2, tuple(uploads), publishing=True, files=FILES, job=uid)), etag)
    output.complete(uploads[0].name, uploads[0].id, uploads[0].parts)
    for name in COPIED:
        output.write(name, b"copied")
    if phase == "publishing":
        return
    output.complete(uploads[1].name, uploads[1].id, uploads[1].parts)
    output.write("report.html", b"<html>")
    output.write("kompressor.json", report)
    if phase == "reported":
        return
    gap()
    output.publish("config.json", b"{}")
    if phase == "cleared":
        output.cleanup()


def on_disk(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class SameClient:
    """The server, its client made once: to make one takes longer than all that it is asked for here."""

    def __init__(self, server: Any, client: Any) -> None:
        self.endpoint, self.access_key, self.secret_key = server.endpoint, server.access_key, server.secret_key
        self.client = lambda: client


@cache
def store(bucket: Bucket, prefix: str) -> S3Store:
    opened: Any = open_output(OutputSpec(uri=bucket.uri(prefix), endpoint=bucket.server.endpoint), bucket.environ)
    found: S3Store = opened._store
    return found


def s3_output(bucket: Bucket, prefix: str = "out") -> Output:
    """A fresh one over the same client."""
    return S3Output(store(bucket, prefix))


def folder_output(folder: Path) -> Output:
    """As on a claim, but nobody waits for the disk."""
    return open_output(OutputSpec(uri=(folder / "models" / "out").as_uri()), {})


NAMES = st.lists(st.sampled_from(["out", "models", "config", "kompressor", "tokenizer", "a", "é"]), min_size=1, max_size=3)
FOREIGN = st.dictionaries(
    st.builds(lambda parts, end: "/".join(parts) + end, NAMES, st.sampled_from([".txt", ".json.bak", ".jsonl", ".safetensors", ".json "])),
    st.binary(max_size=8),
    max_size=6,
)
"""Names beside the job's own, never one of them."""


@settings(max_examples=25)
@given(inside=FOREIGN, beside=FOREIGN, phase=st.sampled_from(PHASES), uid=st.sampled_from([MINE, OTHER]))
def test_in_a_folder_nothing_foreign_is_touched(inside: dict[str, bytes], beside: dict[str, bytes], phase: str, uid: str) -> None:
    with TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        models.mkdir()
        leave(folder_output(Path(folder)), phase)
        for name, data in {**{f"out/{k}": v for k, v in inside.items()}, **{f"other/{k}": v for k, v in beside.items()}}.items():
            (models / name).parent.mkdir(parents=True, exist_ok=True)
            (models / name).write_bytes(data)
        before = on_disk(models)
        cleaned = clean(folder_output(Path(folder)), uid)
        foreign = {f"out/{k}": v for k, v in inside.items()} | {f"other/{k}": v for k, v in beside.items()}
        assert on_disk(models) == (foreign if uid == MINE else before)
        assert (cleaned.files, cleaned.unfinished) == (
            (7 if phase in ("published", "cleared") else 0, phase != "cleared") if uid == MINE else (0, False)
        )
        if uid == MINE and not beside and not inside:
            assert list(models.iterdir()) == []


@settings(max_examples=8)
@given(inside=FOREIGN, beside=FOREIGN, phase=st.sampled_from(PHASES), uid=st.sampled_from([MINE, OTHER]))
def test_in_a_bucket_nothing_foreign_is_touched(
    empty: Callable[[], Bucket], inside: dict[str, bytes], beside: dict[str, bytes], phase: str, uid: str
) -> None:
    bucket = empty()
    foreign = {f"models/out/{k}": v for k, v in inside.items()} | {f"models/out2/{k}": v for k, v in beside.items()}

    def put() -> None:
        for key, data in foreign.items():
            bucket.server.client().put_object(Bucket=bucket.name, Key=key, Body=data)

    leave(s3_output(bucket, "models/out"), phase)
    put()
    before = bucket.files("models")
    clean(s3_output(bucket, "models/out"), uid)
    assert {f"models/{k}": v for k, v in bucket.files("models").items()} == (
        foreign if uid == MINE else {f"models/{k}": v for k, v in before.items()}
    )
    assert bool(bucket.uploads("models/out")) == (uid == OTHER and phase in ("streaming", "publishing"))


@pytest.fixture(scope="module")
def empty(s3_server: Any) -> Iterator[Callable[[], Bucket]]:
    """One bucket, emptied for each example."""
    client = s3_server.client()
    client.create_bucket(Bucket="cleaned")
    bucket = Bucket(SameClient(s3_server, client), "cleaned")

    def emptied() -> Bucket:
        for name in bucket.names("models"):
            client.delete_object(Bucket=bucket.name, Key=f"models/{name}")
        for upload in client.list_multipart_uploads(Bucket=bucket.name).get("Uploads", []):
            client.abort_multipart_upload(Bucket=bucket.name, Key=upload["Key"], UploadId=upload["UploadId"])
        return bucket

    yield emptied


@pytest.mark.parametrize("phase", PHASES)
def test_cut_off_after_any_request_it_ends_the_same(phase: str, empty: Callable[[], Bucket], monkeypatch: pytest.MonkeyPatch) -> None:
    call, left = S3Store.call, [0]

    def counted(self: S3Store, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise StorageError("cut off")
        return call(self, *arguments)

    monkeypatch.setattr(S3Store, "call", counted)
    for requests in range(100):
        bucket = empty()
        left[0] = 10_000
        leave(s3_output(bucket, "models/out"), phase)
        bucket.server.client().put_object(Bucket=bucket.name, Key="models/out/notes.txt", Body=b"mine")
        left[0] = requests
        try:
            clean(s3_output(bucket, "models/out"), MINE)
            done = True
        except StorageError:
            done = False
            names = set(bucket.names("models/out"))
            assert "config.json" not in names or set(FILES) <= names, "half a result that loaders open"
            left[0] = 10_000
            clean(s3_output(bucket, "models/out"), MINE)
        assert bucket.files("models") == {"out/notes.txt": b"mine"}
        assert bucket.uploads("models/out") == []
        if done:
            assert requests > 3
            return
    pytest.fail("it never ends")


def test_a_worker_that_is_still_alive_loses_its_claim(bucket: Bucket) -> None:
    worker = s3_output(bucket)
    worker.probe()
    etag = worker.replace(JOURNAL, encode(State({"source": "x"}, "me", job=MINE)), None)
    assert clean(s3_output(bucket), MINE).unfinished
    with pytest.raises(ClaimLost):
        worker.replace(JOURNAL, encode(State({"source": "x"}, "me", 1, job=MINE)), etag)
    assert bucket.names("out") == []


def test_in_a_cluster(nursery: Nursery, bucket: Bucket, deep_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a real worker: one that was killed, and one that came to its end."""
    (log := tmp_path / "termination-log").touch()
    location = {"uri": bucket.uri("out"), "endpoint": bucket.server.endpoint}
    ordered = {"KOMPRESSOR_OUTPUT": json.dumps(location), "KOMPRESSOR_TERMINATION_LOG": str(log)}
    for name, value in (bucket.environ | ordered).items():
        monkeypatch.setenv(name, value)

    def cleaned(uid: str) -> str:
        monkeypatch.setenv("KOMPRESSOR_JOB_UID", uid)
        assert run_cli(["clean", "--in-cluster"]) == 0
        told = json.loads(log.read_text())
        assert (told["reason"], told["exitCode"]) == ("CleanedUp", 0)
        return str(told["message"])

    bucket.upload(deep_model, "source")
    job = jobs.write(tmp_path / "j.json", jobs.manifest(bucket.uri("source"), bucket.uri("out"), endpoint=bucket.server.endpoint))
    kill_after(nursery.worker(job, bucket.environ), 3, 0, signal.SIGKILL)
    held = bucket.files("out")
    assert held and bucket.uploads("out")
    assert "nothing was removed" in cleaned(OTHER)
    assert bucket.files("out") == held
    assert "removed unfinished work" in cleaned(MINE)
    assert bucket.files("out") == {} and bucket.uploads("out") == []
    assert nursery.run(job, bucket.environ)[0] == 0
    files = len(bucket.files("out"))
    assert run_cli(["clean", bucket.uri("out"), "--endpoint", bucket.server.endpoint]) == 0, "unfinished work alone"
    assert "nothing was removed" in cleaned(OTHER)
    assert len(bucket.files("out")) == files
    assert f"removed {files} files" in cleaned(MINE)
    assert bucket.files("out") == {}
    monkeypatch.setenv("KOMPRESSOR_JOB_UID", "")
    assert run_cli(["clean", "--in-cluster"]) == 64


def test_an_empty_uid_is_not_that_of_jobs_outside_of_a_cluster(bucket: Bucket) -> None:
    leave(s3_output(bucket), "cleared", "")
    with pytest.raises(UserError, match="an empty uid names no job"):
        clean(s3_output(bucket), "")
    assert len(bucket.names("out")) == len(FILES)
