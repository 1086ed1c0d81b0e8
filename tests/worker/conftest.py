"""What the worker's tests share: a real S3 server, outputs, a tokenizer, compiled kernels."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from ctypes import CDLL
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fault_server import FaultServer
from faulty_store import Setting
from nursery import Nursery
from places import Place
from thin_models import thin_llama

from jobs import Bucket
from kompressor_worker.storage import patience
from s3 import S3Server

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from kompressor_worker.tokenizer import ModelTokenizer


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(s3_server: S3Server) -> Bucket:
    name = f"test-{uuid.uuid4().hex[:12]}"
    s3_server.client().create_bucket(Bucket=name)
    return Bucket(s3_server, name)


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery() as ready:
        yield ready


@pytest.fixture(scope="session")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty thin blocks: for many kills."""
    return thin_llama(tmp_path_factory.mktemp("deep"), 40, hidden=128, max_shard_size="4MB")


@pytest.fixture(scope="session")
def shallow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten of the same, in as many files: for one kill."""
    return thin_llama(tmp_path_factory.mktemp("shallow"), 10, hidden=128, max_shard_size="1MB")


@pytest.fixture(params=["file", "pvc", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "file":
        return Place(f"file://{tmp_path}/models/small")
    if request.param == "pvc":
        (tmp_path / "claims" / "data").mkdir(parents=True)
        return Place("pvc://data/models/small", {"KOMPRESSOR_CLAIM_DIRECTORY": str(tmp_path / "claims")})
    bucket: Bucket = request.getfixturevalue("bucket")
    return Place(bucket.uri("models/small"), bucket.environ, bucket.server.endpoint)


@pytest.fixture
def setting(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.02)
    with FaultServer(bucket.server.endpoint) as proxy:
        yield Setting(bucket, proxy)


@pytest.fixture(scope="session")
def tokenizer(trained_llama: Path) -> ModelTokenizer:
    from calibration_data import model_tokenizer

    return model_tokenizer(trained_llama)


@pytest.fixture(scope="session")
def encoding(trained_llama: Path) -> Tokenizer:
    """The tokenizers library itself."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(trained_llama / "tokenizer.json"))


@pytest.fixture(scope="session")
def lib() -> CDLL:
    from kompressor_worker.kernels import build

    if (found := build.library()) is None:
        pytest.skip("no C++ compiler on this machine")
    return found


@pytest.fixture
def threads() -> Iterator[None]:
    """torch's number of threads is as it was again afterwards."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads: None) -> None:
    """Little work goes faster so, and its last bits do not depend on the machine's cores."""
    import torch

    torch.set_num_threads(1)
