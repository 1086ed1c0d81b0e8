"""Rows of token ids drawn from a dataset: what calibration, evaluation and drift feed to the model.

Which documents: each has a rank, the XXH64 of its number (8 bytes, little-endian; counted from 0 through all files in the order of their
names) under the seed. Those of the smallest ranks are drawn, in the order of their ranks. So the draw is uniform, the same whatever the
chunks in which files are read, and fewer samples are a prefix of more. A document that would not be drawn is neither parsed nor kept:
memory holds the rows and one chunk of a file.
"""

from __future__ import annotations

import hashlib
import heapq
import threading
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import xxhash

from kompressor_api.datasets import Dataset, Sample
from kompressor_api.names import Reason
from kompressor_worker.errors import CorruptSource, Terminated, UserError
from kompressor_worker.records import CHUNK, DatasetFiles, Document, Records, find_files
from kompressor_worker.storage import Source
from kompressor_worker.tokenizer import ModelTokenizer, messages_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SHORTEST", "Encoder", "Rows", "check_dataset", "content_of", "packed", "rank", "read_rows", "too_few"]

SHORTEST = 2
"""Tokens: of one alone nothing can be predicted."""
FIRST_CHUNK = 1 << 20
"""Bytes read at a time for a look at the first document."""


@dataclass(frozen=True, eq=False)
class Rows:
    tokens: Sequence[Tensor]
    """int64 [length] each, as many as were asked for; with packing all of the full length."""
    digest: str
    """SHA-256 over every row's length and ids, each as 8 bytes, little-endian."""
    documents: int
    """Documents of the dataset."""
    skipped: int
    """Documents that were drawn but are empty or shorter than two tokens; others took their places."""
    bos: str
    """How rows begin: the rule, in words."""

    def padded(self, fill: int = 0) -> tuple[Tensor, Tensor]:
        """Ids int64 [rows, longest], shorter rows filled up behind their end, and lengths int64 [rows]."""
        import torch

        lengths = torch.tensor([len(row) for row in self.tokens])
        return torch.nn.utils.rnn.pad_sequence(list(self.tokens), batch_first=True, padding_value=fill), lengths


def check_dataset(data: Source, sample: Sample) -> DatasetFiles:
    """Whether `data` is there and its first document is as `sample.dataset` says; no torch. Raises UserError, and what storage raises."""
    files = find_files(data, sample.dataset)
    first = next(Records(data, sample.dataset, files, FIRST_CHUNK).read(lambda number: number == 0), None)
    if first is None:
        raise too_few(data, sample, 0, 0, 0, None)
    content_of(first, sample.dataset)
    return files


def read_rows(
    data: Source,
    sample: Sample,
    tokenizer: ModelTokenizer,
    stop: threading.Event | None = None,
    chunk: int = CHUNK,
    at_least: int | None = None,
) -> Rows:
    """`sample.samples` rows of at most `sample.sequence_length` ids; fewer, down to `at_least`, where there are no more.

    Without packing a row is the beginning of one document. With packing the documents drawn are joined, each ended by EOS, and cut into
    full rows without overlap; the tail is dropped. Raises UserError (too little data, a column that is missing or holds something else, ids
    beyond the vocabulary, no chat template), CorruptSource (tokenizer and config.json disagree), Terminated, and what storage raises.
    """
    length = sample.sequence_length
    records = Records(data, sample.dataset, find_files(data, sample.dataset), chunk)
    draw = _Draw(sample.seed, sample.samples * length if sample.packing else sample.samples, by_tokens=sample.packing)
    encode = Encoder(sample, tokenizer, draw.enough if sample.packing else length)
    skipped: list[str] = []

    def wanted(number: int) -> bool:
        if stop is not None and stop.is_set():
            raise Terminated(f"{data.uri}: told to stop while its documents were read")
        return draw.wants(number)

    for document in records.read(wanted):
        ids = encode(document)
        if len(ids) < SHORTEST:
            skipped.append(document.place)
        else:
            draw.add(document.number, ids)
    rows = [*(packed(draw.in_order(), length) if sample.packing else draw.in_order())]
    if len(rows) < (sample.samples if at_least is None else at_least):
        raise too_few(data, sample, len(rows), records.count, len(skipped), skipped[0] if skipped else None)
    return _rows(rows[: sample.samples], records.count, len(skipped), encode.bos_rule)


def rank(number: int, seed: int) -> int:
    """Where the document comes in the order of drawing: the smallest first."""
    return xxhash.xxh64_intdigest(number.to_bytes(8, "little"), seed)


class _Draw:
    """The documents of the smallest ranks met so far: no more of them than are enough."""

    def __init__(self, seed: int, enough: int, by_tokens: bool) -> None:
        self.enough = enough
        """Documents, or tokens of them."""
        self._seed = seed
        self._by_tokens = by_tokens
        self._have = 0
        self._heap: list[tuple[int, int, array[int]]] = []
        """The one of the largest rank first."""

    def wants(self, number: int) -> bool:
        return self._have < self.enough or (-rank(number, self._seed), -number) > self._heap[0][:2]

    def add(self, number: int, ids: array[int]) -> None:
        heapq.heappush(self._heap, (-rank(number, self._seed), -number, ids))
        self._have += self._weight(ids)
        while self._have - (last := self._weight(self._heap[0][2])) >= self.enough:
            heapq.heappop(self._heap)
            self._have -= last

    def in_order(self) -> Iterator[array[int]]:
        for _, _, ids in sorted(self._heap, key=lambda entry: entry[:2], reverse=True):
            yield ids

    def _weight(self, ids: array[int]) -> int:
        return len(ids) if self._by_tokens else 1


class Encoder:
    """Documents to ids, cut at `limit`."""

    def __init__(self, sample: Sample, tokenizer: ModelTokenizer, limit: int) -> None:
        self._dataset = sample.dataset
        self._tokenizer = tokenizer
        self._limit = limit
        self._end: int | None = None
        if sample.packing:
            self._end = tokenizer.eos
            if self._end is None:
                raise UserError(
                    f"{tokenizer.uri}: packing puts an end-of-sequence token after each document, and neither config.json (eos_token_id) "
                    f"nor the tokenizer has one; add it, or set {sample.SECTION}.packing to false"
                )

    @property
    def bos_rule(self) -> str:
        if self._dataset.kind == "text":
            return self._tokenizer.bos_rule
        return "as the chat template writes it" if self._dataset.kind == "messages" else "as the token ids were given"

    def __call__(self, document: Document) -> array[int]:
        """Empty for an empty document."""
        content = content_of(document, self._dataset)
        if not content:
            return array("q")
        if self._dataset.kind == "tokens":
            ids = content
        elif self._dataset.kind == "messages":
            ids = self._tokenizer.chat(document.place, content, self._limit)
        else:
            ids = self._tokenizer.text(document.place, content, self._limit)
        self._check_range(document, ids)
        ended = ids[: self._limit]
        if self._end is not None and len(ended) >= SHORTEST and ended[-1] != self._end:
            ended = [*ended, self._end]
        return array("q", ended)

    def _check_range(self, document: Document, ids: Sequence[int]) -> None:
        size = self._tokenizer.vocabulary
        if not ids or (min(ids) >= 0 and max(ids) < size):
            return
        at, wrong = next((at, token) for at, token in enumerate(ids) if not 0 <= token < size)
        if self._dataset.kind == "tokens":
            raise UserError(
                f"{document.place}: {self._dataset.column}[{at}] is {wrong}, and {self._tokenizer.uri} has a vocabulary of {size}: ids "
                f"go up to {size - 1}; tokenise the data with this model's tokenizer",
                Reason.BAD_DATA,
            )
        raise CorruptSource(
            f"{self._tokenizer.uri}: its tokenizer makes id {wrong}, and config.json says vocab_size {size}; upload both of one version"
        )


def content_of(document: Document, dataset: Dataset) -> Any:
    """What is to be read of a document, by the dataset's kind: text, a list of messages or a list of ids; None where it is empty or null.

    Raises UserError where the column holds something else.
    """
    value, column = document.value, dataset.column
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return None
    if dataset.kind == "messages":
        return messages_of(document.place, value)
    ids = isinstance(value, list) and all(type(token) is int for token in value)
    if isinstance(value, str) if dataset.kind == "text" else ids:
        return value
    if isinstance(value, str):
        held, remedy = "text", "name it in dataset.field"
    elif ids:
        held, remedy = "a list of token ids", "name it in dataset.tokens"
    elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
        held, remedy = "a chat", "name it in dataset.messages"
    else:
        held, remedy = f"of type {type(value).__name__}", "name a column of text, chats or token ids"
    raise UserError(f"{document.place}: {column!r} is {held}, and not {_EXPECTED[dataset.kind]}; {remedy}", Reason.BAD_DATA)


_EXPECTED = {"text": "text", "tokens": "a list of token ids"}


def packed(documents: Iterator[array[int]], length: int) -> Iterator[array[int]]:
    """Documents joined and cut into full rows; what is left over in the end is dropped."""
    stream = (token for ids in documents for token in ids)
    while len(row := array("q", islice(stream, length))) == length:
        yield row


def _rows(rows: Sequence[array[int]], documents: int, skipped: int, bos: str) -> Rows:
    import numpy
    import torch

    digest = hashlib.sha256()
    tokens = []
    for row in rows:
        ids = numpy.array(row, dtype="<i8")
        digest.update(len(row).to_bytes(8, "little") + ids.tobytes())
        tokens.append(torch.from_numpy(ids.astype(numpy.int64)))
    return Rows(tuple(tokens), f"sha256:{digest.hexdigest()}", documents, skipped, bos)


def too_few(data: Source, sample: Sample, rows: int, documents: int, skipped: int, first: str | None) -> UserError:
    """Too little data, and what can be done about it."""
    unusable = (
        f", {skipped} of them empty or of fewer than {SHORTEST} tokens in {sample.dataset.column!r} (first: {first})" if skipped else ""
    )
    packed = f", packed into rows of {sample.sequence_length} tokens" if sample.packing else ""
    remedies = [f"set {sample.SECTION}.samples to {rows} at most"] if rows else []
    if sample.packing:
        remedies.append("set a smaller sequenceLength")
    elif documents > skipped:
        remedies.append("set packing, which cuts long documents into several rows")
    remedies.append("give more data")
    hint = "" if documents > 1 or not documents else " (plain text: blank lines end a document)"
    return UserError(
        f"{data.uri}: {rows} of the {sample.samples} rows that {sample.SECTION}.samples asks for: {documents} documents{unusable}{packed}"
        f"{hint}; {', or '.join(remedies)}",
        Reason.BAD_DATA,
    )
