"""The header of a safetensors file: 8 bytes of length, JSON, then the tensors' bytes without gaps.

Everything that a broken or hostile file can claim is refused here, before a weight is read: the rules are those of the
format's own library (https://github.com/huggingface/safetensors#format), the messages say which file, which tensor and
what to do.
"""

from __future__ import annotations

import json
from math import prod
from typing import Any, NoReturn

from kompressor_api.names import Reason
from kompressor_worker.errors import CorruptSource, UserError
from kompressor_worker.layout import DTYPE_BYTES, StoredTensor

__all__ = ["FIRST_READ", "header_length", "load_json", "parse_header"]

FIRST_READ = 256 * 1024
"""Bytes fetched of every file at first: the whole header of most shards, so that most need one request."""

MAX_HEADER = 100_000_000
"""Bytes of a header that the format's own library accepts."""

EXOTIC = ("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64")
"""Types that the format knows and no checkpoint to start from is stored in."""

UPLOAD_AGAIN = "upload the file again"


def header_length(file: str, size: int, head: bytes) -> int:
    """Bytes of JSON after the first eight, from the beginning of a file of `size` bytes. Raises CorruptSource."""
    if head.startswith(b"version https://git-lfs"):
        raise CorruptSource(f"{file}: a Git LFS pointer, not the weights; run `git lfs pull` and {UPLOAD_AGAIN}")
    if size < 8:
        raise CorruptSource(f"{file}: {size} bytes, too short for a safetensors header; {UPLOAD_AGAIN}")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER:
        raise CorruptSource(f"{file}: a header of {length} bytes, above {MAX_HEADER}: not a safetensors file; {UPLOAD_AGAIN}")
    if 8 + length > size:
        raise CorruptSource(f"{file}: truncated: the header alone has {8 + length} bytes, the file {size}; {UPLOAD_AGAIN}")
    return length


def parse_header(file: str, size: int, text: bytes) -> list[StoredTensor]:
    """The tensors that a header describes, by offset; `text` is the JSON, `size` the bytes of the whole file.

    Raises CorruptSource."""
    entries = load_json(f"{file}: header", text)
    begin = 8 + len(text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CorruptSource(f"{file}: __metadata__ must map names to strings; write the file with the safetensors library")
    tensors = [_parse_entry(file, name, entry, begin) for name, entry in entries.items()]
    tensors.sort(key=lambda t: (t.start, t.stop))
    _check_cover(file, size, begin, tensors)
    return tensors


def load_json(what: str, text: bytes, duplicates: bool = False) -> dict[str, Any]:
    """A JSON object; the same key twice only with `duplicates`, where the last one counts. Raises CorruptSource."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs) and not duplicates:
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CorruptSource(f"{what}: {twice!r} stands there twice; {UPLOAD_AGAIN}")
        return found

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique)  # bytes could also be UTF-16 to json
    except (ValueError, RecursionError) as error:
        raise CorruptSource(f"{what}: not JSON ({error}); {UPLOAD_AGAIN}") from error
    if not isinstance(value, dict):
        raise CorruptSource(f"{what}: a JSON object is expected, not {type(value).__name__}; {UPLOAD_AGAIN}")
    return value


def _parse_entry(file: str, name: str, entry: Any, begin: int) -> StoredTensor:
    def bad(what: str) -> NoReturn:
        raise CorruptSource(f"{file}: {name!r}: {what}; {UPLOAD_AGAIN}")

    if not name.isprintable():  # a lone surrogate, a NUL, a line break: no name that a loader could ask for
        bad("the name has unprintable characters")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        bad("dtype, shape and data_offsets are expected")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype in EXOTIC:
        raise UserError(f"{file}: {name!r}: stored as {dtype}; start from a checkpoint in F32, F16 or BF16", Reason.UNSUPPORTED_MODEL)
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        bad(f"dtype {dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
    if not _counts(shape):
        bad(f"shape {shape!r} is not a list of sizes")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        bad(f"data_offsets {offsets!r} is not [start, stop]")
    expected = prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        bad(f"{offsets[1] - offsets[0]} bytes stored, but {dtype} {shape} takes {expected}")
    return StoredTensor(name, dtype, tuple(shape), file, begin + offsets[0], begin + offsets[1])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _check_cover(file: str, size: int, begin: int, tensors: list[StoredTensor]) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    at, before = begin, "the header"
    for tensor in tensors:
        if tensor.start != at:
            kind = "overlap" if tensor.start < at else "leave a gap"
            raise CorruptSource(
                f"{file}: offsets of {before!r} and {tensor.name!r} {kind}: {tensor.start} where {at} is expected; {UPLOAD_AGAIN}"
            )
        at, before = tensor.stop, tensor.name
    if at > size:
        raise CorruptSource(f"{file}: truncated: {before!r} ends at byte {at}, the file at {size}; {UPLOAD_AGAIN}")
    if at < size:
        raise CorruptSource(f"{file}: {size - at} bytes after the last tensor {before!r} belong to none; {UPLOAD_AGAIN}")
