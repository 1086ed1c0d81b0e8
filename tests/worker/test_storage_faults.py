"""S3 on a bad day: what is tried again, for how long, and what is said in the end."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from fault_server import FOREVER, Kind
from faulty_store import JOURNAL, NAME, PART, Setting, asking

from kompressor_api.names import ExitCode
from kompressor_api.v1alpha1 import SourceLocation
from kompressor_worker.errors import ClaimLost, NoSpaceLeft, OutputOccupied, StorageError, Terminated
from kompressor_worker.storage.locations import open_source

PASSING: list[Kind] = ["unavailable", "internal", "drop", "lose-answer", "stall"]


@pytest.mark.parametrize("kind", PASSING)
def test_trouble_that_passes_is_not_noticed(setting: Setting, kind: Kind) -> None:
    """Every kind of request of a whole job, each of them failing twice (where it stalls: once)."""
    if kind == "stall":
        setting.environ |= {"KOMPRESSOR_STORAGE_TIMEOUT": "1", "KOMPRESSOR_STORAGE_ATTEMPTS": "8"}
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
