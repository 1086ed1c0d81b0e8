"""Storage behind one small protocol: `s3://`, `hf://`, `pvc://` and `file://` look alike to the rest of the worker.

A `Source` is read by ranges. An `Output` is written in parts to final names that nobody can see until `publish`: multipart uploads on S3,
a staging folder beside the target on a file system. Small working objects (the journal) live under WORK.
All methods may be called from several threads at once; all errors are from kompressor_worker.errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

WORK = ".kompressor/"
"""Prefix of working objects at an output: journal, unit records, pending bytes. Gone once published."""
JOURNAL = f"{WORK}journal.json"


@dataclass(frozen=True)
class ObjectInfo:
    name: str
    """Relative to the store's URI, with forward slashes."""
    size: int
    etag: str
    """Changes when the content does: S3 ETag, hub blob id, or size and mtime of a file."""


@dataclass(frozen=True)
class Part:
    number: int
    """From 1, without gaps."""
    offset: int
    size: int
    etag: str
    """What the store needs to find the part again; opaque."""


class Source(Protocol):
    uri: str

    def list(self) -> dict[str, ObjectInfo]:
        """All objects by name. Raises NotFound (no bucket, folder, repository; or nothing there), AccessDenied, StorageError."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop). Raises NotFound, CorruptSource when the object is shorter than stop or changed since `list`."""

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fills `buffer` with the bytes from `start`; retries inside, going on where it stopped."""

    def path(self, name: str) -> Path | None:
        """Where another program of this machine can open the object; None where it must be fetched. Raises as `read`."""


class Output(Protocol):
    uri: str
    minimum_part: int
    """Smallest part but for the last one of an upload, in bytes: 5 MiB on S3, 1 on a file system."""
    conditional: bool | None
    """Whether replace() is honoured by the store; None until probe() was called."""
    local: bool
    """Whether what is written lies in files of this machine."""

    def probe(self) -> bool:
        """Finds out, with a working object, whether the store honours conditional writes; sets and returns `conditional`."""

    def existing(self) -> dict[str, ObjectInfo]:
        """What a reader of the output URI can see now, WORK left out; empty if the place does not exist yet.
        Raises NotFound when the bucket (or the claim) is missing, AccessDenied."""

    def room(self) -> int | None:
        """Bytes that can still be written here; None where nobody can tell."""

    def read_published(self, name: str) -> bytes:
        """A published object's content."""

    def read(self, name: str) -> tuple[bytes, str] | None:
        """A working object and its ETag, or None."""

    def place(self, name: str) -> str:
        """Where a person finds a working object."""

    def inner(self, name: str) -> Output:
        """An output of its own among the working objects, with its own journal: what a job needs on its way. It goes with the others."""

    def as_source(self) -> Source:
        """What is published here, or whole and about to be, to be read."""

    def write(self, name: str, data: bytes) -> None:
        """Writes a working object (under WORK) or a small final one, whole or not at all."""

    def replace(self, name: str, data: bytes, etag: str | None) -> str:
        """Writes only if the object's ETag still is `etag` (None: it does not exist yet); returns the new ETag. Raises ClaimLost.

        The first one of an instance is its claim on the output: an older owner's later calls raise ClaimLost. Parts written before a
        replace() are durable when it returns."""

    def delete(self, names: Sequence[str]) -> None:
        """Deletes working objects; absent ones are fine."""

    def begin(self, name: str, size: int) -> str:
        """Starts the upload of a final object of `size` bytes and returns its id."""

    def upload_exists(self, name: str, upload: str, parts: Sequence[Part]) -> bool:
        """Whether the upload still is there with these parts (a lifecycle rule may have taken it away)."""

    def write_part(self, name: str, upload: str, number: int, offset: int, chunks: Sequence[memoryview]) -> Part:
        """Uploads one part, given in chunks; returns once it is stored."""

    def complete(self, name: str, upload: str, parts: Sequence[Part]) -> None:
        """Makes the object whole. Done already (a resumed publish): returns. On S3 and pvc:// the bytes are durable after this;
        file:// promises what `cp` does."""

    def abort(self, name: str, upload: str) -> None:
        """Gives an upload up; absent ones are fine."""

    def publish(self, name: str, data: bytes) -> None:
        """Writes the last object (config.json), if it does not exist, and with it makes the output visible: on a file system one rename
        of the staging folder (without WORK). Raises OutputOccupied when somebody else has published here."""

    def unpublish(self, names: Sequence[str]) -> None:
        """Deletes published objects, in any order; absent ones are fine."""

    def cleanup(self, keep: Sequence[str] = ()) -> None:
        """Removes all working objects but those in `keep`, and every upload that is not complete; the journal last, so that whoever
        finds none has nothing to clear away. Several may do it at once."""


def s3_environment(prefix: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Credentials for one role: PREFIX_AWS_..., else none (the default chain of the SDK, or the pod's own identity, applies)."""
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")
    return {k: environ[prefix + k] for k in keys if environ.get(prefix + k)}
