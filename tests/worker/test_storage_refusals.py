"""What S3 refuses is not tried again, and the user is told what to do."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_server import FOREVER
from faulty_store import JOURNAL, NAME, PART, Setting, asking

from jobs import Bucket
from kompressor_api.names import ExitCode, Reason
from kompressor_api.v1alpha1 import CaBundle, OutputSpec, SourceLocation
from kompressor_worker.errors import AccessDenied, NoSpaceLeft, NotFound, StorageError, UserError
from kompressor_worker.storage.locations import open_output, open_source
from s3 import S3Server


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
