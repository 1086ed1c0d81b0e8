"""The documents of a dataset, one after the other: JSON lines, Parquet and plain text, from any store, by ranges.

Documents are numbered from 0 through all files in the order of their names, and within a file as they stand there. Only those that are
asked for are parsed; of the others nothing is kept. No torch here: `kompressor plan` looks at the first document too.
"""

from __future__ import annotations

import difflib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kompressor_api.datasets import Dataset
from kompressor_api.names import Reason
from kompressor_worker.errors import UserError
from kompressor_worker.storage import ObjectInfo, Source

if TYPE_CHECKING:
    import pyarrow.parquet as parquet

__all__ = ["CHUNK", "DatasetFiles", "Document", "Records", "find_files"]

CHUNK = 8 << 20
"""Bytes of a range."""
LARGEST_DOCUMENT = 64 << 20
"""Bytes: a document is held whole."""

ENDINGS = {"jsonl": (".jsonl", ".ndjson"), "parquet": (".parquet",), "text": (".txt",)}
Wanted = Callable[[int], bool]


@dataclass(frozen=True)
class DatasetFiles:
    format: str
    """jsonl, parquet or text."""
    files: tuple[ObjectInfo, ...]
    """In the order in which they are read."""

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Document:
    number: int
    """From 0, through all files."""
    place: str
    """File and line (row), for error messages."""
    value: Any
    """What stands in the column, as JSON has it."""


def bad_data(message: str) -> UserError:
    return UserError(message, Reason.BAD_DATA)


def find_files(source: Source, dataset: Dataset) -> DatasetFiles:
    """The files to read and their format. In a folder those count whose names end as the format's do; .txt only where there is no other.

    Raises UserError (unknown or mixed formats, nothing in the files), and what listing raises.
    """
    listed = {name: info for name, info in sorted(source.list().items()) if not any(p.startswith((".", "_")) for p in name.split("/"))}
    if len(listed) == 1 and dataset.format is not None:
        return _not_empty(source.uri, DatasetFiles(dataset.format, tuple(listed.values())))
    found = {format: [info for name, info in listed.items() if name.lower().endswith(ends)] for format, ends in ENDINGS.items()}
    if dataset.format is not None:
        if not found[dataset.format]:
            ends = ", ".join(ENDINGS[dataset.format])
            raise bad_data(f"{source.uri}: no {dataset.format} files ({ends}) among {_some(listed)}; correct format or uri")
        return _not_empty(source.uri, DatasetFiles(dataset.format, tuple(found[dataset.format])))
    if found["jsonl"] and found["parquet"]:
        raise bad_data(f"{source.uri}: {found['jsonl'][0].name} and {found['parquet'][0].name} are both there; say which by dataset.format")
    for format, infos in found.items():
        if infos:
            return _not_empty(source.uri, DatasetFiles(format, tuple(infos)))
    raise bad_data(
        f"{source.uri}: {_some(listed)}: no known format; the names of JSON lines end in {' or '.join(ENDINGS['jsonl'])}, of Parquet in "
        f".parquet, of plain text in .txt: rename, unpack what is compressed, or set dataset.format"
    )


class Records:
    """Reads documents; `count` is how many have been met."""

    def __init__(self, source: Source, dataset: Dataset, files: DatasetFiles, chunk: int = CHUNK) -> None:
        self.count = 0
        self._source = source
        self._dataset = dataset
        self._files = files
        self._chunk = chunk

    def read(self, wanted: Wanted) -> Iterator[Document]:
        """The documents that are `wanted` by their number. Raises UserError, and what reading raises."""
        read = {"jsonl": self._jsonl, "parquet": self._parquet, "text": self._text}[self._files.format]
        for info in self._files.files:
            yield from read(info, wanted)

    def _next(self) -> int:
        self.count += 1
        return self.count - 1

    def _jsonl(self, info: ObjectInfo, wanted: Wanted) -> Iterator[Document]:
        for line, text in self._lines(info):
            if text.strip() and wanted(number := self._next()):
                place = f"{info.name}: line {line}"
                yield Document(number, place, self._column(place, _object(place, text)))

    def _text(self, info: ObjectInfo, wanted: Wanted) -> Iterator[Document]:
        """Paragraphs of lines, with at least one blank line between two documents."""
        lines: list[str] = []
        size, keep, number, begin = 0, False, 0, 0
        for line, text in self._lines(info, end=True):
            if text.strip():
                if not begin:
                    number, begin = self._next(), line
                    keep = wanted(number)
                size += len(text) if keep else 0
                if size > LARGEST_DOCUMENT:
                    raise _too_large(f"{info.name}: line {begin}", "put blank lines between documents")
                if keep:
                    lines.append(_decode(f"{info.name}: line {line}", text.rstrip(b"\r\n")))
            elif begin:
                if keep:
                    yield Document(number, f"{info.name}: line {begin}", "\n".join(lines))
                lines, size, keep, begin = [], 0, False, 0

    def _lines(self, info: ObjectInfo, end: bool = False) -> Iterator[tuple[int, bytes]]:
        """Lines with their numbers from 1, read chunk by chunk; with `end`, a blank line after the last one."""
        line, rest = 0, b""
        for start in range(0, info.size, self._chunk):
            block = self._source.read(info.name, start, min(start + self._chunk, info.size))
            if start == 0:
                block = block.removeprefix(b"\xef\xbb\xbf")
            *whole, rest = (rest + block).split(b"\n")
            for line, text in enumerate(whole, line + 1):  # noqa: B020 - counts on from the chunk before
                yield line, text
            if len(rest) > LARGEST_DOCUMENT:
                raise _too_large(f"{info.name}: line {line + 1}", "write one document a line")
        if rest:
            yield line + 1, rest
        if end:
            yield line + 2, b""

    def _parquet(self, info: ObjectInfo, wanted: Wanted) -> Iterator[Document]:
        """Of each row group only the column, and only where a row of it is wanted."""
        import pyarrow
        import pyarrow.parquet as parquet

        column = self._dataset.column
        try:
            with parquet.ParquetFile(pyarrow.PythonFile(_Ranges(self._source, info), mode="r"), buffer_size=self._chunk) as file:
                if column not in file.schema_arrow.names:
                    raise self._no_column(info.name, file.schema_arrow.names)
                for group in range(file.num_row_groups):
                    yield from self._group(info, file, group, wanted)
        except (pyarrow.ArrowException, OSError) as error:
            raise bad_data(f"{info.name}: cannot be read as Parquet ({error}); write the file again, or correct dataset.format") from error

    def _group(self, info: ObjectInfo, file: parquet.ParquetFile, group: int, wanted: Wanted) -> Iterator[Document]:
        rows, first = file.metadata.row_group(group).num_rows, self.count
        if not any(wanted(number) for number in range(first, first + rows)):
            self.count += rows
            return
        begin = sum(file.metadata.row_group(earlier).num_rows for earlier in range(group))
        for batch in file.iter_batches(row_groups=[group], columns=[self._dataset.column], batch_size=256):
            for row, cell in enumerate(batch.column(0), begin):
                if wanted(number := self._next()):
                    yield Document(number, f"{info.name}: row {row}", cell.as_py())
            begin += batch.num_rows

    def _column(self, place: str, record: Mapping[str, Any]) -> Any:
        if self._dataset.column not in record:
            raise self._no_column(place, list(record))
        return record[self._dataset.column]

    def _no_column(self, place: str, names: Sequence[str]) -> UserError:
        option = {"text": "field", "messages": "messages", "tokens": "tokens"}[self._dataset.kind]
        near = difflib.get_close_matches(self._dataset.column, names, n=1)
        hint = f"did you mean {near[0]}? Set" if near else "set"
        return bad_data(
            f"{place}: no column {self._dataset.column!r}, but {', '.join(map(repr, names)) or 'none'}; {hint} dataset.{option} "
            "(or dataset.field, dataset.messages, dataset.tokens, by what it holds)"
        )


class _Ranges(io.RawIOBase):
    """An object as a file that can be sought in, for pyarrow."""

    def __init__(self, source: Source, info: ObjectInfo) -> None:
        self._source = source
        self._info = info
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._info.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._info.size - self._at)]
        if len(view):
            self._source.read_into(self._info.name, self._at, view)
        self._at += len(view)
        return len(view)


def _object(place: str, text: bytes) -> dict[str, Any]:
    try:
        record = json.loads(_decode(place, text))
    except (ValueError, RecursionError) as error:
        raise bad_data(f'{place}: is not JSON ({error}); each line holds one object such as {{"text": "..."}}') from error
    if not isinstance(record, dict):
        raise bad_data(f'{place}: a JSON object is expected, not {type(record).__name__}; each line holds one such as {{"text": "..."}}')
    return record


def _decode(place: str, text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise bad_data(f"{place}: is not UTF-8 ({error}); write the file as UTF-8") from error


def _too_large(place: str, remedy: str) -> UserError:
    return bad_data(f"{place}: a document of more than {LARGEST_DOCUMENT >> 20} MiB; {remedy}")


def _not_empty(uri: str, found: DatasetFiles) -> DatasetFiles:
    if not found.bytes:
        raise bad_data(f"{uri}: {_some(info.name for info in found.files)}: no data in it; upload the dataset again")
    return found


def _some(names: Iterable[str]) -> str:
    first = list(names)
    return ", ".join(first[:5]) + (", ..." if len(first) > 5 else "")
