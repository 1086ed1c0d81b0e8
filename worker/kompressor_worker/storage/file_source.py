"""Reading a checkpoint or a dataset from a folder: `file://` and `pvc://`."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

from kompressor_api.names import Reason
from kompressor_worker.errors import AccessDenied, CorruptSource, NotFound, StorageError
from kompressor_worker.storage import WORK, ObjectInfo
from kompressor_worker.storage.posix import explained

_LARGEST_READ = 1 << 30
"""Linux reads at most 2 GiB at a time."""


class FileSource:
    """A folder, read by ranges. `confine` is the folder that symbolic links may not leave (a claim's root); `only` one file of it."""

    def __init__(
        self,
        uri: str,
        root: Path,
        confine: Path | None = None,
        only: str | None = None,
        holds: str = "config.json",
        missing: Reason = Reason.SOURCE_NOT_FOUND,
    ) -> None:
        self.uri = uri
        self.root = root
        self._only = only
        self._holds = holds
        self._missing = missing
        self._confine = confine.resolve() if confine is not None else None
        self._listed: dict[str, ObjectInfo] = {}
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()

    def list(self) -> dict[str, ObjectInfo]:
        if not self.root.is_dir():
            raise NotFound(f"{self.uri}: {self.root} is not a folder; give the folder that holds {self._holds}", self._missing)
        with explained(f"{self.uri}: listing", self._missing):
            self._listed = list_files(self.root) if self._only is None else list_one(self.root, self._only)
        if not self._listed:
            raise NotFound(f"{self.uri}: {self.root} holds no files; give the folder that holds {self._holds}", self._missing)
        return dict(self._listed)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        fd, size = self._file(name)
        data = bytearray((size if stop is None else stop) - start)
        self._fill(fd, name, start, memoryview(data))
        return bytes(data)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        self._fill(self._file(name)[0], name, start, buffer.cast("B"))

    def path(self, name: str) -> Path:
        self._file(name)  # it is there, the one that was listed, and inside
        return (self.root / name).resolve()

    def close(self) -> None:
        with self._lock:
            for fd in self._open.values():
                os.close(fd)
            self._open.clear()

    def __del__(self) -> None:
        self.close()

    def _fill(self, fd: int, name: str, start: int, buffer: memoryview) -> None:
        done = 0
        with explained(f"{self.uri}: reading {name}"):
            while done < len(buffer):
                count = os.preadv(fd, [buffer[done : done + _LARGEST_READ]], start + done)
                if count == 0:
                    raise CorruptSource(
                        f"{self.uri}: {name} ends at byte {start + done}, but bytes up to {start + len(buffer)} are wanted; "
                        "it is truncated, copy it again"
                    )
                done += count

    def _file(self, name: str) -> tuple[int, int]:
        """An open descriptor and the size; the file still is the one that was listed."""
        with self._lock:
            fd = self._open.get(name)
            if fd is None:
                fd = self._open[name] = self._open_file(name)
        info = os.fstat(fd)
        listed = self._listed.get(name)
        if listed is not None and listed.etag != _etag(info):
            raise CorruptSource(f"{self.uri}: {name} changed while it was read; let its writer finish, then start again")
        return fd, info.st_size

    def _open_file(self, name: str) -> int:
        path = self.root / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise NotFound(f"{self.uri}: {name!r} leads out of the location; name a file inside it")
        if self._confine is not None and not path.resolve().is_relative_to(self._confine):
            raise AccessDenied(f"{self.uri}: {name} is a link to {path.resolve()}, outside the claim; copy the file into the claim")
        with explained(f"{self.uri}: opening {name}", self._missing):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise StorageError(f"{self.uri}: {name} is not a regular file; replace it by one")
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return fd


def list_files(root: Path) -> dict[str, ObjectInfo]:
    """Regular files below `root`, links to files followed, WORK left out; a broken link is no file."""
    found: dict[str, ObjectInfo] = {}

    def refuse(error: OSError) -> None:
        raise error

    for folder, _, files in os.walk(root, onerror=refuse):
        for entry in files:
            path = Path(folder) / entry
            try:
                info = path.stat()
            except FileNotFoundError:
                continue
            name = path.relative_to(root).as_posix()
            if stat.S_ISREG(info.st_mode) and not name.startswith(WORK):
                found[name] = ObjectInfo(name, info.st_size, _etag(info))
    return dict(sorted(found.items()))


def list_one(root: Path, name: str) -> dict[str, ObjectInfo]:
    info = (root / name).stat()
    return {name: ObjectInfo(name, info.st_size, _etag(info))}


def _etag(info: os.stat_result) -> str:
    return f"{info.st_size}-{info.st_mtime_ns}"
