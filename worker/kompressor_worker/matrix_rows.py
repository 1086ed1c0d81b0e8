"""Embeddings and head, which have a row for each token of the vocabulary: read and written slice by slice, and quantised so in a GGUF file,
whose types are all local to a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import xxhash
from torch import Tensor

from kompressor_worker import kernels, tensors
from kompressor_worker.block import Encoded
from kompressor_worker.formats.gguf_types import type_of
from kompressor_worker.formats.stored import decode as decode_linear
from kompressor_worker.formats.stored import named_tensors
from kompressor_worker.layout import LinearLayout, SourceTensor
from kompressor_worker.pipeline import Limits, Load, Loaded
from kompressor_worker.schemes import Scheme
from kompressor_worker.shards import PlacedTensor
from kompressor_worker.tensors import DTYPES, decode, refuse_nonfinite, slice_bytes
from kompressor_worker.writer import Writer

__all__ = ["RowCodes", "matrix_rows", "row_loads"]


def row_loads(source: SourceTensor, limits: Limits) -> Iterator[Load]:
    """Whole rows, as many as fit into a slice; a tensor that must be decoded comes in one."""
    if source.encoding != "plain":
        yield Load(tuple((s, 0, s.nbytes) for s in source.stored))
        return
    (stored,) = source.stored
    row = stored.nbytes // max(1, source.shape[0])
    size = max(1, limits.slice // max(1, row)) * row
    for start in range(0, stored.nbytes, size):
        yield Load(((stored, start, min(start + size, stored.nbytes)),))


def matrix_rows(source: SourceTensor, incoming: Iterator[Loaded], limits: Limits) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of a matrix, as `row_loads` asked for them."""
    first = 0
    for _ in row_loads(source, limits):
        views = next(incoming).views
        if source.encoding != "plain":
            rows = decode(source, views)
        else:
            rows = tensors.tensor(views[source.stored[0].name], source.dtype, (-1, *source.shape[1:]))
        refuse_nonfinite(source.name, kernels.nonfinite(rows))
        yield first, rows
        first += len(rows)


@dataclass
class RowCodes:
    """What becomes of the rows of a matrix, slice by slice."""

    matrix: LinearLayout
    scheme: Scheme | None
    """None: they stay as they are."""
    place: PlacedTensor | None = None
    """Where they are written."""
    _error: float = 0.0
    _norm: float = 0.0

    def __post_init__(self) -> None:
        self._hasher = xxhash.xxh3_128()

    @classmethod
    def of(cls, matrix: LinearLayout, schemes: Mapping[str, Scheme], placed: Sequence[PlacedTensor] = ()) -> RowCodes:
        """A scheme of another format is none of these: then the matrix is quantised whole."""
        scheme = schemes.get(matrix.name)
        place = next((t for t in placed if t.name == matrix.weight), None)
        return cls(matrix, scheme if scheme is not None and scheme.format == "gguf" else None, place)

    def stored(self, rows: Tensor) -> Tensor:
        """As the file holds them. Raises BadNumerics."""
        if self.scheme is None:
            return rows
        data, error, norm, bad = kernels.gguf_quantize(rows, type_of(self.scheme).name)
        refuse_nonfinite(self.matrix.weight, bad)
        self._error += error
        self._norm += norm
        return data

    def seen(self, stored: Tensor) -> Tensor:
        """As its readers see them, in the model's dtype."""
        if self.scheme is None:
            return stored
        tensors = named_tensors(self.matrix.name, (len(stored), self.matrix.shape[1]), self.scheme, stored)
        return decode_linear(self.matrix.name, tensors, self.scheme, DTYPES[self.matrix.dtype])

    def write(self, stored: Tensor, writer: Writer) -> None:
        """The next rows, as the file holds them."""
        assert self.place is not None, f"{self.matrix.weight}: not planned"
        data = slice_bytes(stored, self.place)
        self._hasher.update(data)
        writer.append(self.place, data)

    def finish(self, writer: Writer) -> None:
        writer.record_digest(self.matrix.weight, self._hasher.hexdigest())
        if self.scheme is not None:
            writer.record_linear(self.matrix, self.scheme, Encoded({}, self._error, self._norm))
