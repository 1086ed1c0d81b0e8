"""Ways to break a small checkpoint, and what is said of it then."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from sources import MemorySource, safetensors_bytes, with_header

from kompressor_api.names import ExitCode, Reason
from kompressor_worker.errors import KompressorError, UserError
from kompressor_worker.reading import read_layout

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
Break = Callable[[MemorySource], None]


def refused(source: MemorySource, kind: type[KompressorError]) -> str:
    with pytest.raises(KompressorError) as error:
        read_layout(source)
    assert type(error.value) is kind, repr(error.value)
    if kind is UserError:
        assert error.value.reason == Reason.UNSUPPORTED_MODEL
        assert error.value.exit_code == ExitCode.USER_ERROR
    return str(error.value)


def edit_json(source: MemorySource, file: str, change: Callable[[Any], Any]) -> None:
    content = json.loads(source.files[file])
    change(content)
    source.files[file] = json.dumps(content).encode()


def edit_header(source: MemorySource, change: Callable[[dict[str, Any]], Any], file: str = WEIGHTS) -> None:
    data = source.files[file]
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    change(entries)
    source.files[file] = with_header(entries, data[8 + length :])


def drop_tensor(source: MemorySource, name: str) -> None:
    """As if the tensor had never been written."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}

    def collect(entries: dict[str, Any]) -> None:
        del entries["__metadata__"], entries[name]
        shapes.update({n: (e["dtype"], tuple(e["shape"])) for n, e in entries.items()})

    edit_header(source, collect)
    source.files[WEIGHTS] = safetensors_bytes(shapes)


def reshape(source: MemorySource, name: str, shape: list[int]) -> None:
    edit_header(source, lambda entries: entries[name].update(shape=shape))


def config(**values: Any) -> Break:
    return lambda source: edit_json(source, "config.json", lambda c: c.update(values))


def only(*files: str) -> Break:
    """config.json beside these files alone."""

    def change(source: MemorySource) -> None:
        source.files = {"config.json": source.files["config.json"], **dict.fromkeys(files, b"x")}

    return change


def put(file: str, content: bytes) -> Break:
    return lambda source: source.files.update({file: content})


def without(file: str) -> Break:
    return lambda source: source.files.pop(file) and None


Q = "model.layers.1.self_attn.q_proj.weight"
