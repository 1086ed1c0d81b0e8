"""Writing the result into a folder: `file://` and `pvc://`. It grows in a staging folder beside (staging.py) until one rename."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from kompressor_api.names import Reason
from kompressor_worker.errors import ClaimLost, NotFound, OutputOccupied, StorageError
from kompressor_worker.storage import WORK, ObjectInfo, Part
from kompressor_worker.storage.claims import etag_of
from kompressor_worker.storage.file_source import FileSource, list_files
from kompressor_worker.storage.posix import Disk, explained, reserve, write_at
from kompressor_worker.storage.staging import Staging

_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class FileOutput:
    """A folder that appears whole or not at all. The first replace() of an instance is its claim on the output."""

    minimum_part = 1
    local = True

    def __init__(self, uri: str, target: Path, disk: Disk) -> None:
        self.uri = uri
        self.target = target
        self.conditional: bool | None = None
        self._disk = disk
        self._staging = Staging(target, disk)
        self._unsynced: set[Path] = set()
        self._lock = threading.Lock()

    # working objects

    def place(self, name: str) -> str:
        return f"{self.uri.rstrip('/').rpartition('/')[0]}/{self._staging.path(name).relative_to(self.target.parent)}"

    def inner(self, name: str) -> FileOutput:
        made = FileOutput(self.place(f"{WORK}{name}"), self._staging.path(f"{WORK}{name}"), self._disk)
        made.conditional = self.conditional
        return made

    def as_source(self) -> FileSource:
        return FileSource(self.uri, self.target if self.target.is_dir() else self._staging.data())

    def probe(self) -> bool:
        name = f"{WORK}probe-{secrets.token_hex(8)}"
        with self._writing("probing"):
            self._staging.prepare()
            try:
                self._staging.claims.replace(name, b"1", None)
                self.conditional = True
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                self.conditional = False
            self._staging.claims.delete(name)
        return self.conditional

    def existing(self) -> dict[str, ObjectInfo]:
        with self._reading("listing"):
            if self.target.is_dir():
                return list_files(self.target)
            if self.target.exists():
                raise OutputOccupied(f"{self.uri}: {self.target} is a file; choose another output")
        return {}

    def room(self) -> int | None:
        place = next((p for p in self.target.parents if p.is_dir()), Path("/"))
        with self._reading("asking for free space"):
            disk = os.statvfs(place)
        return disk.f_bavail * disk.f_frsize if disk.f_blocks else None  # some network volumes say nothing

    def read_published(self, name: str) -> bytes:
        with self._reading(f"reading {name}"):
            return (self.target / name).read_bytes()

    def read(self, name: str) -> tuple[bytes, str] | None:
        with self._reading(f"reading {name}"):
            found = self._staging.claims.read(name)
            if found is not None:
                return found
            try:
                data = self._staging.path(name).read_bytes()
            except FileNotFoundError:
                return None
        return data, etag_of(0, data)

    def write(self, name: str, data: bytes) -> None:
        with self._writing(f"writing {name}"):
            self._staging.prepare()
            if self._staging.claims.generations(name):
                raise StorageError(f"{self.uri}: {name} belongs to replace(); a write() would overrun its owner")
            path = self._staging.make_parents(name)
            self._disk.write_atomically(path, self._staging.temporary, data)

    def replace(self, name: str, data: bytes, etag: str | None) -> str:
        with self._writing(f"replacing {name}"):
            if etag is None:
                self._staging.prepare()
            self._sync()
            if self.conditional is False:
                return self._replace_unguarded(name, data, etag)
            return etag_of(self._staging.claim(name, data, etag), data)

    def _replace_unguarded(self, name: str, data: bytes, etag: str | None) -> str:
        found = self.read(name)
        if (found[1] if found else None) != etag:
            raise ClaimLost(f"{self.uri}: {name} was changed by another worker, which owns this output now; this one stops")
        self.write(name, data)
        return etag_of(0, data)

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            with self._writing(f"deleting {name}"):
                self._staging.claims.delete(name)
                self._staging.path(name).unlink(missing_ok=True)

    # uploads

    def begin(self, name: str, size: int) -> str:
        with self._writing(f"starting {name} of {size} bytes"):
            self._staging.prepare()
            path = self._staging.make_parents(name)
            path.unlink(missing_ok=True)
            upload = f"{size}-{secrets.token_hex(8)}"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                reserve(fd, size)
            finally:
                os.close(fd)
            self._staging.forget_uploads(name)  # of a worker that was killed before it could commit; their file is gone now
            self._staging.marker(name, upload).touch()
        return upload

    def upload_exists(self, name: str, upload: str, parts: Sequence[Part]) -> bool:
        try:
            size = self._staging.path(name).stat().st_size
        except FileNotFoundError:
            return False
        marked = self._staging.marker(name, upload).exists()
        return marked and size == _size_of(upload) and all(part.offset + part.size <= size for part in parts)

    def write_part(self, name: str, upload: str, number: int, offset: int, chunks: Sequence[memoryview]) -> Part:
        size = sum(chunk.nbytes for chunk in chunks)
        if offset + size > _size_of(upload):
            raise StorageError(f"{self.uri}: {name} was begun with {_size_of(upload)} bytes, part {number} ends at {offset + size}")
        with self._writing(f"writing part {number} of {name}"):
            path = self._staging.path(name)
            fd = os.open(path, os.O_WRONLY)
            try:
                self._staging.enter(fd, path)
                write_at(fd, offset, chunks)
                self._disk.start_write_back(fd, offset, size)
            finally:
                os.close(fd)
        with self._lock:
            self._unsynced.add(path)
        return Part(number, offset, size, f"{offset}-{size}")

    def complete(self, name: str, upload: str, parts: Sequence[Part]) -> None:
        with self._writing(f"completing {name}"):
            path = self._staging.path(name)
            if not path.exists():
                path = self.target / name  # published already
            size, wanted = path.stat().st_size, sum(part.size for part in parts)
            if not size == wanted == _size_of(upload):
                raise StorageError(
                    f"{self.uri}: {name} was begun with {_size_of(upload)} bytes, has {size}, and its parts hold {wanted}; "
                    f"remove {self._staging.folder} and start again"
                )
            self._disk.sync(path)
            with self._lock:
                self._unsynced.discard(path)
            self._staging.marker(name, upload).unlink(missing_ok=True)

    def abort(self, name: str, upload: str) -> None:
        with self._writing(f"aborting {name}"):
            marker = self._staging.marker(name, upload)
            if not marker.exists():
                return
            path = self._staging.path(name)
            path.unlink(missing_ok=True)
            with self._lock:
                self._unsynced.discard(path)
            marker.unlink(missing_ok=True)

    # the end

    def publish(self, name: str, data: bytes) -> None:
        with self._writing("publishing"):
            if self._is_published(name, data):
                return
            left = len(list(self._staging.uploads.iterdir()))
            if left:
                raise StorageError(f"{self.uri}: {left} uploads are not complete; complete or abort them before publishing")
            path = self._staging.make_parents(name)
            self._disk.write_atomically(path, self._staging.temporary, data)
            for folder, _, _ in os.walk(self._staging.data()):
                self._disk.sync_folder(Path(folder))
            try:
                self._staging.data().rename(self.target)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    raise OutputOccupied(f"{self.uri}: {self.target} is a mount point; choose a folder inside it") from error
                if error.errno not in _OCCUPIED:
                    raise
                if not self._is_published(name, data):
                    raise OutputOccupied(f"{self.uri}: {self.target} is not an empty folder; choose another output") from error
            self._disk.sync_folder(self.target.parent)

    def _is_published(self, name: str, data: bytes) -> bool:
        """Whether this very result stands there. Raises OutputOccupied if something else does."""
        if not self.existing():
            return False
        try:
            if self.read_published(name) == data:
                return True
        except NotFound:
            pass
        raise OutputOccupied(f"{self.uri}: {self.target} holds something else; choose another output, or remove it")

    def unpublish(self, names: Sequence[str]) -> None:
        with self._reading("removing the result"):
            for name in names:
                path = self.target / name
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # until there is something else in a folder
                    while path != self.target:
                        path = path.parent
                        path.rmdir()

    def cleanup(self, keep: Sequence[str] = ()) -> None:
        with self._writing("cleaning up"):
            self._staging.remove(keep)

    # inside

    def _sync(self) -> None:
        """What a journal speaks of is on the disk before the journal is."""
        with self._lock:
            paths, self._unsynced = self._unsynced, set()
        for path in paths:
            self._disk.sync(path)

    @contextlib.contextmanager
    def _writing(self, doing: str) -> Iterator[None]:
        with self._reading(doing):
            try:
                yield
            except FileNotFoundError as error:
                if self._staging.generation is None:
                    raise
                raise self._staging.lost(f"{self.uri}: {doing}: {error.filename} is gone") from error

    def _reading(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return explained(f"{self.uri}: {doing}", Reason.OUTPUT_NOT_FOUND)


def _size_of(upload: str) -> int:
    return int(upload.split("-")[0])
