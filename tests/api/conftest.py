"""A real API server with the CRD, and two namespaces: `open` without the admission policies, `guarded` with them."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import local_cluster
from binaries import BinaryError

sys.path.insert(0, str(Path(__file__).parent))  # api_server.py

from api_server import Server, manifest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    cluster = local_cluster.provide(root=tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
    except BinaryError as error:
        pytest.skip(f"no control plane: {error}")
    try:
        yield _prepare(cluster)
    finally:
        with contextlib.suppress(local_cluster.CommandError):
            cluster.helm("uninstall", "guard", "--namespace", "guarded")
            cluster.kubectl("delete", "namespace", "open", "guarded", "--wait=false")
        cluster.stop()


def _prepare(cluster: local_cluster.Cluster) -> Server:
    for name in ("open", "guarded"):
        cluster.kubectl("create", "namespace", name)
    cluster.kubectl("apply", "-f", ROOT / "crds")
    values = "watch.namespaces={guarded},crds.enabled=false,replicas=0"
    cluster.helm("install", "guard", ROOT / "charts" / "kompressor", "--namespace", "guarded", "--set", values)
    server = Server(cluster)
    _wait(lambda: not server.create(manifest("open")).refusal, "the CRD is not served")
    _wait(lambda: bool(server.create(manifest("guarded", probe=True), validation="Ignore").refusal), "the policy is not enforced")
    return server


def _wait(true: Callable[[], bool], otherwise: str, seconds: float = 120) -> None:
    """Both follow a moment after their objects; `kubectl wait` fails on a CRD that has no status yet."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{otherwise} after {seconds} s"
        time.sleep(0.2)
