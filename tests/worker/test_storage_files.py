"""Folders and claims: full disks, frozen writers, links and paths that lead elsewhere."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kompressor_api.names import ExitCode, Reason
from kompressor_api.v1alpha1 import OutputSpec, SourceLocation
from kompressor_worker.errors import AccessDenied, ClaimLost, NoSpaceLeft, NotFound, OutputOccupied, StorageError, UserError
from kompressor_worker.storage import WORK, Output, Source, staging
from kompressor_worker.storage.locations import open_output, open_source

JOURNAL = f"{WORK}journal.json"
NAME = "model.safetensors"


def output_at(path: Path) -> Output:
    return open_output(OutputSpec(uri=f"file://{path}"), {})


def source_at(path: Path) -> Source:
    return open_source(SourceLocation(uri=f"file://{path}"), {})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root, and a kernel that lets it")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_is_said_before_the_first_byte(small_disk: Path) -> None:
    output = output_at(small_disk / "out")
    output.probe()
    with pytest.raises(NoSpaceLeft, match=r"starting model.safetensors of 8388608 bytes: No space left.*enlarge the volume") as caught:
        output.begin(NAME, 8 << 20)
    assert caught.value.exit_code == ExitCode.STORAGE and caught.value.reason == Reason.NO_SPACE_LEFT
    with pytest.raises(NoSpaceLeft, match=r"writing tokenizer.json"):
        output.write("tokenizer.json", bytes(8 << 20))
    assert output.existing() == {}
    output.cleanup()
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_on_the_way(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kompressor_worker.storage import files

    monkeypatch.setattr(files, "reserve", os.ftruncate)  # a file system that cannot reserve space
    output = output_at(small_disk / "out")
    id = output.begin(NAME, 8 << 20)
    with pytest.raises(NoSpaceLeft, match=r"writing part 1 of model.safetensors: No space left"):
        output.write_part(NAME, id, 1, 0, [memoryview(bytes(8 << 20))])


def test_a_read_only_volume(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(AccessDenied, match="Read-only file system"):
        output_at(small_disk / "out").probe()


FROZEN = """
import os, signal, sys
from kompressor_api.v1alpha1 import OutputSpec
from kompressor_worker.errors import ClaimLost
from kompressor_worker.storage import files
from kompressor_worker.storage.locations import open_output

where, uri = sys.argv[1:]
write_at = files.write_at

def freeze():
    print("frozen", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)

def frozen_in_the_write(fd, offset, chunks):
    write_at(fd, offset, [chunk[:4] for chunk in chunks])
    freeze()
    write_at(fd, offset, chunks)

if where == "write":
    files.write_at = frozen_in_the_write
if where == "enter":
    enter = files.Staging.enter
    files.Staging.enter = lambda self, fd, path: (freeze(), enter(self, fd, path))
output = open_output(OutputSpec(uri=uri), {})
etag = output.replace(".kompressor/journal.json", b"A", None)
upload = output.begin("model.safetensors", 8)
print(etag, upload, flush=True)
try:
    part = output.write_part("model.safetensors", upload, 1, 0, [memoryview(b"AAAAAAAA")])
    if where == "publish":
        output.complete("model.safetensors", upload, [part])
        freeze()
        output.publish("config.json", b"A")
    else:
        output.replace(".kompressor/journal.json", b"A", etag)
    print("went on")
except ClaimLost:
    print("stopped")
"""


@pytest.mark.parametrize("where", ["write", "enter", "publish"])
def test_a_frozen_writer_that_wakes_late_changes_nothing(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "WRITER_GRACE", 0.2)
    out = tmp_path / "out"
    frozen = subprocess.Popen([sys.executable, "-c", FROZEN, where, f"file://{out}"], stdout=subprocess.PIPE, text=True)
    assert frozen.stdout is not None
    etag, upload = frozen.stdout.readline().split()
    assert frozen.stdout.readline() == "frozen\n"
    while _state(frozen.pid) != "T":
        time.sleep(0.01)

    owner = output_at(out)
    assert where == "publish" or owner.upload_exists(NAME, upload, [])
    owner.replace(JOURNAL, b"B", etag)
    if where == "publish":
        upload = owner.begin(NAME, 8)
    part = owner.write_part(NAME, upload, 1, 0, [memoryview(b"BBBBBBBB")])
    owner.complete(NAME, upload, [part])
    owner.publish("config.json", b"B")
    owner.cleanup()

    frozen.send_signal(signal.SIGCONT)
    said = frozen.communicate(timeout=60)[0]
    assert said == "stopped\n" if where != "publish" else frozen.returncode != 0, said
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {NAME: b"BBBBBBBB", "config.json": b"B"}
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_writer_that_is_merely_slow_is_waited_for(tmp_path: Path) -> None:
    """The new owner takes the file as it is when the old one's last write ends in time."""
    first = output_at(tmp_path / "out")
    etag = first.replace(JOURNAL, b"A", None)
    upload = first.begin(NAME, 8)
    path = next(tmp_path.rglob(NAME))
    inode = path.stat().st_ino
    second = output_at(tmp_path / "out")
    second.replace(JOURNAL, b"B", etag)
    assert next(tmp_path.rglob(NAME)).stat().st_ino == inode
    with pytest.raises(ClaimLost):
        first.write_part(NAME, upload, 1, 0, [memoryview(b"AAAAAAAA")])


def test_publishing_is_one_rename(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()  # an empty folder is no result
    output = output_at(tmp_path / "out")
    output.write("tokenizer/tokenizer.json", b"[]")
    upload = output.begin(NAME, 3)
    with pytest.raises(StorageError, match="1 uploads are not complete"):
        output.publish("config.json", b"{}")
    output.complete(NAME, upload, [output.write_part(NAME, upload, 1, 0, [memoryview(b"abc")])])
    assert list((tmp_path / "out").iterdir()) == []
    output.publish("config.json", b"{}")
    assert sorted(p.name for p in (tmp_path / "out").rglob("*")) == ["config.json", NAME, "tokenizer", "tokenizer.json"]
    output.cleanup()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_an_output_that_is_filled_meanwhile(tmp_path: Path) -> None:
    output = output_at(tmp_path / "out")
    output.write("tokenizer.json", b"[]")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputOccupied, match="holds something else"):
        output.publish("config.json", b"{}")
    (tmp_path / "out" / "notes.txt").unlink()
    (tmp_path / "out").rmdir()
    (tmp_path / "out").write_text("a file")
    for ask in (output.existing, lambda: output.publish("config.json", b"{}")):
        with pytest.raises(OutputOccupied, match="is a file"):
            ask()


def test_a_part_beyond_the_end_and_a_part_that_lacks(tmp_path: Path) -> None:
    output = output_at(tmp_path / "out")
    upload = output.begin(NAME, 8)
    with pytest.raises(StorageError, match="was begun with 8 bytes, part 2 ends at 9"):
        output.write_part(NAME, upload, 2, 4, [memoryview(b"12345")])
    part = output.write_part(NAME, upload, 1, 0, [memoryview(b"1234")])
    with pytest.raises(StorageError, match="was begun with 8 bytes, has 8, and its parts hold 4"):
        output.complete(NAME, upload, [part])


def test_many_chunks_in_one_part(tmp_path: Path) -> None:
    data = os.urandom(5000)
    output = output_at(tmp_path / "out")
    upload = output.begin(NAME, 5000)
    view = memoryview(data)
    chunks = [view[i : i + 2] for i in range(0, 5000, 2)]  # more than one system call takes
    output.complete(NAME, upload, [output.write_part(NAME, upload, 1, 0, [*chunks, memoryview(b"")])])
    output.publish("config.json", b"{}")
    assert source_at(tmp_path / "out").read(NAME) == data


def test_links(tmp_path: Path) -> None:
    """A snapshot folder of the hub's cache is links to blobs: fine, but not out of a claim."""
    claim = tmp_path / "claims" / "data"
    (claim / "model").mkdir(parents=True)
    (claim / "blob").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    (claim / "model" / "good").symlink_to("../blob")
    (claim / "model" / "bad").symlink_to(tmp_path / "secret")
    (claim / "model" / "broken").symlink_to("nowhere")
    environ = {"KOMPRESSOR_CLAIM_DIRECTORY": str(tmp_path / "claims")}
    source = open_source(SourceLocation(uri="pvc://data/model"), environ)
    assert set(source.list()) == {"good", "bad"}
    assert source.read("good") == b"inside"
    with pytest.raises(AccessDenied, match=r"bad is a link to .*secret, outside the claim"):
        source.read("bad")
    assert set(source_at(claim / "model").list()) == {"good", "bad"}
    assert source_at(claim / "model").read("bad") == b"outside"
    with pytest.raises(NotFound, match="leads out of the location"):
        source.read("../blob")
    (claim / "door").symlink_to(tmp_path)
    for uri in ("pvc://data/door", "pvc://data/door/deeper"):
        with pytest.raises(UserError, match="a link leads out of the claim"):
            open_source(SourceLocation(uri=uri), environ)
        with pytest.raises(UserError, match="a link leads out of the claim"):
            open_output(OutputSpec(uri=uri), environ)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("pvc://missing/model", "claim missing is not mounted at .*create the PersistentVolumeClaim"),
        ("pvc://data/../other", "'..' is refused"),
        ("s3://bucket/a/../b", "'..' is refused"),
        ("file:///tmp/%2e%2e/x", "'..' is refused"),
    ],
)
def test_places_that_are_refused(tmp_path: Path, uri: str, said: str) -> None:
    (tmp_path / "data").mkdir()
    environ = {"KOMPRESSOR_CLAIM_DIRECTORY": str(tmp_path)}
    with pytest.raises(UserError, match=said) as caught:
        open_source(SourceLocation.model_construct(uri=uri), environ)  # unchecked: the models refuse '..' before
    assert uri in str(caught.value) or "missing" in uri
    with pytest.raises(UserError, match=said) as caught:
        open_output(OutputSpec.model_construct(uri=uri), environ)
    if "missing" in uri:
        assert caught.value.reason == Reason.OUTPUT_NOT_FOUND


@pytest.mark.parametrize("uri", ["pvc://data", "pvc://data/", "file:///"])
def test_an_output_needs_a_folder_of_its_own(tmp_path: Path, uri: str) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="add a folder to it"):
        open_output(OutputSpec(uri=uri), {"KOMPRESSOR_CLAIM_DIRECTORY": str(tmp_path)})


@pytest.mark.parametrize("value", ["soon", "-1", "0", "inf"])
def test_patience_must_be_a_number(tmp_path: Path, value: str) -> None:
    with pytest.raises(UserError, match=f"KOMPRESSOR_STORAGE_TIMEOUT is '{value}'"):
        open_source(SourceLocation(uri=f"file://{tmp_path}"), {"KOMPRESSOR_STORAGE_TIMEOUT": value})


def test_the_source_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    for path in (tmp_path / "model", tmp_path / "missing"):
        with pytest.raises(NotFound, match=r"is not a folder; give the folder that holds config.json"):
            source_at(path).list()


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    output = output_at(tmp_path / "out")
    assert output.probe() is False
    etag = output.replace(JOURNAL, b"1", None)
    etag = output.replace(JOURNAL, b"2", etag)
    with pytest.raises(ClaimLost):
        output.replace(JOURNAL, b"3", None)
    output.publish("config.json", b"{}")
    output.cleanup()
    assert source_at(tmp_path / "out").read("config.json") == b"{}"
