"""Both models as folders that an engine can open: links where they lie on this machine, copies in a scratch folder where they do not.

The result is read back from where it was uploaded to: its shards are whole there, and without config.json nobody opens them. So what is
measured is what is published, and a worker that goes on elsewhere needs nothing of the one before.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker.digests import digest
from kompressor_worker.distil.lesson import StoredModel
from kompressor_worker.errors import NoSpaceLeft, Terminated
from kompressor_worker.layout import ModelLayout
from kompressor_worker.runtime.original_gguf import plan_original
from kompressor_worker.shards import OutputPlan
from kompressor_worker.storage import Output, Source

PIECE = 8 << 20
THREADS = 4
SPARE = 256 << 20
"""Left free beside the copies: logs, and what an engine compiles."""


@dataclass(frozen=True)
class Files:
    """What an engine reads of a checkpoint beside config.json."""

    sizes: Mapping[str, int]
    config: bytes


def weight_files(layout: ModelLayout) -> dict[str, int]:
    """A source's files of weights, and their bytes."""
    stages = (stage for unit in layout.units for stage in unit.stages)
    names = {stored.file for stage in stages for tensor in stage.tensors for stored in tensor.stored}
    return {name: layout.file_sizes[name] for name in sorted(names)}


def scratch_bytes(spec: CompressionJobSpec, original: StoredModel, plans: Sequence[OutputPlan], output: Output) -> int:
    """What copies of the original and of the largest of these results take: nothing of what lies on this machine, but for an original that
    is written anew, as GGUF."""
    if spec.output.format == "gguf":
        before = sum(shard.size for shard in plan_original(spec, original.layout).shards)
    else:
        before = sum(size for name, size in weight_files(original.layout).items() if original.source.path(name) is None)
    return before + (0 if output.local else max(sum(shard.size for shard in plan.shards) for plan in plans))


def refuse_without_scratch(needed: int) -> None:
    """Raises NoSpaceLeft."""
    place = Path(tempfile.gettempdir())
    room = shutil.disk_usage(place).free
    if needed and room < needed + SPARE:
        raise NoSpaceLeft(
            f"evaluation.runtime: copies of both checkpoints take {needed:,} bytes in {place}, {room:,} are free; enlarge the volume there "
            "(a worker's is replaced by the volume `tmp` of worker.podTemplate), or set TMPDIR to a larger one"
        )


@contextmanager
def scratch_folder(uri: str) -> Iterator[Path]:
    """Empty, and gone in the end. Named after the output, whose owner is one: what a killed worker left is taken away."""
    folder = Path(tempfile.gettempdir()) / f"kompressor-runtime-{digest(uri).rpartition(':')[2][:16]}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def lay_out(folder: Path, source: Source, files: Files, stop: threading.Event) -> Path:
    """A checkpoint in `folder`. Raises Terminated, and what storage raises."""
    folder.mkdir()
    for name, size in files.sizes.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (here := source.path(name)) is not None:
            target.symlink_to(here)
        else:
            _copy(source, name, size, target, stop)
    (folder / "config.json").write_bytes(files.config)
    return folder


def _copy(source: Source, name: str, size: int, target: Path, stop: threading.Event) -> None:
    with target.open("wb") as file:

        def piece(start: int) -> None:
            if stop.is_set():
                raise Terminated("told to stop while the result was fetched to be measured; what was finished is committed")
            buffer = memoryview(bytearray(min(PIECE, size - start)))
            source.read_into(name, start, buffer)
            done = 0
            while done < len(buffer):
                done += os.pwrite(file.fileno(), buffer[done:], start + done)

        with ThreadPoolExecutor(THREADS, "fetch") as pool:
            for _ in pool.map(piece, range(0, size, PIECE)):
                pass
