"""Checks a published result: reads every byte of it and compares with what config.json, the index and kompressor.json say."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from kompressor_api.names import Reason
from kompressor_api.v1alpha1 import SourceLocation
from kompressor_worker.checkpoint import Checkpoint, read_checkpoint
from kompressor_worker.errors import BadNumerics, CorruptSource, UserError
from kompressor_worker.formats import bitmask
from kompressor_worker.formats.stored import PlannedTensor, planned_tensors
from kompressor_worker.headers import load_json
from kompressor_worker.layout import StoredTensor
from kompressor_worker.pipeline import Limits, Load, Prefetcher
from kompressor_worker.publish import CHUNK, CONFIG, REPORT
from kompressor_worker.schemes import SCHEMES, Scheme
from kompressor_worker.storage import Source
from kompressor_worker.storage.locations import named, open_source

FLOATS = ("F32", "F16", "BF16")
SCALES = ("_scale", "_scale_inv", "_global_scale")
E8M0_NAN = 255


def verify(uri: str, endpoint: str | None, region: str | None, environ: Mapping[str, str]) -> dict[str, Any]:
    """Counts of what was checked. Raises CorruptSource (missing or damaged tensor), BadNumerics (a scale is NaN or Inf), UserError."""
    source = open_source(wanted_source(uri, endpoint, region), environ, threading.Event())
    uri = source.uri
    if (found := gguf_report(source)) is not None:
        return verify_gguf(source, found)
    checkpoint = read_checkpoint(source)
    report = read_report(source, checkpoint)
    try:
        check_files(source, checkpoint.file_sizes, report)
        check_names(checkpoint, report)
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptSource(
            f"{source.uri}: {REPORT} lacks what Kompressor writes ({type(error).__name__}: {error}); upload the result again"
        ) from error
    seen = {"tensors": 0, "bytes": 0, "digests": 0, "scales": 0}
    for tensor, digest, bad in read_all(source, checkpoint.tensors.values()):
        seen["tensors"] += 1
        seen["bytes"] += tensor.nbytes
        if tensor.name.endswith(SCALES):
            seen["scales"] += 1
        if bad:
            raise BadNumerics(f"{uri}: {tensor.name}: {bad} values are NaN or Inf; compress the model again")
        if recorded := report.get("tensors", {}).get(tensor.name):
            seen["digests"] += 1
            if recorded != f"xxh3-128:{digest}":
                raise CorruptSource(f"{uri}: {tensor.name} in {tensor.file} is not what was written ({recorded}); upload it again")
    return {"uri": uri, **seen, "quantizedLinears": len(report.get("linears", {}))}


def gguf_report(source: Source) -> dict[str, Any] | None:
    """Of a result in GGUF; None: it is none."""
    if REPORT not in source.list():
        return None
    report = load_json(REPORT, source.read(REPORT))
    return report if "gguf" in report else None


def verify_gguf(source: Source, report: Mapping[str, Any]) -> dict[str, Any]:
    """By ranges, as all is read: of each file its header, then tensor by tensor, of a stack of experts each by itself. Raises
    CorruptSource, BadNumerics."""
    try:
        tensors = gguf_tensors(source, report)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise CorruptSource(
            f"{source.uri}: {REPORT} lacks what Kompressor writes ({type(error).__name__}: {error}); upload the result again"
        ) from error
    seen = {"tensors": 0, "bytes": 0, "digests": 0, "scales": 0}
    for tensor, digest, bad in read_all(source, tensors):
        seen["tensors"] += 1
        seen["bytes"] += tensor.nbytes
        seen["digests"] += 1
        if bad:
            raise BadNumerics(f"{source.uri}: {tensor.name}: {bad} values are NaN or Inf; compress the model again")
        if (recorded := report["tensors"][tensor.name]) != f"xxh3-128:{digest}":
            raise CorruptSource(f"{source.uri}: {tensor.name} in {tensor.file} is not what was written ({recorded}); upload it again")
    return {"uri": source.uri, **seen, "quantizedLinears": len(report.get("linears", {}))}


def gguf_tensors(source: Source, report: Mapping[str, Any]) -> list[StoredTensor]:
    """Where they lie in files whose headers are those that were written. Raises CorruptSource, and whatever a report that is none of ours
    makes of this."""
    sizes = {name: info.size for name, info in source.list().items()}
    check_files(source, sizes, report)
    files, placed = report["gguf"]["files"], report["gguf"]["places"]
    for file in files:
        name = file["name"]
        if sizes[name] != file["size"]:
            raise CorruptSource(f"{source.uri}: {name} has {sizes[name]:,} bytes, not {file['size']:,}; upload it again")
        if digest_of(source, name, file["header"]) != file["digest"]:
            raise CorruptSource(f"{source.uri}: the header of {name} is not what was written; upload it again")
    if missing := sorted(set(report["tensors"]) ^ set(placed)):
        raise CorruptSource(f"{source.uri}: {REPORT} does not say where {missing[0]!r} lies, or what it is; upload the result again")
    return [
        StoredTensor(name, kind if kind in FLOATS else "U8", (stop - start,), files[number]["name"], start, stop)
        for name, (number, start, stop, kind) in sorted(placed.items(), key=lambda item: item[1][:2])
    ]


def wanted_source(uri: str, endpoint: str | None, region: str | None) -> SourceLocation:
    """The result that a person names. Raises UserError."""
    if "://" not in uri:
        uri = Path(uri).absolute().as_uri()
    return named(SourceLocation, uri, endpoint, region, "s3://, hf://, pvc://, file://")


def read_report(source: Source, checkpoint: Checkpoint) -> dict[str, Any]:
    if REPORT not in source.list():
        if "quantization_config" not in checkpoint.config:
            raise UserError(f"{source.uri}: no {REPORT} and no quantization_config: this is not a result", Reason.SOURCE_NOT_FOUND)
        return {}
    return load_json(REPORT, source.read(REPORT))


def check_files(source: Source, sizes: Mapping[str, int], report: Mapping[str, Any]) -> None:
    """Every file that the report names is there, and those that are not weights are byte for byte what was written, config.json first."""
    if not report:
        return
    if missing := sorted(set(report["files"]) - set(sizes)):
        raise CorruptSource(f"{source.uri}: {missing[0]} is missing; upload the result again")
    for name, recorded in sorted(report.get("digests", {}).items(), key=lambda item: item[0] != CONFIG):
        found = digest_of(source, name, sizes[name])
        if found != recorded:
            raise CorruptSource(f"{source.uri}: {name} is not what was written ({recorded}); upload it again")


def digest_of(source: Source, name: str, size: int) -> str:
    hasher = xxhash.xxh3_128()
    for offset in range(0, size, CHUNK):
        hasher.update(source.read(name, offset, min(offset + CHUNK, size)))
    return f"xxh3-128:{hasher.hexdigest()}"


def check_names(checkpoint: Checkpoint, report: Mapping[str, Any]) -> None:
    """Every tensor that the report names is there, no other, and linears have the tensors of what they are stored as."""
    if not report:
        return
    missing = sorted(set(report["tensors"]) - set(checkpoint.tensors))
    extra = sorted(set(checkpoint.tensors) - set(report["tensors"]))
    if missing or extra:
        what = f"{missing[0]!r} is missing" if missing else f"{extra[0]!r} is not in {REPORT}"
        raise CorruptSource(f"{what}: the files are not of one run; upload the result again")
    for name, linear in report["linears"].items():
        check_stored(checkpoint, planned_tensors(name, tuple(linear["shape"]), linear["dtype"], scheme_of(linear)), linear["scheme"])
    for name, linear in report.get("pruned", {}).items():
        if stored := linear.get("bitmask"):
            planned = bitmask.planned_tensors(name, tuple(linear["shape"]), stored["dtype"], stored["values"])
            check_stored(checkpoint, planned, bitmask.FORMAT)


def scheme_of(linear: Mapping[str, Any]) -> Scheme:
    """Of a quantised linear, from its entry in the report."""
    scheme = SCHEMES[linear["scheme"]]
    return scheme if linear.get("groupSize") is None else scheme.with_group_size(linear["groupSize"])


def check_stored(checkpoint: Checkpoint, tensors: Iterable[PlannedTensor], what: str) -> None:
    for planned in tensors:
        stored = checkpoint.tensors.get(planned.name)
        if stored is None or (stored.dtype, stored.shape) != (planned.dtype, planned.shape):
            found = f"is {stored.dtype} {list(stored.shape)}" if stored else "is missing"
            raise CorruptSource(f"{planned.name}: {found}; {what} has {planned.dtype} {list(planned.shape)} there")


def read_all(source: Source, tensors: Iterable[StoredTensor]) -> Iterator[tuple[StoredTensor, str, int]]:
    """Every tensor with its digest and its number of non-finite values, read in slices."""
    limits = Limits()
    loads = [
        Load(((t, start, min(start + limits.slice, t.nbytes)),)) for t in tensors for start in range(0, max(1, t.nbytes), limits.slice)
    ]
    hasher, bad = xxhash.xxh3_128(), 0
    with Prefetcher(source, loads, limits) as prefetched:
        for loaded in prefetched:
            ((tensor, _, stop),) = loaded.load.ranges
            view = loaded.views[tensor.name]
            hasher.update(view)
            bad += count_nonfinite(tensor, view)
            if stop == tensor.nbytes:
                yield tensor, hasher.hexdigest(), bad
                hasher, bad = xxhash.xxh3_128(), 0


def count_nonfinite(tensor: StoredTensor, view: memoryview) -> int:
    if tensor.dtype == "U8" and tensor.name.endswith("weight_scale"):
        return bytes(view).count(E8M0_NAN)
    if tensor.dtype == "F8_E4M3":  # two codes are NaN, there is no infinity
        data = bytes(view)
        return data.count(0x7F) + data.count(0xFF)
    from kompressor_worker import kernels  # torch, which whoever reads headers alone does without
    from kompressor_worker.tensors import float_view

    values = float_view(view, tensor.dtype)
    return kernels.nonfinite(values) if values is not None else 0
