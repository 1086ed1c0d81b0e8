"""Where the cluster's binaries come from: order, checksums, and how fast a closed network is given up."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import binaries
import releases


@pytest.fixture
def host(tmp_path: Path) -> Iterator[tuple[dict[str, str], Path]]:
    """A release host: its addresses as `releases.HOSTS`, and the folder that it serves."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    folder = tmp_path / "host"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield dict.fromkeys(releases.HOSTS, f"http://127.0.0.1:{server.server_port}"), folder
        server.shutdown()
        thread.join()


def publish(folder: Path, source: releases.Release, content: bytes, checksum: str | None = None, bare: bool = False) -> None:
    """Puts a release under its own address, as the projects do: bare, or in an archive with a folder and a readme."""
    if source.member is not None:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            for name, body in (("x/README.md", b"hello"), (f"x/{source.member}", content)):
                entry = tarfile.TarInfo(name)
                entry.size = len(body)
                tar.addfile(entry, io.BytesIO(body))
        content = packed.getvalue()
    digest = checksum or hashlib.sha256(content).hexdigest()
    name = source.url.rsplit("/", 1)[-1]
    text = digest if bare else f"{'0' * 64}  other.tar.gz\n{digest}  {name}\n"
    for url, body in ((source.url, content), (source.checksum_url, text.encode())):
        path = folder / url.split("/", 3)[3]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)


@pytest.mark.parametrize("name", list(binaries.TOOLS))
def test_a_release_is_verified_and_unpacked(name: str, host: tuple[dict[str, str], Path], tmp_path: Path) -> None:
    source = releases.release(name, "v1.2.3", host[0])
    publish(host[1], source, b"#!/bin/sh\necho hello\n", bare=name.startswith("kube"))
    releases.fetch(source, tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"#!/bin/sh\necho hello\n"
    assert os.access(tmp_path / name, os.X_OK)


@pytest.mark.parametrize("name", ["kubectl", "helm"])
def test_a_wrong_checksum_leaves_nothing(name: str, host: tuple[dict[str, str], Path], tmp_path: Path) -> None:
    source = releases.release(name, "v1.2.3", host[0])
    publish(host[1], source, b"tampered with", checksum="ab" * 32)
    with pytest.raises(releases.ReleaseError, match=f"sha256 is [0-9a-f]{{64}}, .* says {'ab' * 32}"):
        releases.fetch(source, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["host"]


def test_what_is_not_published_is_said(host: tuple[dict[str, str], Path], tmp_path: Path) -> None:
    with pytest.raises(releases.ReleaseError, match="404"):
        releases.fetch(releases.release("etcd", "v9.9.9", host[0]), tmp_path / "etcd")


def test_a_silent_host_is_soon_given_up(tmp_path: Path) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # bound but not listening: refused at once
        hosts = dict.fromkeys(releases.HOSTS, f"http://127.0.0.1:{deaf.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(releases.ReleaseError, match=r"127\.0\.0\.1 is out of reach"):
            releases.fetch(releases.release("helm", "v1.2.3", hosts), tmp_path / "helm")
    # TEST-NET-1 is routed nowhere: where a packet to it is dropped rather than refused, the timeout has to end it.
    hosts = dict.fromkeys(releases.HOSTS, "http://192.0.2.1")
    with pytest.raises(releases.ReleaseError, match="out of reach"):
        releases.fetch(releases.release("helm", "v1.2.3", hosts), tmp_path / "helm")
    assert time.monotonic() - began < 60, "the kernel itself would try for two minutes"


def test_assets_go_before_the_cache_and_the_first_refusal_ends_the_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOMPRESSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path / "assets"))
    for folder, name in ((tmp_path / "assets", "etcd"), (binaries.bin_folder(), "etcd"), (binaries.bin_folder(), "kubectl")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
        (folder / name).chmod(0o755)
    asked: list[str] = []

    def refuse(source: releases.Release, destination: Path) -> None:
        asked.append(destination.name)
        raise releases.ReleaseError("dl.k8s.io is out of reach")

    def build(names: list[str], log: binaries.Log) -> dict[str, binaries.Found]:
        return {name: binaries.Found(tmp_path / name, "built", 1.0) for name in names}

    monkeypatch.setattr(releases, "fetch", refuse)
    monkeypatch.setattr(binaries, "_build", build)
    said: list[str] = []
    found = binaries.provide(["etcd", "kubectl", "helm", "kube-scheduler"], log=said.append)
    assert {name: one.source for name, one in found.items()} == {
        "etcd": "KUBEBUILDER_ASSETS",
        "kubectl": "cache",
        "helm": "built",
        "kube-scheduler": "built",
    }
    assert asked == ["helm"]
    assert said == ["official releases not used: dl.k8s.io is out of reach"]


def test_a_failed_build_shows_its_end_and_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `go` that fails, first on the PATH: what the user sees is its last words and what to do instead."""
    monkeypatch.setenv("KOMPRESSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    (tmp_path / "go").write_text('#!/bin/sh\n[ "$1" = env ] && echo go1.99.0 && exit 0\necho "no space left on device" >&2\nexit 1\n')
    (tmp_path / "go").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(binaries, "_download", lambda names, log: {})
    with pytest.raises(binaries.BinaryError, match=r"(?s)helm: `go install` failed.*CLUSTER=current.*no space left on device"):
        binaries.provide(["helm"], log=lambda line: None)
    assert not list(binaries.bin_folder().iterdir())


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(binaries.BinaryError, match="kubelet: not a binary of the local cluster; choose from versitygw, etcd"):
        binaries.provide(["kubelet"])
