"""From finished parts to a result that readers can see: all at once, `config.json` last.

Until config.json is there no loader opens the output, and every reader of ours goes by that. Each step may be cut off and done again.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from math import prod
from typing import TYPE_CHECKING, Any

import xxhash

from kompressor_worker.errors import NoSpaceLeft, OutputOccupied, UploadLost
from kompressor_worker.formats import bitmask
from kompressor_worker.formats.compressed_tensors import other_modules, quantization_config
from kompressor_worker.journal import Journal, differing
from kompressor_worker.layout import ModelLayout
from kompressor_worker.report_html import UnitTime, render
from kompressor_worker.shards import OutputPlan, PlacedTensor
from kompressor_worker.storage import JOURNAL, Output, Source

if TYPE_CHECKING:
    from kompressor_worker.stream import Work

REPORT = "kompressor.json"
PAGE = "report.html"
"""The same for a person, with times: two runs of a job do not write it alike, so no digest is kept. Nor do they REPORT, where an engine has
measured something: it stands under `runtime`, and in verdicts on it."""
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
CHUNK = 16 << 20
"""Bytes of a part where a large file is copied."""
QUANTIZATION = ("quantization_config", "compression_config")
"""Where config.json says how a checkpoint is quantised; the second is an older name that loaders still read."""


def publish(
    work: Work, source: Source, output: Output, journal: Journal, report: Mapping[str, Any], beside: Mapping[str, bytes] | None = None
) -> None:
    """Completes the uploads, writes the small files (`beside`: more of them, by name), then config.json. Raises ClaimLost, StorageError,
    OutputOccupied."""
    complete_shards(output, journal, report["files"])
    copied = {name: carry_over(source, output, name, work.layout.file_sizes[name]) for name in work.layout.other_files}
    journal.commit(journal.state)  # the fence once more: what follows is seen by readers
    config = dumps(published_config(work))
    if indexed(work):
        output.write(INDEX, dumps(work.plan.index()))
    for name, data in (beside or {}).items():
        output.write(name, data)
    output.write(PAGE, render(report))
    published = {k: v for k, v in report.items() if k != "units"}
    output.write(REPORT, dumps({**published, "digests": {**copied, CONFIG: digest(config)}}))
    output.publish(CONFIG, config)
    output.cleanup()


def complete_shards(output: Output, journal: Journal, files: Sequence[str]) -> None:
    """Makes the shards whole; done already is fine. `files`: all that publishing writes. Raises ClaimLost, StorageError, UploadLost."""
    if not journal.state.publishing:
        journal.commit(replace(journal.state, publishing=True, files=tuple(files)))
    for upload in reversed(journal.state.uploads):  # whoever finds the first one finds all
        try:
            output.complete(upload.name, upload.id, upload.parts)
        except UploadLost:
            journal.commit(replace(journal.state, publishing=False))  # the next worker goes back to what survives
            raise


def carry_over(source: Source, output: Output, name: str, size: int) -> str:
    """Copies one of the source's other files (tokenizer, templates, licence), a large one in pieces; returns its digest."""
    if size <= CHUNK:
        data = source.read(name)
        output.write(name, data)
        return digest(data)
    hasher, parts = xxhash.xxh3_128(), []
    upload = output.begin(name, size)
    for number, offset in enumerate(range(0, size, CHUNK), 1):
        piece = memoryview(bytearray(min(CHUNK, size - offset)))
        source.read_into(name, offset, piece)
        hasher.update(piece)
        parts.append(output.write_part(name, upload, number, offset, [piece]))
    output.complete(name, upload, parts)
    return f"xxh3-128:{hasher.hexdigest()}"


def digest(data: bytes) -> str:
    return "xxh3-128:" + xxhash.xxh3_128(data).hexdigest()


def published_config(work: Work) -> dict[str, Any]:
    """config.json of the result: the source's, its own quantisation replaced by ours, wherever it stood."""
    config = {k: v for k, v in work.layout.config.items() if k not in QUANTIZATION}
    if isinstance(text := config.get("text_config"), dict):
        config["text_config"] = {k: v for k, v in text.items() if k not in QUANTIZATION}
    layout, linears = work.layout, list(work.layout.linears())
    if layout.file_format == "gguf":  # which says all itself
        return config
    if work.schemes or layout.kv_cache is not None or any(x.bitmask is not None for x in linears):
        described = quantization_config(linears, work.schemes, other_modules(layout), layout.kv_cache)
        config["quantization_config"] = bitmask.described(described, linears)
    return config


def build_report(
    work: Work, fingerprint: Mapping[str, str], job: Mapping[str, Any], journal: Journal, source_uri: str, measured: Mapping[str, Any]
) -> dict[str, Any]:
    """What kompressor.json says: what was done to what, with which error. What units took, "units", is for report.html alone: with it a
    resumed job would not make the same bytes."""
    linears: dict[str, Any] = {}
    pruned: dict[str, Any] = {}
    digests: dict[str, str] = {}
    errors: list[float] = []
    norms: list[float] = []
    units: list[UnitTime] = []
    for unit in range(len(work.layout.units)):
        record = journal.read_record(unit)
        digests |= record["digests"]
        if cost := record.get("block", {}).get("cost"):
            units.append(UnitTime(name=work.layout.units[unit].name, seconds=cost["seconds"], peakBytes=cost["peakBytes"]))
        for name, entry in record["linears"].items():
            error, norm = entry.pop("squaredError"), entry.pop("squaredNorm")
            linears[name] = {**entry, "relativeError": relative(error, norm)}
            errors.append(error)
            norms.append(norm)
        pruned |= record.get("pruned", {})
    digests |= {t.name: digest(value).removeprefix("xxh3-128:") for t, value in work.plan.constants}
    return {
        "kompressor": version("kompressor"),
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "job": dict(job),
        "fingerprint": dict(fingerprint),
        "source": {"uri": source_uri, "digest": work.layout.source_digest, "tensorBytes": work.layout.source_bytes},
        "result": {
            "tensorBytes": work.plan.tensor_bytes,
            "digest": digest("".join(f"{k}={digests[k]}\n" for k in sorted(digests)).encode()),
            "relativeError": relative(sum(errors), sum(norms)),
            "quantizedLinears": len(linears),
            **pruned_result(pruned),
            **bitmask_result(work.layout),
        },
        "warnings": list(work.layout.warnings),
        **measured,
        **({"units": units} if units else {}),
        "linears": linears,
        **({"pruned": {name: pruned_entry(entry) for name, entry in pruned.items()}} if pruned else {}),
        **allocation(pruned, [unit.name for unit in work.layout.units]),
        **({"gguf": places(work.plan)} if work.layout.file_format == "gguf" else {}),
        "tensors": {k: f"xxh3-128:{v}" for k, v in sorted(digests.items())},
        "files": sorted(
            [s.name for s in work.plan.shards] + list(work.layout.other_files) + [REPORT, PAGE, CONFIG]
            + ([INDEX] if indexed(work) else [])
        ),
    }  # fmt: skip


def indexed(work: Work) -> bool:
    return len(work.plan.shards) > 1 and work.layout.file_format != "gguf"


def places(plan: OutputPlan) -> dict[str, Any]:
    """Where everything lies in GGUF files, for whoever checks them: of each file its size and that of its header, which has a digest of its
    own; of each tensor (an expert's slice of a stack by itself, under its name in the model) its file, its bytes, and their type."""
    files = [{"name": s.name, "size": s.size, "header": len(s.header), "digest": digest(s.header)} for s in plan.shards]
    return {"files": files, "places": {t.name: place(plan, t) for t in sorted(plan.tensors(), key=lambda t: t.name)}}


def place(plan: OutputPlan, t: PlacedTensor) -> list[Any]:
    begin = len(plan.shards[t.shard].header)
    return [t.shard, begin + t.start, begin + t.stop, t.form.type if t.form is not None else t.dtype]


def pruned_result(pruned: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How many linears were pruned, and what share of their weights is zero; empty where none was."""
    weights = sum(prod(entry["shape"]) for entry in pruned.values())
    zeros = sum(entry["zeros"] for entry in pruned.values())
    return {"prunedLinears": len(pruned), "sparsity": digits(zeros / weights)} if weights else {}


def allocation(pruned: Mapping[str, Mapping[str, Any]], blocks: Sequence[str]) -> dict[str, Any]:
    """Where the zeros are, if not everywhere alike: the linears with the smallest and the largest share of them, and each block's share."""
    shares = {name: entry["zeros"] / prod(entry["shape"]) for name, entry in pruned.items()}
    if len({entry["asked"] for entry in pruned.values()}) < 2:
        return {}
    ends = {"smallest": min(shares, key=lambda name: shares[name]), "largest": max(shares, key=lambda name: shares[name])}
    by_block = {}
    for block in blocks:
        if inside := [entry for name, entry in pruned.items() if name.startswith(f"{block}.")]:
            by_block[block] = digits(sum(entry["zeros"] for entry in inside) / sum(prod(entry["shape"]) for entry in inside))
    return {
        "allocation": {
            **{end: {"linear": name, "sparsity": digits(shares[name])} for end, name in ends.items()},
            "blocks": by_block,
        }
    }


def digits(share: float) -> float:
    return float(f"{share:.6g}")


def bitmask_result(layout: ModelLayout) -> dict[str, Any]:
    """How many linears are stored by a bitmask, and what that saves; empty where none is."""
    stored = [x for x in layout.linears() if x.bitmask is not None]
    return {"bitmaskLinears": len(stored), "bitmaskSavedBytes": bitmask.saved_bytes(stored)} if stored else {}


def pruned_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """As kompressor.json has it: what was asked, the zeros that there are, how it is stored if not as it is, and the error of what is
    left."""
    kept = {name: entry[name] for name in ("asked", "shape", "zeros", "bitmask") if name in entry}
    return {**kept, "relativeError": relative(entry["squaredError"], entry["squaredNorm"])}


def relative(squared_error: float, squared_norm: float) -> float:
    """Root of squared error over squared norm, rounded so that sums in another order say the same."""
    return float(f"{(squared_error / squared_norm) ** 0.5:.6g}") if squared_norm else 0.0


def already_published(output: Output, fingerprint: Mapping[str, str]) -> dict[str, Any] | None:
    """The report of an identical earlier result, or None when the output is free (or holds our own unfinished work).

    Raises OutputOccupied when it holds anything else."""
    existing = output.existing()
    if existing and CONFIG not in existing and output.read(JOURNAL) is None:
        existing = output.existing()  # a worker may have published, and cleaned up, between the two looks
    if CONFIG in existing:
        report = parse_report(output.read_published(REPORT)) if REPORT in existing else {}
        theirs = report.get("fingerprint")
        what = "another model"
        if isinstance(theirs, dict) and theirs:
            fields = differing(theirs, fingerprint)
            if not fields:
                return report
            field = fields[0]
            what = f"a result whose {field} is {theirs.get(field)}, this job's is {fingerprint.get(field)}"
        raise OutputOccupied(f"{output.uri}: already holds {what}; choose another output.uri, or remove what is there")
    if existing and output.read(JOURNAL) is None:
        names = sorted(existing)
        raise OutputOccupied(
            f"{output.uri}: already holds {len(names)} objects that are not ours ({', '.join(names[:3])}"
            f"{' ...' if len(names) > 3 else ''}); choose an empty output.uri"
        )
    return None


def refuse_without_room(output: Output, plan: OutputPlan, training: int = 0) -> None:
    """Raises NoSpaceLeft now rather than hours later. `training`: bytes that a training takes there beside the result. A job that goes on
    has part of its bytes there already: it is not asked."""
    made, room = sum(shard.size for shard in plan.shards), output.room()
    if room is not None and room < made + training and output.read(JOURNAL) is None:
        takes = f"the result takes {made:,} bytes" + (f", the training {training:,} beside it" if training else "")
        raise NoSpaceLeft(f"{output.uri}: {takes}, {room:,} are free; enlarge the volume or free space on it")


def parse_report(data: bytes) -> dict[str, Any]:
    """kompressor.json as read; empty where it is none of ours: another tool's, or damaged."""
    try:
        report = json.loads(data)
    except ValueError:
        return {}
    return report if isinstance(report, dict) else {}


def dumps(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
