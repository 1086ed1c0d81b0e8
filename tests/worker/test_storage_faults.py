"""S3 on a bad day: what is retried, what is not, and what the user is told."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_server import FOREVER, FaultServer, Kind

from jobs import Bucket
from kompressor_api.names import ExitCode, Reason
from kompressor_api.v1alpha1 import CaBundle, OutputSpec, SourceLocation
from kompressor_worker.errors import AccessDenied, ClaimLost, NoSpaceLeft, NotFound, OutputOccupied, StorageError, Terminated, UserError
from kompressor_worker.storage import WORK, Output, Source, patience
from kompressor_worker.storage.locations import open_output, open_source
from s3 import S3Server

JOURNAL = f"{WORK}journal.json"
PART = 5 << 20
NAME = "model.safetensors"


class Setting:
    """A bucket behind a proxy that fails on demand."""

    def __init__(self, bucket: Bucket, proxy: FaultServer) -> None:
        self.bucket, self.proxy = bucket, proxy
        # long enough that a server on a busy machine is never taken for one that stalls; tests of stalls set their own
        self.environ = bucket.environ | {"KOMPRESSOR_STORAGE_TIMEOUT": "20", "KOMPRESSOR_STORAGE_ATTEMPTS": "4"}
        self.stop = threading.Event()

    def source(self, prefix: str = "source") -> Source:
        location = SourceLocation(uri=self.bucket.uri(prefix), endpoint=self.proxy.endpoint, credentials_secret="models-s3")
        return open_source(location, self.environ, self.stop)

    def output(self) -> Output:
        return open_output(OutputSpec(uri=self.bucket.uri("output"), endpoint=self.proxy.endpoint), self.environ, self.stop)

    def put(self, name: str, data: bytes) -> None:
        self.bucket.server.client().put_object(Bucket=self.bucket.name, Key=f"source/{name}", Body=data)


@pytest.fixture
def setting(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.02)
    with FaultServer(bucket.server.endpoint) as proxy:
        yield Setting(bucket, proxy)


PASSING: list[Kind] = ["unavailable", "internal", "drop", "lose-answer", "stall"]


@pytest.mark.parametrize("kind", PASSING)
def test_trouble_that_passes_is_not_noticed(setting: Setting, kind: Kind) -> None:
    """Every kind of request of a whole job, each of them failing twice (where it stalls: once)."""
    if kind == "stall":
        setting.environ |= {"KOMPRESSOR_STORAGE_TIMEOUT": "2", "KOMPRESSOR_STORAGE_ATTEMPTS": "8"}
    setting.proxy.inject(kind, times=1)
    output = setting.output()
    assert output.probe()

    def twice(method: str = "", path: str = "") -> None:
        setting.proxy.inject(kind, times=1 if kind == "stall" else 2, method=method, path=path)

    twice("PUT", "journal")
    etag = output.replace(JOURNAL, b"1", None)
    twice("PUT", "journal")
    etag = output.replace(JOURNAL, b"2", etag)
    data = os.urandom(PART + 100)
    twice("POST", "uploads")
    id = output.begin(NAME, len(data))
    twice("PUT", "partNumber=1")
    parts = [output.write_part(NAME, id, 1, 0, [memoryview(data)[:PART]]), output.write_part(NAME, id, 2, PART, [memoryview(data)[PART:]])]
    twice("GET", "uploadId")
    assert output.upload_exists(NAME, id, parts)
    twice("POST", "uploadId")
    output.complete(NAME, id, parts)
    twice("PUT", "config.json")
    output.publish("config.json", b"{}")
    twice("DELETE")
    output.cleanup()
    setting.proxy.clear()
    source = setting.source("output")
    twice("GET", "list-type")
    assert set(source.list()) == {NAME, "config.json"}
    twice("GET", NAME)
    assert source.read(NAME) == data
    assert setting.bucket.names("output") == ["config.json", NAME]
    assert setting.bucket.uploads("output") == []


@pytest.mark.parametrize("kind", ["truncate", "stall-body"])
def test_a_body_that_breaks_off_goes_on_where_it_stopped(setting: Setting, kind: Kind) -> None:
    data = os.urandom(8 << 20)
    setting.put(NAME, data)
    if kind == "stall-body":
        setting.environ["KOMPRESSOR_STORAGE_TIMEOUT"] = "3"
    source = setting.source()
    source.list()
    for after in (3 << 20, 1 << 20, 0):
        setting.proxy.inject(kind, method="GET", path=NAME, after=after)
    buffer = bytearray(len(data) - 10)
    source.read_into(NAME, 10, memoryview(buffer))
    assert buffer == data[10:]
    starts = [int(found[1]) for line in setting.proxy.seen if (found := re.search(r"bytes=(\d+)-", line))]
    assert starts == [10, 10 + (3 << 20), 10 + (4 << 20), 10 + (4 << 20)]


def test_a_flipped_bit_in_a_small_object_is_noticed(setting: Setting) -> None:
    setting.output().write("config.json", b'{"a": 1}')
    setting.proxy.inject("corrupt", method="GET", path="config.json")
    assert setting.source("output").read("config.json") == b'{"a": 1}'
    assert sum("config.json" in line for line in setting.proxy.seen if line.startswith("GET")) == 2


ASKED: list[tuple[str, Callable[[Setting], Any]]] = [
    ("list", lambda s: s.source().list()),
    ("read", lambda s: s.source().read(NAME)),
    ("range", lambda s: s.source().read_into(NAME, 0, memoryview(bytearray(10)))),
    ("probe", lambda s: s.output().probe()),
    ("existing", lambda s: s.output().existing()),
    ("replace", lambda s: s.output().replace(JOURNAL, b"1", None)),
    ("begin", lambda s: s.output().begin(NAME, 10)),
    ("part", lambda s: s.output().write_part(NAME, "x", 1, 0, [memoryview(b"0123456789")])),
]
asking = pytest.mark.parametrize("ask", [ask for _, ask in ASKED], ids=[name for name, _ in ASKED])


@asking
@pytest.mark.parametrize(("kind", "said"), [("stall", "Read ?timeout"), ("unavailable", "SlowDown, HTTP 503"), ("drop", "closed|aborted")])
def test_trouble_that_stays_is_one_clear_error(setting: Setting, ask: Callable[[Setting], Any], kind: Kind, said: str) -> None:
    setting.put(NAME, b"0123456789")
    setting.environ |= {"KOMPRESSOR_STORAGE_TIMEOUT": "0.3", "KOMPRESSOR_STORAGE_ATTEMPTS": "3"}
    setting.proxy.inject(kind, times=FOREVER)
    start = time.monotonic()
    with pytest.raises(StorageError) as caught:
        ask(setting)
    assert time.monotonic() - start < 40, "three attempts of 0.3 s, against 60 s for a single one by default"
    message = str(caught.value)
    assert caught.value.exit_code == ExitCode.STORAGE and not isinstance(caught.value, NoSpaceLeft)
    assert f"s3://{setting.bucket.name}/" in message and setting.proxy.endpoint in message and "after 3 attempts" in message
    assert re.search(said, message, re.IGNORECASE), message


def test_a_body_that_always_stalls(setting: Setting) -> None:
    setting.put(NAME, bytes(1000))
    setting.environ |= {"KOMPRESSOR_STORAGE_TIMEOUT": "0.3", "KOMPRESSOR_STORAGE_ATTEMPTS": "3"}
    setting.proxy.inject("stall-body", times=FOREVER, method="GET", path=NAME)
    with pytest.raises(StorageError, match=r"reading model.safetensors at byte 5 at http://.* failed after 3 attempts"):
        setting.source().read_into(NAME, 5, memoryview(bytearray(100)))


def test_nobody_listens(setting: Setting) -> None:
    location = SourceLocation(uri="s3://bucket/x", endpoint="http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"s3://bucket/x: listing x/ at http://127.0.0.1:9 failed after 4 attempts"):
        open_source(location, setting.environ).list()


def test_told_to_stop_while_storage_is_away(setting: Setting) -> None:
    setting.environ |= {"KOMPRESSOR_STORAGE_ATTEMPTS": "1000"}
    setting.proxy.inject("unavailable", times=FOREVER)
    threading.Timer(0.3, setting.stop.set).start()
    start = time.monotonic()
    with pytest.raises(Terminated):
        setting.source().list()
    assert time.monotonic() - start < 15, "of a thousand attempts, with pauses up to 20 s"
    setting.proxy.clear()
    assert setting.output().replace(JOURNAL, b"1", None), "a last commit still goes through"


def test_an_answer_that_was_lost_is_not_a_lost_claim(setting: Setting) -> None:
    output = setting.output()
    setting.proxy.inject("lose-answer", method="PUT", path="journal")
    etag = output.replace(JOURNAL, b"mine", None)
    setting.proxy.inject("lose-answer", method="PUT", path="journal")
    etag = output.replace(JOURNAL, b"mine, still", etag)
    assert output.read(JOURNAL) == (b"mine, still", etag)
    setting.proxy.inject("lose-answer", method="PUT", path="config.json")
    output.publish("config.json", b"{}")
    with pytest.raises(OutputOccupied):
        output.publish("config.json", b"[]")


def test_another_owner_in_the_moment_of_trouble(setting: Setting) -> None:
    mine, theirs = setting.output(), setting.output()
    etag = mine.replace(JOURNAL, b"mine", None)
    theirs.replace(JOURNAL, b"theirs", etag)
    setting.proxy.inject("unavailable", method="PUT", path="journal")
    with pytest.raises(ClaimLost):
        mine.replace(JOURNAL, b"mine again", etag)


@pytest.mark.parametrize(("kind", "times"), [("ignored", 2), ("unsupported", 2)])
def test_a_store_without_conditional_writes(setting: Setting, kind: Kind, times: int) -> None:
    """It is found out, and claims are then checked as well as can be."""
    output = setting.output()
    setting.proxy.inject(kind, times=times, method="PUT")
    assert output.probe() is False and output.conditional is False
    etag = output.replace(JOURNAL, b"1", None)
    etag = output.replace(JOURNAL, b"2", etag)
    for stale in (None, '"0"'):
        with pytest.raises(ClaimLost):
            output.replace(JOURNAL, b"3", stale)
    output.publish("config.json", b"{}")
    output.publish("config.json", b"{}")
    with pytest.raises(OutputOccupied):
        output.publish("config.json", b"[]")
    output.cleanup()
    assert setting.bucket.names("output") == ["config.json"]


def test_a_store_without_checksums(setting: Setting) -> None:
    setting.proxy.inject("unsupported", times=1, method="PUT")
    output = setting.output()
    assert output.probe() is True
    id = output.begin(NAME, 3)
    part = output.write_part(NAME, id, 1, 0, [memoryview(b"abc")])
    assert ";" not in part.etag
    output.complete(NAME, id, [part])
    assert output.read_published(NAME) == b"abc"


@asking
def test_denied(setting: Setting, ask: Callable[[Setting], Any]) -> None:
    setting.put(NAME, b"0123456789")
    setting.proxy.inject("denied", times=FOREVER)
    with pytest.raises(AccessDenied, match=r"AccessDenied, HTTP 403") as caught:
        ask(setting)
    assert "AWS_ACCESS_KEY_ID" in str(caught.value)
    assert caught.value.exit_code == ExitCode.USER_ERROR and caught.value.reason == Reason.ACCESS_DENIED
    assert len(setting.proxy.seen) <= 2, "a denial is not retried"


@pytest.mark.parametrize(
    ("key", "said"), [("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch"), ("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId|XAdminUserNotFound")]
)
def test_wrong_credentials(setting: Setting, key: str, said: str) -> None:
    setting.environ |= {f"SOURCE_{key}": "wrong", f"OUTPUT_{key}": "wrong"}
    with pytest.raises(AccessDenied, match=f"(?:{said}).*Secret models-s3 .keys AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"):
        setting.source().list()
    with pytest.raises(AccessDenied, match=f"(?:{said}).*OUTPUT_AWS_ACCESS_KEY_ID, OUTPUT_AWS_SECRET_ACCESS_KEY"):
        setting.output().probe()


def test_no_credentials(setting: Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    output = OutputSpec(uri=setting.bucket.uri("output"), endpoint=setting.proxy.endpoint)
    with pytest.raises(AccessDenied, match=r"no usable credentials.*the pod's own identity.*credentialsSecret"):
        open_output(output, {}).existing()
    with pytest.raises(AccessDenied, match=r"OUTPUT_AWS_ACCESS_KEY_ID and OUTPUT_AWS_SECRET_ACCESS_KEY only one is set"):
        open_output(output, {"OUTPUT_AWS_ACCESS_KEY_ID": "half"}).existing()


def test_missing_bucket(setting: Setting) -> None:
    source = open_source(SourceLocation(uri="s3://no-such-bucket/x", endpoint=setting.proxy.endpoint), setting.environ)
    said = r"no bucket no-such-bucket at http://127.0.0.1:\d+; create it or correct model.source.uri"
    with pytest.raises(NotFound, match=said) as caught:
        source.list()
    assert caught.value.reason == Reason.SOURCE_NOT_FOUND
    output = open_output(OutputSpec(uri="s3://no-such-bucket/x", endpoint=setting.proxy.endpoint), setting.environ)
    for ask in (output.existing, output.probe, lambda: output.read(JOURNAL), lambda: output.begin(NAME, 1)):
        with pytest.raises(NotFound, match="no bucket no-such-bucket") as caught:
            ask()
        assert caught.value.reason == Reason.OUTPUT_NOT_FOUND


def test_a_store_without_room(setting: Setting) -> None:
    output = setting.output()
    id = output.begin(NAME, 10)
    setting.proxy.inject("full", times=FOREVER, method="PUT")
    with pytest.raises(NoSpaceLeft, match="no room"):
        output.write_part(NAME, id, 1, 0, [memoryview(b"0123456789")])


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_server_whose_disk_is_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        with S3Server(disk) as server:
            bucket = Bucket(server, "small")
            server.client().create_bucket(Bucket="small")
            environ = bucket.environ | {"KOMPRESSOR_STORAGE_ATTEMPTS": "2"}
            output = open_output(OutputSpec(uri="s3://small/x", endpoint=server.endpoint), environ)
            id = output.begin(NAME, 4 * PART)
            with pytest.raises(StorageError, match="writing part"):
                for number in range(1, 5):
                    output.write_part(NAME, id, number, (number - 1) * PART, [memoryview(os.urandom(PART))])
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_private_certificate_authority(tmp_path: Path) -> None:
    with S3Server(tmp_path / "s3", tls=True) as server:
        if server.ca is None:
            pytest.skip("the given S3 server has no certificate of its own")
        bucket = Bucket(server, "private")
        server.client().create_bucket(Bucket="private")
        with pytest.raises(UserError, match=r"certificate of https://.* is not trusted.*output\.caBundle"):
            open_output(OutputSpec(uri="s3://private/x", endpoint=server.endpoint), bucket.environ).existing()
        folder = tmp_path / "ca" / "output"
        folder.mkdir(parents=True)
        (folder / "root.pem").write_bytes(server.ca.read_bytes())
        bundle = CaBundle(config_map="store-ca", key="root.pem")
        environ = bucket.environ | {"KOMPRESSOR_CA_DIRECTORY": str(tmp_path / "ca")}
        output = open_output(OutputSpec(uri="s3://private/x", endpoint=server.endpoint, ca_bundle=bundle), environ)
        assert output.probe()
        data = os.urandom(PART + 3)
        id = output.begin(NAME, len(data))
        view = memoryview(data)
        output.complete(NAME, id, [output.write_part(NAME, id, 1, 0, [view[:PART]]), output.write_part(NAME, id, 2, PART, [view[PART:]])])
        assert output.read_published(NAME) == data
        with pytest.raises(NotFound, match=r"no CA bundle at .*ca/source/root.pem; ConfigMap store-ca needs the key root.pem"):
            open_source(SourceLocation(uri="s3://private/x", endpoint=server.endpoint, ca_bundle=bundle), environ)
