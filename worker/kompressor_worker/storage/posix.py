"""What file storage needs of the operating system: atomic small files, early write-back, locks that show a writer, clear errors."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kompressor_api.names import Reason
from kompressor_worker.errors import AccessDenied, KompressorError, NoSpaceLeft, NotFound, StorageError

_libc = ctypes.CDLL(None, use_errno=True)
_SYNC_FILE_RANGE_WRITE = 2
_IOV_MAX = 1024
_LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def explained(what: str, missing: Reason = Reason.SOURCE_NOT_FOUND) -> Iterator[None]:
    """Turns an OSError into an error of ours that starts with `what` (the object and what was done to it)."""
    try:
        yield
    except OSError as error:
        raise translate(error, what, missing) from error


def translate(error: OSError, what: str, missing: Reason = Reason.SOURCE_NOT_FOUND) -> KompressorError:
    text = f"{what}: {os.strerror(error.errno) if error.errno else error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NoSpaceLeft(f"{text}; enlarge the volume or free space on it, the next worker goes on where this one stopped")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessDenied(f"{text}; let user {os.geteuid()}, group {os.getegid()} in (fsGroup, or the folder's mode)")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFound(f"{text}; check the location's uri", reason=missing)
    return StorageError(f"{text}; check the volume and the node's kernel log")


@dataclass(frozen=True)
class Disk:
    """How writes reach the disk. `durable`: what has returned outlives the node (a volume, pvc://). Otherwise it is in the page
    cache, as after `cp` (file://, on one machine): a killed process loses nothing either way."""

    durable: bool

    def sync(self, path: Path) -> None:
        if self.durable:
            _sync(path, os.O_RDONLY)

    def sync_folder(self, folder: Path) -> None:
        if self.durable:
            _sync(folder, os.O_RDONLY | os.O_DIRECTORY)

    def start_write_back(self, fd: int, offset: int, size: int) -> None:
        """Lets the disk begin now with these bytes, so that the sync at the end has little left to wait for. A hint: it may fail."""
        if self.durable:
            _libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(size), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))

    def write_temporary(self, folder: Path, data: bytes) -> Path:
        """A new file with a random name in `folder`, whole."""
        path = folder / secrets.token_hex(8)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            write_at(fd, 0, [memoryview(data)])
            if self.durable:
                os.fdatasync(fd)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        return path

    def write_atomically(self, path: Path, temporary_folder: Path, data: bytes) -> None:
        """`path` holds the old bytes or the new ones, whatever happens. Both folders exist, on one file system."""
        temporary = self.write_temporary(temporary_folder, data)
        try:
            temporary.rename(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self.sync_folder(path.parent)


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_at(fd: int, offset: int, chunks: Sequence[memoryview]) -> None:
    """Writes the chunks one after the other from `offset`, without joining them."""
    left = [chunk.cast("B") for chunk in chunks if chunk.nbytes]
    while left:
        written = os.pwritev(fd, left[:_IOV_MAX], offset)
        offset += written
        while left and written >= left[0].nbytes:
            written -= left.pop(0).nbytes
        if written:
            left[0] = left[0][written:]


def reserve(fd: int, size: int) -> None:
    """Makes the file `size` bytes long and its space certain, where the file system can (it says no space left now, not an hour later)."""
    if size == 0:
        return
    if _libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
        raise OSError(code, os.strerror(code))
    os.ftruncate(fd, size)


def lock(fd: int, exclusive: bool) -> bool:
    """Tries to lock an open file. False: somebody else holds it. True where the file system has no locks: there nothing can be known."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno not in _LOCKS_UNSUPPORTED:
            raise
    return True


def copy_to_fresh_inode(path: Path, temporary_folder: Path) -> None:
    """Puts a copy in the place of `path`: whoever still holds the old file open writes into nothing."""
    temporary = temporary_folder / secrets.token_hex(8)
    source = os.open(path, os.O_RDONLY)
    try:
        target = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            size = os.fstat(source).st_size
            reserve(target, size)
            done = 0
            while done < size:
                count = _copy_some(source, target, done, size - done)
                if count == 0:
                    break
                done += count
            os.fdatasync(target)
        finally:
            os.close(target)
    finally:
        os.close(source)
    temporary.rename(path)


def _copy_some(source: int, target: int, offset: int, size: int) -> int:
    try:
        return os.copy_file_range(source, target, size, offset, offset)  # shares the blocks on XFS and btrfs
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            raise
    return os.pwrite(target, os.pread(source, min(size, 8 << 20), offset), offset)
