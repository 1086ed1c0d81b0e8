"""A teacher's logits, recorded once and read by others, on a folder and on a real S3 server."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from places import Place
from torch import Tensor

from kompressor_worker.distil.offline import MANIFEST, Recorded, Recorder, Recording, published
from kompressor_worker.errors import BadNumerics, CorruptSource, Terminated, UserError
from kompressor_worker.kernels.divergence import TopK

VOCABULARY, K = 97, 5
LENGTHS = 9, 9, 9, 4, 9, 2, 9, 9, 9, 9
ROWS = [torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(n)) for n, length in enumerate(LENGTHS)]
WANTED = Recording("sha256:teacher", "sha256:tokenizer", "sha256:rows", len(ROWS), VOCABULARY, K, softcap=30.0)
CHUNK = 3 * WANTED.row_bytes(8)


class Seen:
    """A teacher that embeds tokens, and counts the rows it has seen."""

    def __init__(self, seed: int = 0, stop_at: int | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.embeddings, self.head = (torch.randn(VOCABULARY, 16, generator=generator) for _ in range(2))
        self.rows, self.stop_at = 0, stop_at

    def __call__(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        if self.stop_at is not None and self.rows >= self.stop_at:
            raise Terminated("told to stop")
        self.rows += len(rows)
        return self.embeddings[torch.cat(list(rows))], self.head


def expected(row: Tensor) -> TopK:
    teacher = Seen()
    return TopK.of(teacher.embeddings[row[:-1]], teacher.head, K, softcap=30.0)


def judge(recorded: Recorded) -> None:
    for number, top in enumerate(recorded.ahead((n, ROWS[n]) for n in range(len(ROWS)))):
        wanted = expected(ROWS[number])
        assert torch.equal(top.indices, wanted.indices)
        assert torch.allclose(top.log_probabilities, wanted.log_probabilities, rtol=1e-3) and torch.equal(top.rest, wanted.rest)
        assert float((top.log_probabilities.logsumexp(1).exp() + top.rest.exp() - 1).abs().max()) < 1e-3


def test_recorded_once_and_read_in_any_order(place: Place) -> None:
    recorder, teacher, told = Recorder(place.output(), WANTED, ROWS, chunk_bytes=CHUNK), Seen(), []
    assert published(place.output(), WANTED) is None and recorder.missing() == [0, 1, 2, 3]
    recorder.record(teacher, 2, told.append)
    recorder.publish()
    assert sum(told) == teacher.rows == len(ROWS)
    recorded = Recorded(place.output(), WANTED)
    judge(recorded)
    assert torch.equal(recorded.read(3).indices, expected(ROWS[3]).indices)
    again = Seen()
    Recorder(place.output(), WANTED, ROWS, chunk_bytes=CHUNK).record(again, 2)
    Recorder(place.output(), WANTED, ROWS, chunk_bytes=CHUNK).publish()
    assert again.rows == 0, "another student has nothing to record"
    names = [name for name in place.output().existing() if name != MANIFEST]
    held = safetensors.torch.load(place.output().read_published(min(names)))
    assert sorted(held) == ["000000000", "000000001", "000000002"] and held["000000000"].dtype is torch.uint8


def test_a_writer_that_was_cut_off_goes_on(place: Place) -> None:
    with pytest.raises(Terminated):
        Recorder(place.output(), WANTED, ROWS, chunk_bytes=CHUNK).record(Seen(stop_at=7), 1)
    teacher, last = Seen(), Recorder(place.output(), WANTED, ROWS, chunk_bytes=CHUNK)
    assert last.missing() == [2, 3]
    with pytest.raises(UserError, match="no finished recording"):
        Recorded(place.output(), WANTED)
    last.record(teacher, 2)
    assert teacher.rows == 4
    last.publish()
    judge(Recorded(place.output(), WANTED))


def test_several_writers_share_or_repeat_the_work(place: Place) -> None:
    """Three processes of one group, and a second job that records the same at the same time, its teacher's bits a little different."""
    group = [Recorder(place.output(), WANTED, ROWS, rank=rank, size=3, chunk_bytes=CHUNK) for rank in range(3)]
    other, teachers, failures = Recorder(place.output(), WANTED, ROWS, chunk_bytes=CHUNK), [Seen() for _ in range(4)], []
    teachers[3].embeddings += 1e-6

    def work(recorder: Recorder, teacher: Seen) -> None:
        try:
            recorder.record(teacher, 1)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip([*group, other], teachers, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and sum(teacher.rows for teacher in teachers[:3]) <= len(ROWS)
    for recorder in (group[0], other):
        recorder.publish()
    recorded = Recorded(place.output(), WANTED)
    assert all(torch.equal(recorded.read(n, ROWS[n]).indices, expected(ROWS[n]).indices) for n in range(len(ROWS)))


def test_another_teacher_other_rows_and_damage_are_told_apart(place: Place) -> None:
    recorder = Recorder(place.output(), WANTED, ROWS, chunk_bytes=CHUNK)
    recorder.record(Seen(), 4)
    recorder.publish()
    for change in ({"teacher": "sha256:other"}, {"tokenizer": "sha256:other"}, {"rows": "sha256:other"}, {"top_k": K + 1}):
        other = replace(WANTED, **change)  # type: ignore[arg-type]
        assert other.name != WANTED.name
        with pytest.raises(UserError, match=rf"recorded with {next(iter(change))} .*{re.escape(str(next(iter(change.values()))))}"):
            Recorded(place.output(), other)
    recorded = Recorded(place.output(), WANTED)
    with pytest.raises(UserError, match="row 1: recorded of other tokens"):
        recorded.read(1, ROWS[2])
    packed = WANTED.pack(ROWS[0], expected(ROWS[0])).numpy().tobytes()
    for damaged in (packed[:40] + b"!" + packed[41:], packed[:-1], packed[:3], b""):
        with pytest.raises(CorruptSource, match="here: damaged"):
            WANTED.unpack(damaged, "here")
    output = replace(place, uri=f"{place.uri}-other").output()
    output.write("rows", b"")
    output.publish(MANIFEST, json.dumps({"recording": {}}).encode())
    with pytest.raises(CorruptSource, match="not a recording's manifest"):
        published(output, WANTED)


def test_what_cannot_be_recorded(place: Place) -> None:
    teacher = Seen()
    teacher.head[0, 0] = torch.nan
    with pytest.raises(BadNumerics, match="NaN or Inf"):
        Recorder(place.output(), WANTED, ROWS).record(teacher, 1)
    with pytest.raises(UserError, match="topK: 97 of a vocabulary of 97"):
        replace(WANTED, top_k=VOCABULARY)


def test_large_vocabularies_keep_their_indices() -> None:
    wide = replace(WANTED, vocabulary=1 << 18, top_k=2)
    top = TopK(
        torch.tensor([[70_000, 3], [262_143, 65_536]], dtype=torch.int32), torch.tensor([[-0.5, -1.5]] * 2), torch.tensor([-2.0, -2.0])
    )
    row = torch.tensor([1, 2, 3])
    assert torch.equal(wide.unpack(bytes(wide.pack(row, top).tolist()), "", row).indices, top.indices)
