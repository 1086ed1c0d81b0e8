"""Compare-and-swap on a file system, without a lock that a frozen process could hold for ever.

An object is a folder of generations `000000000001`, `000000000002`, ...; the highest one is the object. To replace generation n is to
`link` a finished temporary file as n+1: the kernel lets exactly one process do that, on local disks and on NFS. Older generations
stay, as empty files: were they removed, a process that slept could make one of them again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import urllib.parse
from pathlib import Path

from kompressor_worker.errors import ClaimLost
from kompressor_worker.storage.posix import Disk


class Claims:
    """Objects that are replaced only by who knows their ETag, in `folder`; `temporary` is on the same file system."""

    def __init__(self, folder: Path, temporary: Path, disk: Disk) -> None:
        self.folder = folder
        self.temporary = temporary
        self.disk = disk

    def _object(self, name: str) -> Path:
        return self.folder / urllib.parse.quote(name, safe="")

    def generations(self, name: str) -> list[int]:
        try:
            return sorted(int(entry.name) for entry in self._object(name).iterdir() if entry.name.isdigit())
        except FileNotFoundError:
            return []

    def read(self, name: str) -> tuple[bytes, str] | None:
        """Content and ETag of the highest generation, or None."""
        generations = self.generations(name)
        while generations:
            try:
                data = (self._object(name) / f"{generations[-1]:012}").read_bytes()
            except FileNotFoundError:  # deleted just now
                return None
            before, generations = generations, self.generations(name)
            if generations[-1:] == before[-1:]:  # else it may have been emptied while it was read
                return data, etag_of(generations[-1], data)
        return None

    def replace(self, name: str, data: bytes, etag: str | None, at_least: int = 1) -> int:
        """Writes the generation after `etag` (None: the first, numbered `at_least`) and returns its number. Raises ClaimLost."""
        expected = int(etag.split("-")[0]) if etag is not None else 0
        present = self.generations(name)
        if (present[-1] if present else 0) != expected:
            raise ClaimLost(self._lost(name, etag, present))
        generation = expected + 1 if etag is not None else at_least
        folder = self._object(name)
        if etag is None:
            folder.mkdir(parents=True, exist_ok=True)
        temporary = self.disk.write_temporary(self.temporary, data)
        try:
            os.link(temporary, folder / f"{generation:012}")
        except (FileExistsError, FileNotFoundError) as error:
            raise ClaimLost(self._lost(name, etag, self.generations(name))) from error
        finally:
            temporary.unlink(missing_ok=True)
        self.disk.sync_folder(folder)
        if etag is not None:
            with contextlib.suppress(FileNotFoundError):
                os.truncate(folder / f"{expected:012}", 0)
        return generation

    def delete(self, name: str) -> None:
        folder = self._object(name)
        for generation in self.generations(name):
            (folder / f"{generation:012}").unlink(missing_ok=True)
        try:
            folder.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise

    def _lost(self, name: str, etag: str | None, present: list[int]) -> str:
        found = f"generation {present[-1]}" if present else "nothing"
        expected = f"generation {etag.split('-')[0]}" if etag is not None else "nothing"
        return f"{self._object(name)}: expected {expected}, found {found}: another worker owns this output now; this one stops"


def etag_of(generation: int, data: bytes) -> str:
    return f"{generation}-{hashlib.sha256(data).hexdigest()[:16]}"
