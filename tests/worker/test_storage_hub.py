"""`hf://` against a small local hub: pinned revisions, redirects to signed addresses, gates, and a bad network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub_server import HubServer, Repository
from huggingface_hub import HfApi, constants

from kompressor_api.names import Reason
from kompressor_api.v1alpha1 import OutputSpec, SourceLocation
from kompressor_worker.errors import AccessDenied, CorruptSource, NotFound, StorageError, UserError
from kompressor_worker.storage import patience
from kompressor_worker.storage.hub import HubSource
from kompressor_worker.storage.locations import open_output, open_source

WEIGHTS = os.urandom(3 << 20)
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "original/model.bin": b"x" * 5000, "original/params.json": b"[]"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    with HubServer() as server:
        server.repositories["meta/small"] = Repository(FILES)
        yield server


def open_hub(hub: HubServer, uri: str = "hf://meta/small", revision: str | None = None, **environ: str) -> HubSource:
    environ = {"HF_ENDPOINT": hub.endpoint, "KOMPRESSOR_STORAGE_TIMEOUT": "2", "KOMPRESSOR_STORAGE_ATTEMPTS": "3", **environ}
    source = open_source(SourceLocation(uri=uri, revision=revision), environ)
    assert isinstance(source, HubSource)
    return source


def test_lists_and_reads(hub: HubServer) -> None:
    source = open_hub(hub)
    assert {name: info.size for name, info in source.list().items()} == {name: len(data) for name, data in FILES.items()}
    for name, data in FILES.items():
        assert source.read(name) == data
    assert source.read("model.safetensors", 10, 20) == WEIGHTS[10:20]
    back = bytearray(len(WEIGHTS))
    view = memoryview(back)
    step = 300_000
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda o: source.read_into("model.safetensors", o, view[o : o + step]), range(0, len(back), step)))
    assert back == WEIGHTS


def test_a_folder_of_a_repository(hub: HubServer) -> None:
    source = open_hub(hub, "hf://meta/small/original")
    assert set(source.list()) == {"model.bin", "params.json"}
    assert source.read("params.json") == b"[]"
    assert source.read("model.bin", 4990) == b"x" * 10
    with pytest.raises(NotFound, match="no files at commit"):
        open_hub(hub, "hf://meta/small/elsewhere").list()


def test_the_endpoint_of_the_location_comes_first(hub: HubServer) -> None:
    location = SourceLocation(uri="hf://meta/small", endpoint=hub.endpoint)
    assert open_source(location, {"HF_ENDPOINT": "http://127.0.0.1:9"}).read("config.json") == b"{}"


def test_the_revision_is_pinned_to_a_commit(hub: HubServer) -> None:
    repository = hub.repositories["meta/small"]
    first = repository.commit
    source = open_hub(hub)
    second = repository.push({"config.json": b"{'new': 1}"})
    assert source.revision == first
    assert source.read("config.json") == b"{}" and "model.safetensors" in source.list()
    assert open_hub(hub).revision == second
    assert open_hub(hub, revision=first).read("config.json") == b"{}"
    repository.branches["refs/pr/1"] = first
    assert open_hub(hub, revision="refs/pr/1").revision == first
    with pytest.raises(NotFound, match=r"no such revision .*correct model.source.revision") as caught:
        open_hub(hub, revision="v9")
    assert caught.value.reason == Reason.SOURCE_NOT_FOUND


def test_the_token_goes_to_the_hub_alone(hub: HubServer) -> None:
    hub.repositories["meta/private"] = Repository(FILES, token="hf_secret")
    source = open_hub(hub, "hf://meta/private", SOURCE_HF_TOKEN="hf_secret", HF_TOKEN="hf_other")
    assert source.read("model.safetensors") == WEIGHTS
    assert open_hub(hub, "hf://meta/private", HF_TOKEN="hf_secret").read("config.json") == b"{}"
    network = [line for line in hub.seen if "/cdn/" in line]
    assert network and all("hf_secret" not in line for line in network)
    assert all(line.endswith("Bearer hf_secret") for line in hub.seen if "/cdn/" not in line)


@pytest.mark.parametrize("allowed", [True, False])
def test_a_login_of_this_machine_is_used_where_no_token_is_given(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    hub.repositories["meta/private"] = Repository(FILES, token="hf_login")
    (tmp_path / "token").write_text("hf_login")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", not allowed)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if allowed:
        assert open_hub(hub, "hf://meta/private").read("config.json") == b"{}"
    else:
        with pytest.raises(AccessDenied, match="HTTP 401"):
            open_hub(hub, "hf://meta/private")
    with pytest.raises(AccessDenied, match="HTTP 401"):
        open_hub(hub, "hf://meta/private", HF_TOKEN="hf_other")


def test_refusals(hub: HubServer) -> None:
    hub.repositories["meta/private"] = Repository(FILES, token="hf_secret")
    hub.repositories["meta/gated"] = Repository(FILES, token="hf_secret", gated=True)
    with pytest.raises(AccessDenied, match=r"hf://meta/private: .*HTTP 401.*HF_TOKEN"):
        open_hub(hub, "hf://meta/private")
    with pytest.raises(AccessDenied, match=r"HTTP 403, GatedRepo, .*accept the model's terms"):
        open_hub(hub, "hf://meta/gated").read("config.json")
    with pytest.raises(AccessDenied, match=r"hf://meta/missing"):
        open_hub(hub, "hf://meta/missing")
    with pytest.raises(NotFound, match=r"hf://meta/missing.*RepoNotFound"):
        open_hub(hub, "hf://meta/missing", HF_TOKEN="hf_any")
    source = open_hub(hub)
    with pytest.raises(NotFound, match=r"no file missing.json at commit"):
        source.read("missing.json")
    with pytest.raises(CorruptSource, match="ends at byte 2, but bytes up to 100"):
        source.read("config.json", 0, 100)
    with pytest.raises(UserError, match="read-only"):
        open_output(OutputSpec.model_construct(uri="hf://meta/small"), {})


def test_addresses_that_run_out(hub: HubServer) -> None:
    source = open_hub(hub)
    assert source.read("model.safetensors", 0, 10) == WEIGHTS[:10]
    assert source.read("model.safetensors", 10, 20) == WEIGHTS[10:20]
    assert sum("/resolve/" in line for line in hub.seen) == 1, "a redirect is asked for once"
    hub.signature = "0123"
    assert source.read("model.safetensors", 20, 30) == WEIGHTS[20:30]
    assert sum("/resolve/" in line for line in hub.seen) == 2


def test_trouble_that_passes(hub: HubServer) -> None:
    hub.trouble = [503, 429]
    source = open_hub(hub)
    hub.trouble = [500, 502]
    hub.break_after = [2 << 20, 100]
    assert source.read("model.safetensors") == WEIGHTS


def test_trouble_that_stays(hub: HubServer) -> None:
    source = open_hub(hub)
    said = r"hf://meta/small: .* at http://.* failed after 3 attempts: .*HTTP 503 trouble"
    hub.trouble = [503] * 3
    with pytest.raises(StorageError, match=said):
        open_hub(hub)
    hub.trouble = [503] * 3
    with pytest.raises(StorageError, match=said):
        source.read("config.json")


def test_a_hub_that_serves_other_bytes_than_it_lists(hub: HubServer) -> None:
    source = open_hub(hub)
    files = hub.repositories["meta/small"].history[source.revision]
    files["config.json"] = b"[]"
    with pytest.raises(CorruptSource, match=r"config.json has not the digest"):
        source.read("config.json")


def test_nobody_listens() -> None:
    location = SourceLocation(uri="hf://meta/small", endpoint="http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"failed after 2 attempts.*check that the hub is up"):
        open_source(location, {"KOMPRESSOR_STORAGE_ATTEMPTS": "2"})


def test_the_local_hub_speaks_as_the_real_client_expects(hub: HubServer) -> None:
    info = HfApi(endpoint=hub.endpoint, token=False).model_info("meta/small", files_metadata=True, revision="main")
    source = open_hub(hub)
    assert info.sha == source.revision
    listed = {s.rfilename: (s.size, s.lfs.sha256 if s.lfs else s.blob_id) for s in info.siblings or ()}
    assert listed == {name: (entry.size, entry.etag) for name, entry in source.list().items()}
