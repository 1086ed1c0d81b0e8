"""Checkpoints in memory, built byte by byte: what a test of headers and layouts wants to break."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from kompressor_worker.headers import FIRST_READ
from kompressor_worker.layout import DTYPE_BYTES
from kompressor_worker.storage import ObjectInfo

__all__ = ["MemorySource", "folder_source", "safetensors_bytes", "with_header"]


class MemorySource:
    """A Source over a dictionary; counts what is read, so that a test can tell that no weight was."""

    def __init__(self, files: Mapping[str, bytes], uri: str = "s3://bucket/model") -> None:
        self.uri = uri
        self.files = dict(files)
        self.bytes_read = 0
        self.reads = 0

    def list(self) -> dict[str, ObjectInfo]:
        return {name: ObjectInfo(name, len(data), hashlib.md5(data).hexdigest()) for name, data in self.files.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        data = self.files[name][start:stop]
        self.reads += 1
        self.bytes_read += len(data)
        return data

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        raise AssertionError(f"{name}: a layout reads no weights")

    @property
    def header_budget(self) -> int:
        """Bytes that reading a layout may take at most when all headers fit into the first read."""
        return sum(min(len(data), FIRST_READ) for data in self.files.values())


def folder_source(folder: Path) -> MemorySource:
    """The files of a folder; change `.files` to break them."""
    return MemorySource({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})


def safetensors_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]], fill: int = 0) -> bytes:
    """A valid file of tensors {name: (dtype, shape)}, all bytes `fill`."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * DTYPE_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return with_header(entries, bytes([fill]) * at)


def with_header(entries: Mapping[str, Any] | str | bytes, data: bytes) -> bytes:
    """A file with this header, right or wrong, in front of this data."""
    text = json.dumps(entries).encode() if isinstance(entries, Mapping) else entries
    header = text.encode() if isinstance(text, str) else text
    return len(header).to_bytes(8, "little") + header + data
