"""What every output and source promises, on a folder and on a real S3 server alike."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from places import PART, Place, publish, upload

from jobs import Bucket
from kompressor_api.names import Reason
from kompressor_worker.errors import ClaimLost, CorruptSource, NotFound, StorageError
from kompressor_worker.storage import JOURNAL, WORK, Part, Source


def test_working_objects(place: Place) -> None:
    output = place.output()
    output.replace(JOURNAL, b"{}", None)
    for unit in range(12):
        output.write(f"{WORK}unit-{unit}", b"x" * unit)
    output.write(f"{WORK}unit-3", b"again")
    found = output.read(f"{WORK}unit-3")
    assert found is not None and found[0] == b"again"
    output.delete([f"{WORK}unit-{unit}" for unit in range(12)])
    assert output.read(f"{WORK}unit-3") is None
    assert output.existing() == {}


def test_published_whole_and_read_back(place: Place) -> None:
    files = {"model-1.safetensors": os.urandom(2 * PART + 12345), "model-2.safetensors": os.urandom(17), "empty.bin": b""}
    output = place.output()
    etag = output.replace(JOURNAL, b"{}", None)
    uploads = {name: upload(output, name, data) for name, data in files.items()}
    assert output.existing() == {}, "parts are not to be seen"
    output.replace(JOURNAL, b"{...}", etag)
    for name, (id, parts) in uploads.items():
        output.complete(name, id, parts)
        output.complete(name, id, parts)
    output.write("tokenizer/tokenizer.json", b"[]")
    assert "config.json" not in output.existing()
    output.publish("config.json", b"{}")
    output.cleanup()
    source = place.source()
    listed = source.list()
    files |= {"tokenizer/tokenizer.json": b"[]", "config.json": b"{}"}
    assert {name: info.size for name, info in listed.items()} == {name: len(data) for name, data in files.items()}
    assert output.existing() == listed
    assert output.read_published("tokenizer/tokenizer.json") == b"[]"
    for name, data in files.items():
        assert source.read(name) == data
    big = files["model-1.safetensors"]
    assert source.read("model-1.safetensors", 7, 11) == big[7:11]
    assert source.read("model-1.safetensors", PART) == big[PART:]
    buffer = bytearray(PART)
    source.read_into("model-1.safetensors", 999, memoryview(buffer))
    assert buffer == big[999 : 999 + PART]


def test_many_threads_read_and_write(place: Place) -> None:
    data = os.urandom(8 * PART)
    output, view = place.output(), memoryview(data)
    id = output.begin("model.safetensors", len(data))
    with ThreadPoolExecutor(8) as pool:
        parts = list(
            pool.map(lambda i: output.write_part("model.safetensors", id, i + 1, i * PART, [view[i * PART : (i + 1) * PART]]), range(8))
        )
        output.complete("model.safetensors", id, parts)
        output.publish("config.json", b"{}")
        source = place.source()
        source.list()
        back = bytearray(len(data))
        target = memoryview(back)
        list(pool.map(lambda i: source.read_into("model.safetensors", i * PART, target[i * PART : (i + 1) * PART]), range(8)))
    assert back == data


def test_an_upload_goes_on_in_another_process(place: Place) -> None:
    data = os.urandom(2 * PART + 1)
    first = place.output()
    etag = first.replace(JOURNAL, b"1", None)
    id = first.begin("model.safetensors", len(data))
    part = first.write_part("model.safetensors", id, 1, 0, [memoryview(data)[:PART]])
    etag = first.replace(JOURNAL, b"2", etag)

    second = place.output()
    assert second.upload_exists("model.safetensors", id, [part])
    assert not second.upload_exists("model.safetensors", id, [part, Part(2, PART, len(data), '"0"')])
    assert not second.upload_exists("other.safetensors", id, [part])
    second.replace(JOURNAL, b"3", etag)
    assert second.upload_exists("model.safetensors", id, [part])
    _, parts = upload(second, "model.safetensors", data, id, (part,))
    second.complete("model.safetensors", id, parts)
    second.publish("config.json", b"{}")
    assert place.source().read("model.safetensors") == data


def test_a_publish_that_was_cut_off_is_done_again(place: Place) -> None:
    output = place.output()
    etag = output.replace(JOURNAL, b"1", None)
    id, parts = upload(output, "model.safetensors", b"abc")
    output.complete("model.safetensors", id, parts)
    output.publish("config.json", b"{}")

    again = place.output()
    again.replace(JOURNAL, b"2", etag)
    again.complete("model.safetensors", id, parts)
    again.publish("config.json", b"{}")
    again.cleanup()
    assert set(again.existing()) == {"config.json", "model.safetensors"}
    assert again.read(JOURNAL) is None


def test_an_upload_that_went_away_is_noticed(place: Place) -> None:
    output = place.output()
    data = os.urandom(PART + 1)
    id, parts = upload(output, "model.safetensors", data)
    output.abort("model.safetensors", id)
    output.abort("model.safetensors", id)
    assert not output.upload_exists("model.safetensors", id, parts)
    with pytest.raises((StorageError, NotFound)):
        output.complete("model.safetensors", id, parts)
    id, parts = upload(output, "model.safetensors", data)
    output.complete("model.safetensors", id, parts)


def test_cleanup_leaves_nothing(place: Place, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    output = place.output()
    output.probe()
    etag = output.replace(JOURNAL, b"1", None)
    upload(output, "model.safetensors", os.urandom(PART + 1))
    for unit in range(20):
        output.write(f"{WORK}unit-{unit}", b"x")
    etag = output.replace(JOURNAL, b"2", etag)
    last = place.output()
    last.replace(JOURNAL, b"3", etag)
    last.cleanup()
    assert last.existing() == {}
    if place.uri.startswith("s3"):
        bucket: Bucket = request.getfixturevalue("bucket")
        assert bucket.names("models/small") == []
        assert bucket.uploads("models/small") == []
    else:
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_output_among_the_working_objects(place: Place, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """It is claimed, grows and is published by itself, nobody sees it from outside, and what is left of it goes with the outer one's."""
    outer = place.output()
    outer.probe()
    outer.replace(JOURNAL, b"1", None)
    inner = outer.inner("student")
    etag = inner.replace(JOURNAL, b"1", None)
    publish(inner, {"model.safetensors": b"123456"})
    assert inner.existing().keys() == {"config.json", "model.safetensors"} and outer.existing() == {}
    again = place.output().inner("student")
    source = again.as_source()
    assert source.list().keys() == inner.existing().keys() and source.read("model.safetensors", 2, 4) == b"34"
    with pytest.raises(ClaimLost):
        inner.replace(JOURNAL, b"2", etag)  # it has gone with what was cleaned up
    other = outer.inner("other")
    other.replace(JOURNAL, b"1", None)
    upload(other, "model.safetensors", os.urandom(PART + 1))
    last = place.output()
    last.cleanup()
    if place.uri.startswith("s3"):
        bucket: Bucket = request.getfixturevalue("bucket")
        assert bucket.names("models/small") == bucket.uploads("models/small") == []
    else:
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda source: source.read("missing.json"), NotFound),
        (lambda source: source.read("model.safetensors", 0, 100), CorruptSource),
        (lambda source: source.read("model.safetensors", 90, 100), CorruptSource),
        (lambda source: source.read_into("model.safetensors", 5, memoryview(bytearray(2))), CorruptSource),
    ],
)
def test_reading_what_is_not_there(place: Place, ask: Callable[[Source], Any], error: type[Exception]) -> None:
    publish(place.output(), {"model.safetensors": b"123456"})
    for listed in (False, True):
        source = place.source()
        if listed:
            source.list()
        with pytest.raises(error, match=re.escape(place.uri)):
            ask(source)


def test_a_file_that_changes_while_it_is_read(place: Place, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    publish(place.output(), {"model.safetensors": b"123456"})
    source = place.source()
    source.list()
    assert source.read("model.safetensors", 1, 3) == b"23"
    if place.uri.startswith("s3"):
        bucket: Bucket = request.getfixturevalue("bucket")
        bucket.server.client().put_object(Bucket=bucket.name, Key="models/small/model.safetensors", Body=b"654321")
    else:
        (path,) = tmp_path.rglob("model.safetensors")
        path.write_bytes(b"654321")
    for stop in (4, 6):
        with pytest.raises(CorruptSource, match="changed while it was read"):
            source.read("model.safetensors", 0, stop)


def test_an_empty_source(place: Place) -> None:
    with pytest.raises(NotFound, match=re.escape(place.uri)) as caught:
        place.source().list()
    assert caught.value.reason == Reason.SOURCE_NOT_FOUND
