"""All rows of a dataset, however large it is: on disk, and read one at a time as they are needed."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from kompressor_api.datasets import Sample
from kompressor_worker.calibration import SHORTEST, Encoder, Rows, packed, too_few
from kompressor_worker.errors import Terminated
from kompressor_worker.records import CHUNK, Records, find_files
from kompressor_worker.storage import Source
from kompressor_worker.tokenizer import ModelTokenizer

WIDTH = 4
"""Bytes of an id on disk."""
BUFFER = 4 << 20
"""Ids are written so many bytes at a time."""


class FileRows(Sequence[Any]):
    """int64 [length] each, of a file that goes with it; safe with several threads."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="kompressor-rows-", buffering=BUFFER)  # noqa: SIM115  # it lives as long as this does
        self._ends = array("Q", [0])

    def add(self, row: array[int]) -> None:
        self._file.write(array("i", row).tobytes())
        self._ends.append(self._ends[-1] + len(row))

    def written(self) -> FileRows:
        """Nothing is added any more."""
        self._file.flush()
        return self

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: Any) -> Any:
        import numpy
        import torch

        if not 0 <= number < len(self):
            raise IndexError(number)
        start, stop = self._ends[number], self._ends[number + 1]
        ids = numpy.frombuffer(os.pread(self._file.fileno(), (stop - start) * WIDTH, start * WIDTH), dtype=numpy.int32)
        return torch.from_numpy(ids.astype(numpy.int64))


def stream_rows(data: Source, sample: Sample, tokenizer: ModelTokenizer, stop: threading.Event | None = None, chunk: int = CHUNK) -> Rows:
    """Every row of the dataset, documents in their own order; `sample.samples` and `sample.seed` say nothing here. Memory holds one chunk
    of a file and 8 bytes a row. Raises what `calibration.read_rows` does."""
    length = sample.sequence_length
    records = Records(data, sample.dataset, find_files(data, sample.dataset), chunk)
    encode = Encoder(sample, tokenizer, 1 << 62 if sample.packing else length)
    skipped: list[str] = []

    def wanted(number: int) -> bool:
        if stop is not None and stop.is_set():
            raise Terminated(f"{data.uri}: told to stop while its documents were read")
        return True

    def documents() -> Iterator[array[int]]:
        for document in records.read(wanted):
            ids = encode(document)
            if len(ids) >= SHORTEST:
                yield ids
            else:
                skipped.append(document.place)

    rows, digest = FileRows(), hashlib.sha256()
    for row in packed(documents(), length) if sample.packing else documents():
        digest.update(len(row).to_bytes(8, "little") + array("q", row).tobytes())
        rows.add(row)
    if not len(rows):
        raise too_few(data, sample, 0, records.count, len(skipped), skipped[0] if skipped else None)
    return Rows(rows.written(), f"sha256:{digest.hexdigest()}", records.count, len(skipped), encode.bos_rule)
