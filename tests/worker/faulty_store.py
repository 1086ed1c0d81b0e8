"""A bucket behind a proxy that fails on demand, and every kind of request that can be made of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from fault_server import FaultServer

from jobs import Bucket
from kompressor_api.v1alpha1 import OutputSpec, SourceLocation
from kompressor_worker.storage import WORK, Output, Source
from kompressor_worker.storage.locations import open_output, open_source

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
