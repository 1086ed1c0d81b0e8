"""Whom a student learns from: the teacher itself, at every step, or what it once said and was written down (offline.py)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from kompressor_worker.architectures import text_config
from kompressor_worker.digests import digest
from kompressor_worker.distil.lesson import Lesson, StoredModel
from kompressor_worker.distil.loading import build
from kompressor_worker.distil.model import Seen, TrainedModel, Wanted, computing_dtype
from kompressor_worker.distil.offline import AHEAD, Recorded, Recorder, Recording
from kompressor_worker.distil.order import Micro, batched, micro_rows
from kompressor_worker.distil.together import Together
from kompressor_worker.errors import Terminated
from kompressor_worker.kernels.divergence import TopK
from kompressor_worker.tensors import DTYPES

log = logging.getLogger(__name__)

LOGITS = "logits"
"""Below this name of the job's working objects recordings lie, where they have no place of their own."""


def teacher_of(lesson: Lesson, together: Together) -> TrainedModel:
    """The teacher itself, shared out."""
    layout = lesson.teacher.layout
    shard = together.shard(computing_dtype(DTYPES[layout.dtype], together.device), trained=False)
    teacher = build(lesson.teacher, together, False, lesson.work.limits, shard)
    shard(teacher)
    return teacher


@dataclass(frozen=True)
class Written:
    """A teacher's most likely tokens, for every row that is trained on or held out."""

    recorded: Recorded
    rows: Sequence[Tensor]
    device: torch.device

    def of(self, micro: Micro, offset: int) -> TopK:
        """Of the positions that count in `micro`, whose rows are numbered from `offset` on."""
        if not micro.numbers:
            nothing = torch.empty(0, self.recorded.recording.top_k)
            return TopK(nothing.int(), nothing, nothing.sum(1)).to(self.device)
        with ThreadPoolExecutor(AHEAD) as pool:
            numbers = [number + offset for number in micro.numbers]
            return TopK.cat(list(pool.map(self.recorded.read, numbers, (self.rows[n] for n in numbers)))).to(self.device)


class Joined(Sequence[Tensor]):
    """Rows to train on, and behind them those of evaluations that have their own."""

    def __init__(self, lesson: Lesson) -> None:
        self._parts = [lesson.rows, lesson.evaluation or []]

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, number: int) -> Tensor:  # type: ignore[override]
        first = len(self._parts[0])
        return self._parts[0][number] if number < first else self._parts[1][number - first]

    def __iter__(self) -> Iterator[Tensor]:
        return (row for part in self._parts for row in part)


def written(lesson: Lesson, together: Together) -> Written:
    """What is missing of the recording is written first; it is there for any other student then. Raises Terminated, and what offline.py
    raises."""
    asked = lesson.params.teacher.offline
    assert asked is not None
    rows, layout = Joined(lesson), lesson.teacher.layout
    config = text_config(layout.config)
    recording = Recording(
        layout.source_digest, tokenizer_digest(lesson.teacher), rows_digest(rows), len(rows), int(config["vocab_size"]), asked.top_k,
        config.get("final_logit_softcapping"),
    )  # fmt: skip
    output = lesson.logits(recording.name) if lesson.logits else lesson.output.inner(f"{LOGITS}/{recording.name}")
    group = lesson.group
    recorder = Recorder(output, recording, rows, rank=group.rank, size=group.size)
    if any(together.sums([len(recorder.missing())])):
        record(lesson, together, recorder)
        together.sums([0])  # all are done
        if group.leads:
            recorder.publish()
        together.sums([0])
    return Written(Recorded(output, recording), rows, together.device)


def record(lesson: Lesson, together: Together, recorder: Recorder) -> None:
    """A sharded teacher needs all processes for every forward: one that has no rows of its own left goes on with a little of some row."""
    teacher = teacher_of(lesson, together)
    done, count = 0, len(recorder.rows)

    def forward(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        micro = batched(rows, range(len(rows)), together.device)
        at = torch.arange(micro.tokens.shape[1], device=together.device) < torch.tensor(micro.lengths, device=together.device)[:, None]

        def seen(theirs: Seen) -> tuple[Tensor, Tensor]:
            return theirs.hidden, theirs.head.clone() if together.mesh is not None else theirs.head

        made: tuple[Tensor, Tensor] = teacher(micro.tokens, micro.lengths, at, Wanted(), seen)
        return made

    def say(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        together.sums([1])
        return forward(rows)

    def tell(rows: int) -> None:
        nonlocal done
        done += rows
        log.info("the teacher's logits of %d rows are written, of %d in all", done, count)
        if lesson.stop.is_set() and together.mesh is None:
            raise Terminated("told to stop; what the teacher has said so far is kept")

    with torch.no_grad():
        recorder.record(say, micro_rows(lesson.params), tell)
        while any(together.sums([0])):
            forward([recorder.rows[0][:2]])


def tokenizer_digest(model: StoredModel) -> str:
    files = model.source.list()
    names = sorted(name for name in files if name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"))
    return digest([[name, files[name].size, files[name].etag] for name in names])


def rows_digest(rows: Sequence[Tensor]) -> str:
    hasher = xxhash.xxh3_128()
    for row in rows:
        hasher.update(len(row).to_bytes(8, "little") + row.long().contiguous().numpy().tobytes())
    return f"xxh3-128:{hasher.hexdigest()}"
