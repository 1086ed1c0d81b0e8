"""Whose output it is, on a folder and on a real S3 server alike: compare-and-swap, races, and a worker that wakes too late."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from places import PART, Place, publish, upload

from kompressor_worker.errors import ClaimLost, NotFound, OutputOccupied
from kompressor_worker.storage import JOURNAL, WORK


def test_an_upload_that_was_begun_and_lost_does_not_stand_in_the_way(place: Place) -> None:
    """Killed before its first commit, a worker leaves an upload that no journal names; the next one begins anew."""
    killed = place.output()
    claimed = killed.replace(JOURNAL, b"1", None)
    upload(killed, "model.safetensors", bytes(PART + 1))
    output = place.output()
    output.replace(JOURNAL, b"2", claimed)
    publish(output, {"model.safetensors": b"weights"})
    assert place.source().read("model.safetensors") == b"weights"


def test_probe_finds_conditional_writes_and_leaves_nothing(place: Place) -> None:
    output = place.output()
    assert output.conditional is None
    assert output.probe() is True
    assert output.conditional is True
    assert output.existing() == {}
    output.cleanup()
    with pytest.raises(NotFound):
        place.source().list()


def test_replace_is_compare_and_swap(place: Place) -> None:
    output = place.output()
    assert output.read(JOURNAL) is None
    first = output.replace(JOURNAL, b"1", None)
    assert output.read(JOURNAL) == (b"1", first)
    second = output.replace(JOURNAL, b"2", first)
    assert second != first
    for stale in (None, first, second + "x" if place.uri.startswith("s3") else "7-x"):
        with pytest.raises(ClaimLost):
            output.replace(JOURNAL, b"3", stale)
    assert output.read(JOURNAL) == (b"2", second)
    output.delete([JOURNAL, f"{WORK}never-there"])
    assert output.read(JOURNAL) is None
    with pytest.raises(ClaimLost):
        output.replace(JOURNAL, b"3", second)


RACER = """
import json, os, sys
from kompressor_api.v1alpha1 import OutputSpec
from kompressor_worker.errors import ClaimLost
from kompressor_worker.storage.locations import open_output
place = json.loads(sys.argv[1])
won = []
output = open_output(OutputSpec(uri=place["uri"], endpoint=place["endpoint"]), place["environ"])
for _ in range(25):
    found = output.read(".kompressor/counter")
    value, etag = (int(found[0]), found[1]) if found else (0, None)
    try:
        output.replace(".kompressor/counter", str(value + 1).encode(), etag)
        won.append(value + 1)
    except ClaimLost:
        pass
print(json.dumps(won))
"""


def test_processes_racing_for_one_object_never_both_win(place: Place) -> None:
    place.output().probe()
    argument = json.dumps({"uri": place.uri, "endpoint": place.endpoint, "environ": place.environ})
    racers = [subprocess.Popen([sys.executable, "-c", RACER, argument], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    won = [value for racer in racers for value in json.loads(racer.communicate(timeout=120)[0])]
    assert all(racer.returncode == 0 for racer in racers)
    assert won and len(won) == len(set(won)), "two processes wrote on top of the same object"
    found = place.output().read(f"{WORK}counter")
    assert found is not None and int(found[0]) >= max(won)


def test_threads_racing_for_the_first_claim(place: Place) -> None:
    outputs = [place.output() for _ in range(6)]
    outputs[0].probe()
    start = threading.Barrier(len(outputs))

    def claim(index: int) -> bool:
        start.wait()
        try:
            outputs[index].replace(JOURNAL, str(index).encode(), None)
        except ClaimLost:
            return False
        return True

    with ThreadPoolExecutor(len(outputs)) as pool:
        won = list(pool.map(claim, range(len(outputs))))
    assert won.count(True) == 1
    found = place.output().read(JOURNAL)
    assert found is not None and found[0] == str(won.index(True)).encode()


def test_an_occupied_output_is_refused(place: Place) -> None:
    publish(place.output(), {"model.safetensors": b"theirs"})
    output = place.output()
    assert set(output.existing()) == {"config.json", "model.safetensors"}
    with pytest.raises(OutputOccupied, match=re.escape(place.uri)):
        output.publish("config.json", b'{"mine": 1}')
    output.cleanup()
    assert place.source().read("config.json") == b"{}"


def test_a_stale_worker_changes_nothing(place: Place) -> None:
    """A wakes after B took over: nothing that A still does reaches what B publishes."""
    data = os.urandom(PART + 7)
    stale = place.output()
    first = stale.replace(JOURNAL, b"A", None)
    id = stale.begin("model.safetensors", len(data))
    part = stale.write_part("model.safetensors", id, 1, 0, [memoryview(data)[:PART]])
    second = stale.replace(JOURNAL, b"A1", first)

    owner = place.output()
    third = owner.replace(JOURNAL, b"B", second)
    with pytest.raises(ClaimLost):
        stale.replace(JOURNAL, b"A2", second)
    _, parts = upload(owner, "model.safetensors", data, id, (part,))
    owner.complete("model.safetensors", id, parts)
    with pytest.raises(ClaimLost):
        stale.write_part("model.safetensors", id, 2, PART, [memoryview(b"wrong!!")])
    owner.replace(JOURNAL, b"B1", third)
    owner.publish("config.json", b"{}")
    owner.cleanup()
    with pytest.raises(ClaimLost):
        stale.write_part("model.safetensors", id, 1, 0, [memoryview(b"wrong")])
    with pytest.raises(ClaimLost):
        stale.replace(JOURNAL, b"A2", second)
    with pytest.raises(OutputOccupied):
        stale.publish("config.json", b"A")
    source = place.source()
    assert set(source.list()) == {"config.json", "model.safetensors"}
    assert source.read("model.safetensors") == data
