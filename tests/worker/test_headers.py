"""safetensors headers: what the format's own library refuses is refused, with a message; nothing crashes, nothing slips through."""

from __future__ import annotations

import json
from math import prod
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from sources import safetensors_bytes, with_header

from kompressor_worker.errors import CorruptSource
from kompressor_worker.headers import MAX_HEADER, header_length, parse_header
from kompressor_worker.layout import DTYPE_BYTES, StoredTensor

NAMES = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
TENSORS = st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), SHAPES), max_size=6)


def parse(file: bytes) -> list[StoredTensor]:
    length = header_length("x.safetensors", len(file), file[:64])
    return parse_header("x.safetensors", len(file), file[8 : 8 + length])


def library(file: bytes) -> dict[str, tuple[tuple[int, ...], bytes]] | None:
    """What the format's own library makes of it; None where it refuses."""
    try:
        found = deserialize(file)
    except SafetensorError:
        return None
    return {name: (tuple(entry["shape"]), bytes(entry["data"])) for name, entry in found}


def agree(file: bytes) -> bool:
    """Refused with CorruptSource, or read exactly as the library reads it. Says whether it was read."""
    try:
        tensors = parse(file)
    except CorruptSource as error:
        assert str(error).startswith("x.safetensors"), "the message names the file"
        assert ";" in str(error), "the message has a remedy"
        return False
    expected = library(file)
    assert expected is not None, "accepted, but the library refuses it"
    assert {t.name: (t.shape, file[t.start : t.stop]) for t in tensors} == expected
    return True


@given(TENSORS)
def test_valid_files_are_read_as_the_library_reads_them(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    assert agree(safetensors_bytes(tensors, fill=7))


@given(TENSORS, st.data())
@settings(max_examples=300)
def test_a_flipped_byte_in_the_header(tensors: dict[str, tuple[str, tuple[int, ...]]], data: st.DataObject) -> None:
    file = bytearray(safetensors_bytes(tensors))
    header = 8 + int.from_bytes(file[:8], "little")
    file[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    agree(bytes(file))


@given(TENSORS, st.data())
def test_truncated_anywhere(tensors: dict[str, tuple[str, tuple[int, ...]]], data: st.DataObject) -> None:
    file = safetensors_bytes(tensors)
    assert not agree(file[: data.draw(st.integers(0, len(file) - 1))])


@given(TENSORS, st.binary(min_size=1, max_size=9))
def test_bytes_after_the_end(tensors: dict[str, tuple[str, tuple[int, ...]]], more: bytes) -> None:
    assert not agree(safetensors_bytes(tensors) + more)


@given(st.binary(max_size=200))
def test_noise(noise: bytes) -> None:
    agree(noise)
    agree(with_header(noise, b""))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(TENSORS.filter(bool), st.sampled_from(["dtype", "shape", "data_offsets", "extra", "entry"]), JSON, st.data())
@settings(max_examples=300)
def test_any_value_in_any_place(tensors: dict[str, tuple[str, tuple[int, ...]]], place: str, value: Any, data: st.DataObject) -> None:
    file = safetensors_bytes(tensors)
    length = int.from_bytes(file[:8], "little")
    entries = json.loads(file[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(tensors)))
    if place == "entry":
        entries[name] = value
    else:
        entries[name][place] = value
    agree(with_header(entries, file[8 + length :]))


@given(TENSORS.filter(lambda t: sum(prod(shape) for _, shape in t.values()) > 0), st.data())
def test_moved_offsets(tensors: dict[str, tuple[str, tuple[int, ...]]], data: st.DataObject) -> None:
    file = safetensors_bytes(tensors)
    length = int.from_bytes(file[:8], "little")
    entries = json.loads(file[8 : 8 + length])
    name = data.draw(st.sampled_from([n for n, (_, shape) in tensors.items() if prod(shape)]))
    shift = data.draw(st.integers(-20, 20).filter(bool))
    entries[name]["data_offsets"] = [at + shift for at in entries[name]["data_offsets"]]
    assert not agree(with_header(entries, file[8 + length :]))


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


MESSAGES: list[tuple[str, bytes, str]] = [
    ("empty", b"", "x.safetensors: 0 bytes, too short for a safetensors header; upload the file again"),
    ("lfs", b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer, not the weights; run `git lfs pull`"),
    ("length", (MAX_HEADER + 1).to_bytes(8, "little"), f"a header of {MAX_HEADER + 1} bytes, above {MAX_HEADER}"),
    ("header cut", (99).to_bytes(8, "little") + b"{}", "truncated: the header alone has 107 bytes, the file 10"),
    ("not json", with_header("{,", b""), "header: not JSON (Expecting property name"),
    ("utf-16", with_header("{}".encode("utf-16"), b""), "header: not JSON ('utf-8' codec can't decode"),
    ("deep", with_header("[" * 100_000, b""), "header: not JSON (maximum recursion depth"),
    ("list", with_header("[]", b""), "header: a JSON object is expected, not list"),
    ("metadata", with_header({"__metadata__": {"a": 1}}, b""), "__metadata__ must map names to strings"),
    ("twice", with_header('{"a": 1, "a": 2}', b""), "header: 'a' stands there twice"),
    ("name", with_header({"a\nb": entry()}, bytes(8)), "'a\\nb': the name has unprintable characters"),
    ("keys", with_header({"a": {"dtype": "F32"}}, b""), "'a': dtype, shape and data_offsets are expected"),
    ("dtype", with_header({"a": entry("F12")}, bytes(8)), "'a': dtype 'F12' is not one of F64, F32"),
    ("shape", with_header({"a": entry(shape=[-2])}, bytes(8)), "'a': shape [-2] is not a list of sizes"),
    ("offsets", with_header({"a": entry(offsets=[8, 0])}, bytes(8)), "'a': data_offsets [8, 0] is not [start, stop]"),
    ("size", with_header({"a": entry(shape=[3])}, bytes(8)), "'a': 8 bytes stored, but F32 [3] takes 12"),
    ("gap", with_header({"a": entry(offsets=[4, 12])}, bytes(12)), "offsets of 'the header' and 'a' leave a gap"),
    ("overlap", with_header({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "offsets of 'a' and 'b' overlap"),
    ("data cut", with_header({"a": entry()}, bytes(7)), "truncated: 'a' ends at byte"),
    ("more data", with_header({"a": entry()}, bytes(9)), "1 bytes after the last tensor 'a' belong to none"),
]


@pytest.mark.parametrize(("file", "message"), [pytest.param(f, m, id=i) for i, f, m in MESSAGES])
def test_messages(file: bytes, message: str) -> None:
    with pytest.raises(CorruptSource) as error:
        parse(file)
    assert message in str(error.value)
    assert "upload the file again" in str(error.value) or "safetensors library" in str(error.value)
