"""A teacher's most likely tokens, written once and read by any number of students.

A recording is an output of its own, named by a digest of what it is of: the teacher's files, the exact rows, k, and this format. Its rows
lie in objects of some tens of megabytes, each a safetensors file with one tensor of bytes a row, which is read by one request:

    indices            [positions, k]  uint16, or int32 where the vocabulary has more than 65,536
    log probabilities  [positions, k]  fp16: logits less their logsumexp, the most likely first
    rest               [positions]     fp32: log of the probability of all others together
    xxh3-64 of the row's token ids (int64), and of all the bytes before

A row has a position for each token but the last. Objects are named after their content, so that several writers never overwrite each other;
a note a chunk says which one counts, so that a writer which was cut off goes on; the manifest, with all of them, is published last.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate

import safetensors.torch
import torch
import xxhash
from torch import Tensor

from kompressor_worker.digests import digest
from kompressor_worker.errors import BadNumerics, CorruptSource, NotFound, OutputOccupied, StorageError, UserError
from kompressor_worker.kernels.divergence import TopK
from kompressor_worker.storage import WORK, Output

FORMAT = "kompressor teacher logits 1"
MANIFEST = "manifest.json"
CHUNK_BYTES = 32 << 20
AHEAD = 8
"""Rows that are fetched before they are asked for."""

Teacher = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]
"""Rows of token ids int64 [length] -> hidden states after the final norm, of every position of every row one after the other
[sum of lengths, width], and the head [vocabulary, width]."""


@dataclass(frozen=True)
class Recording:
    """What is recorded, or wanted."""

    teacher: str
    """Digest of the teacher's checkpoint."""
    tokenizer: str
    """Digest of its vocabulary."""
    rows: str
    """Digest of the rows, exactly as they are."""
    count: int
    """Of rows."""
    vocabulary: int
    top_k: int
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.top_k >= self.vocabulary:
            raise UserError(
                f"distil.teacher.offline.topK: {self.top_k} of a vocabulary of {self.vocabulary} tokens; choose less, such as "
                f"{min(64, self.vocabulary // 2)}"
            )

    def as_json(self) -> dict[str, str | int | float | None]:
        return {"format": FORMAT, **asdict(self)}

    @property
    def name(self) -> str:
        """Of its folder."""
        return digest(self.as_json()).removeprefix("sha256:")[:32]

    @property
    def index_dtype(self) -> torch.dtype:
        return torch.uint16 if self.vocabulary <= 1 << 16 else torch.int32

    @property
    def position_bytes(self) -> int:
        return self.top_k * (self.index_dtype.itemsize + 2) + 4

    def row_bytes(self, positions: int) -> int:
        return positions * self.position_bytes + 16

    def pack(self, tokens: Tensor, top: TopK) -> Tensor:
        """A row, uint8."""
        parts = (top.indices.cpu().to(self.index_dtype), top.log_probabilities.cpu().half(), top.rest.cpu().float())
        data = b"".join(part.contiguous().view(torch.uint8).numpy().tobytes() for part in parts) + _digest_of(tokens)
        return torch.frombuffer(bytearray(data + xxhash.xxh3_64_digest(data)), dtype=torch.uint8)

    def unpack(self, data: bytes, where: str, tokens: Tensor | None = None) -> TopK:
        """Raises CorruptSource; UserError where it is a row of other tokens."""
        body, k = memoryview(data)[:-8], self.top_k
        positions, left = divmod(len(body) - 8, self.position_bytes)
        if left or xxhash.xxh3_64_digest(body) != data[-8:]:
            raise CorruptSource(f"{where}: damaged, its checksum is another; delete the recording, and it will be written again")
        if tokens is not None and bytes(body[-8:]) != _digest_of(tokens):
            raise UserError(f"{where}: recorded of other tokens; leave out distil.teacher.offline.location, or name another place")
        sizes = [positions * k * self.index_dtype.itemsize, positions * k * 2, positions * 4]
        indices, logs, rest = torch.split(torch.frombuffer(bytearray(body[:-8]), dtype=torch.uint8), sizes)
        return TopK(
            indices.view(self.index_dtype).view(positions, k).to(torch.int32),
            logs.view(torch.float16).view(positions, k).float(),
            rest.view(torch.float32).clone(),
        )


def _digest_of(tokens: Tensor) -> bytes:
    return xxhash.xxh3_64_digest(tokens.cpu().long().contiguous().numpy().tobytes())


@dataclass(frozen=True)
class Chunk:
    """An object and the rows in it."""

    object: str
    first: int
    """Row that it begins with."""
    start: int
    """Byte that the first row begins at."""
    positions: list[int]
    """Of each row."""

    @property
    def stop(self) -> int:
        return self.first + len(self.positions)


def note_of(chunk: int) -> str:
    return f"{WORK}chunk-{chunk:06d}.json"


def published(output: Output, recording: Recording) -> list[Chunk] | None:
    """What a finished recording consists of; None: it is not finished. Raises UserError where it is of something else."""
    try:
        data = output.read_published(MANIFEST)
    except NotFound:
        return None
    try:
        found = json.loads(data)
        kept, chunks = found["recording"], [Chunk(**chunk) for chunk in found["chunks"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptSource(f"{output.uri}/{MANIFEST}: not a recording's manifest ({error}); delete the folder") from error
    for name, value in recording.as_json().items():
        if kept.get(name) != value:
            raise UserError(
                f"{output.uri}: recorded with {name} {kept.get(name)}, this job has {value}; "
                "delete the folder, or choose another distil.teacher.offline.location"
            )
    if sum(len(chunk.positions) for chunk in chunks) != recording.count:
        raise CorruptSource(f"{output.uri}/{MANIFEST}: does not hold {recording.count} rows; delete the folder")
    return chunks


class Recorder:
    """Writes what is missing of a recording; as many at once as there are processes, `rank` of `size`."""

    def __init__(
        self, output: Output, recording: Recording, rows: Sequence[Tensor], *, rank: int = 0, size: int = 1, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self.output, self.recording, self.rows, self.rank, self.size = output, recording, rows, rank, size
        self.rows_of_chunk = max(1, chunk_bytes // recording.row_bytes(len(rows[0]) - 1))
        self.chunks = -(-len(rows) // self.rows_of_chunk)

    def missing(self) -> list[int]:
        """Chunks that nobody has written yet."""
        if published(self.output, self.recording) is not None:
            return []
        return [chunk for chunk in range(self.chunks) if self._note(chunk) is None]

    def record(self, teacher: Teacher, batch: int, tell: Callable[[int], None] = lambda rows: None) -> None:
        """This process's share. `batch` rows go through the teacher at a time; `tell` hears of how many more are done, and may raise."""
        for chunk in range(self.rank, self.chunks, self.size):
            rows = self._range(chunk)
            if self._note(chunk) is not None or published(self.output, self.recording) is not None:
                tell(len(rows))
                continue
            packed: list[Tensor] = []
            for at in range(rows.start, rows.stop, batch):
                made = self._batch(teacher, [self.rows[row] for row in range(at, min(at + batch, rows.stop))])
                packed += made
                tell(len(made))
            try:
                self._write(chunk, packed)
            except (NotFound, StorageError):  # tidied up under our feet by another job, which has published all of it?
                if published(self.output, self.recording) is None:
                    raise

    def _range(self, chunk: int) -> range:
        return range(chunk * self.rows_of_chunk, min((chunk + 1) * self.rows_of_chunk, len(self.rows)))

    @torch.no_grad()
    def _batch(self, teacher: Teacher, rows: list[Tensor]) -> list[Tensor]:
        hidden, head = teacher(rows)
        assert len(head) == self.recording.vocabulary and len(hidden) == sum(map(len, rows)), (head.shape, hidden.shape)
        packed = []
        for row, states in zip(rows, torch.split(hidden, [len(row) for row in rows]), strict=True):
            top = TopK.of(states[:-1], head, self.recording.top_k, softcap=self.recording.softcap)
            if not bool(top.rest.isfinite().all()):
                raise BadNumerics("the teacher's logits are NaN or Inf; check its checkpoint")
            packed.append(self.recording.pack(row, top))
        return packed

    def _write(self, chunk: int, packed: list[Tensor]) -> None:
        first = self._range(chunk).start
        data = safetensors.torch.save({f"{first + n:09d}": row for n, row in enumerate(packed)}, {"format": FORMAT})
        name = f"rows-{chunk:06d}-{xxhash.xxh3_128_hexdigest(data)}.safetensors"
        positions = [(len(row) - 16) // self.recording.position_bytes for row in packed]
        made = Chunk(name, first, len(data) - sum(map(len, packed)), positions)
        self.output.write(name, data)
        self.output.write(note_of(chunk), json.dumps(asdict(made)).encode())

    def _note(self, chunk: int) -> Chunk | None:
        found = self.output.read(note_of(chunk))
        return None if found is None else Chunk(**json.loads(found[0]))

    def publish(self) -> None:
        """Once every process has recorded its share; several may do it."""
        if published(self.output, self.recording) is None:
            notes = [self._note(chunk) for chunk in range(self.chunks)]
            chunks = [asdict(note) for note in notes if note is not None]
            if len(chunks) == self.chunks:
                self._publish(json.dumps({"recording": self.recording.as_json(), "chunks": chunks}).encode())
            elif published(self.output, self.recording) is None:  # else another job has published and tidied up meanwhile
                gone = self.chunks - len(chunks)
                raise StorageError(f"{self.output.uri}: {gone} of {self.chunks} chunks of the teacher's logits are missing; start again")
        self.output.cleanup()

    def _publish(self, manifest: bytes) -> None:
        try:
            self.output.publish(MANIFEST, manifest)
        except (NotFound, OutputOccupied, StorageError):  # by another job, whose logits may differ in the last bits?
            if published(self.output, self.recording) is None:
                raise


class Recorded:
    """A finished recording, read row by row."""

    def __init__(self, output: Output, recording: Recording) -> None:
        """Raises UserError where it is not finished, or of something else."""
        chunks = published(output, recording)
        if chunks is None:
            raise UserError(f"{output.uri}: no finished recording of the teacher; let its writer end")
        self.recording, self._source = recording, output.as_source()
        self._places = [
            (chunk.object, chunk.start + before, recording.row_bytes(positions))
            for chunk in chunks
            for before, positions in zip(accumulate(map(recording.row_bytes, chunk.positions), initial=0), chunk.positions, strict=False)
        ]

    def __len__(self) -> int:
        return len(self._places)

    def read(self, row: int, tokens: Tensor | None = None) -> TopK:
        """Of one row, all its positions. Raises CorruptSource; UserError where it was recorded of other tokens."""
        name, start, size = self._places[row]
        where = f"{self._source.uri}/{name}, row {row}"
        return self.recording.unpack(self._source.read(name, start, start + size), where, tokens)

    def ahead(self, rows: Iterable[tuple[int, Tensor | None]]) -> Iterator[TopK]:
        """Of each of these rows in order, AHEAD of them being fetched meanwhile."""
        with ThreadPoolExecutor(AHEAD, thread_name_prefix="teacher") as pool:
            waiting: deque[Future[TopK]] = deque()
            try:
                for row, tokens in rows:
                    waiting.append(pool.submit(partial(self.read, row, tokens)))
                    if len(waiting) > AHEAD:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
