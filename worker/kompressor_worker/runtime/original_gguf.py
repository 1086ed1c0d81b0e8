"""The original as a GGUF file in its own 16 bits, for an engine that opens nothing else: by the plan that results are written by, as the
source streams, a tensor at a time."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker.distil.lesson import StoredModel
from kompressor_worker.errors import Terminated
from kompressor_worker.gguf_result import gguf_plan
from kompressor_worker.layout import ModelLayout
from kompressor_worker.pipeline import Limits, Load, Prefetcher
from kompressor_worker.shards import OutputPlan, Shard

NAME = "original.gguf"


def plan_original(spec: CompressionJobSpec, layout: ModelLayout) -> OutputPlan:
    """Raises UserError for a model that llama.cpp does not compute."""
    output = spec.output.model_copy(update={"name": NAME, "max_file_bytes": None})
    return gguf_plan(spec.model_copy(update={"output": output}), layout, {})


def write_original(folder: Path, original: StoredModel, plan: OutputPlan, stop: threading.Event) -> Path:
    """The files that `plan` says, in `folder`. Raises Terminated, CorruptSource, and what storage raises."""
    from kompressor_worker.tensors import as_bytes, decode

    folder.mkdir()
    places = {t.name: t for t in plan.tensors()}
    stored = (t for unit in original.layout.units for stage in unit.stages for t in stage.tensors if t.stored)
    wanted = [t for t in stored if t.name in places]
    loads = [Load(tuple((s, 0, s.nbytes) for s in t.stored)) for t in wanted]
    with ExitStack() as opened:
        files = [_begun(opened.enter_context((folder / shard.name).open("wb")), shard) for shard in plan.shards]
        for place, value in plan.constants:
            _put(files[place.shard], len(plan.shards[place.shard].header) + place.start, memoryview(value))
        for t, loaded in zip(wanted, opened.enter_context(Prefetcher(original.source, loads, Limits())), strict=True):
            if stop.is_set():
                raise Terminated("told to stop while the original was written to be measured; what was finished is committed")
            place = places[t.name]
            begin = len(plan.shards[place.shard].header) + place.start
            _put(files[place.shard], begin, as_bytes(decode(t, loaded.views), place))
    return folder


def _begun(file: BinaryIO, shard: Shard) -> BinaryIO:
    """Its header, and as many zeros as come after it."""
    file.write(shard.header)
    file.truncate(shard.size)
    file.flush()
    return file


def _put(file: BinaryIO, at: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file.fileno(), data[done:], at + done)
