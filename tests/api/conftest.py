"""A real API server with the CRD, and two namespaces: `open` without the admission policies, `guarded` with them."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import local_cluster
from binaries import BinaryError
from kompressor_api import names

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
    cluster.kubectl("wait", "--for=condition=Established", f"crd/{names.PLURAL}.{names.GROUP}")
    values = "watch.namespaces={guarded},crds.enabled=false,replicas=0"
    cluster.helm("install", "guard", ROOT / "charts" / "kompressor", "--namespace", "guarded", "--set", values)
    server = Server(cluster)
    deadline = time.monotonic() + 30  # a policy takes a moment until it is enforced
    while not server.create(manifest("guarded", probe=True), validation="Ignore").refusal:
        assert time.monotonic() < deadline, "the admission policy is not enforced after 30 s"
        time.sleep(0.2)
    return server
