"""The folder beside the target in which a result grows, and who may write there.

Beside `/models/x` stands `/models/.x.kompressor`, on the same file system:

    claims/      objects that replace() writes, generation by generation (claims.py)
    work/        other working objects
    uploads/     one empty file for each upload that is not complete
    temporary/   files on their way to one of the others
    data-<n>/    the result; n is the generation of the owner's first claim. One rename of it to the target publishes

A worker that was frozen and wakes after another one took over finds no `data-<n>` of its own, so it cannot open a file of the result any
more. A write that was already under way is seen by its file lock: the new owner waits for it, or goes on with a copy of that file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from kompressor_worker.errors import ClaimLost
from kompressor_worker.storage import WORK
from kompressor_worker.storage.claims import Claims
from kompressor_worker.storage.posix import Disk, copy_to_fresh_inode, lock

WRITER_GRACE = 5.0
"""Seconds that a new owner waits for a part which the old one is writing, before it copies the file."""
_DATA = "data-"


class Staging:
    """Raises ClaimLost where a folder of an owned output is not there any more; other OSErrors are the caller's to explain."""

    def __init__(self, target: Path, disk: Disk) -> None:
        self.folder = target.with_name(f".{target.name}.kompressor")
        self.work = self.folder / "work"
        self.uploads = self.folder / "uploads"
        self.temporary = self.folder / "temporary"
        self.claims = Claims(self.folder / "claims", self.temporary, disk)
        self.generation: int | None = None
        """The generation of this instance's claim; None before its first replace()."""
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Makes the folders, but for an owner: where its own are gone, they are not its own any more."""
        if self.generation is None:
            for folder in (self.work, self.uploads, self.temporary, self.claims.folder):
                folder.mkdir(parents=True, exist_ok=True)

    def claim(self, name: str, data: bytes, etag: str | None) -> int:
        """Compare-and-swap of a working object. The first one that succeeds makes this instance the owner of the data."""
        newest = max(self.data_generations(), default=0)
        generation = self.claims.replace(name, data, etag, at_least=newest + 1)
        with self._lock:
            if self.generation is None:
                self._take_over(generation)
                self.generation = generation
        return generation

    def data_generations(self) -> list[int]:
        try:
            return sorted(int(entry.name.removeprefix(_DATA)) for entry in self.folder.glob(f"{_DATA}*"))
        except FileNotFoundError:
            return []

    def data(self) -> Path:
        generation = self.generation
        if generation is None:
            generation = max(self.data_generations(), default=0)
        return self.folder / f"{_DATA}{generation}"

    def path(self, name: str) -> Path:
        return self.work / name.removeprefix(WORK) if name.startswith(WORK) else self.data() / name

    def make_parents(self, name: str) -> Path:
        """The path of `name`, its folders made; never the owner's `data-<n>` itself, whose absence means that the claim is lost."""
        path = self.path(name)
        if self.generation is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path
        folder = self.work if name.startswith(WORK) else self.data()
        for part in path.parent.relative_to(folder).parts:
            folder = folder / part
            folder.mkdir(exist_ok=True)
        return path

    def marker(self, name: str, upload: str) -> Path:
        return self.uploads / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}-{upload}"

    def forget_uploads(self, name: str) -> None:
        for marker in self.uploads.glob(self.marker(name, "*").name):
            marker.unlink(missing_ok=True)

    def enter(self, fd: int, path: Path) -> None:
        """Before a write: from here until `fd` is closed a new owner sees that somebody writes."""
        if not lock(fd, exclusive=False):
            raise self.lost(f"{path} is being taken over")
        try:
            inode = path.stat().st_ino
        except FileNotFoundError as error:
            raise self.lost(f"{path} is gone") from error
        if inode != os.fstat(fd).st_ino:
            raise self.lost(f"{path} was replaced")

    def remove(self, keep: Sequence[str] = ()) -> None:
        """All of it, but for the working objects in `keep`."""
        if self.generation is not None and max(self.data_generations(), default=0) > self.generation:
            raise self.lost(f"{self.folder} has a new owner")
        if not self.folder.is_dir():
            return
        if not keep:
            self._remove_all()
            return
        kept = {self.path(name) for name in keep}
        for entry in self.folder.iterdir():
            if entry != self.work:
                shutil.rmtree(entry)
        for path in sorted(self.work.rglob("*"), reverse=True):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
            elif path.is_file() and path not in kept:
                path.unlink()

    def _remove_all(self) -> None:
        """The claims last: where they are, somebody has to clear up. Another worker may be at it too."""
        while self.folder.is_dir():
            with contextlib.suppress(FileNotFoundError):
                for entry in sorted(self.folder.iterdir(), key=lambda entry: entry == self.claims.folder):
                    shutil.rmtree(entry)
                self.folder.rmdir()

    def lost(self, what: str) -> ClaimLost:
        return ClaimLost(f"{what}: another worker owns this output now, or has finished it; this one stops")

    def _take_over(self, generation: int) -> None:
        mine = self.folder / f"{_DATA}{generation}"
        while True:
            older = self.data_generations()
            if older and older[-1] >= generation:
                raise self.lost(f"{self.folder} has a new owner")
            try:
                if older:
                    (self.folder / f"{_DATA}{older[-1]}").rename(mine)
                else:
                    mine.mkdir()
            except FileNotFoundError as error:
                if not self.folder.is_dir():
                    raise self.lost(f"{self.folder} is gone") from error
                continue  # the one before us was renamed by a slower owner, which our claim outdates
            break
        for remains in older[:-1]:
            shutil.rmtree(self.folder / f"{_DATA}{remains}", ignore_errors=True)
        for folder, _, files in os.walk(mine):
            for entry in files:
                self._evict_writers(Path(folder) / entry)

    def _evict_writers(self, path: Path) -> None:
        deadline = time.monotonic() + WRITER_GRACE
        fd = os.open(path, os.O_RDWR)
        try:
            while not lock(fd, exclusive=True):
                if time.monotonic() > deadline:
                    copy_to_fresh_inode(path, self.temporary)
                    return
                time.sleep(0.02)
        finally:
            os.close(fd)
