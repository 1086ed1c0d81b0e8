"""Files of a volume, swapped in all at once, in the kubelet's layout.

    ..2026_01_02_03_04_05.123456/key     the files
    ..data -> ..2026_01_02_03_04_05.123456
    key -> ..data/key

A reader that holds the folder open sees the old files or the new ones, never a mixture.
"""

import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path


@dataclass(frozen=True)
class File:
    data: bytes
    mode: int


@dataclass(frozen=True)
class Owner:
    """Who gets the files; None keeps this process's user or group."""

    uid: int | None = None
    gid: int | None = None

    def take(self, path: Path) -> None:
        if self.uid is not None or self.gid is not None:
            os.chown(path, -1 if self.uid is None else self.uid, -1 if self.gid is None else self.gid)


def write(folder: Path, files: dict[str, File], owner: Owner) -> None:
    """Makes `folder` hold exactly `files` (relative paths); does nothing where it already does."""
    current = folder / "..data"
    if current.exists() and _read(current) == files:
        return
    fresh = folder / datetime.now(UTC).strftime("..%Y_%m_%d_%H_%M_%S.%f")
    for name, file in files.items():
        path = fresh / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.data)
        path.chmod(file.mode)
        owner.take(path)
    fresh.mkdir(parents=True, exist_ok=True)
    old = current.resolve() if current.is_symlink() else None
    swap = folder / "..data_tmp"
    swap.symlink_to(fresh.name)
    swap.replace(current)
    wanted = {Path(name).parts[0] for name in files}
    for name in wanted:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(Path("..data", name))
    for entry in folder.iterdir():
        if not entry.name.startswith("..") and entry.name not in wanted:
            entry.unlink()
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _read(folder: Path) -> dict[str, File]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): File(path.read_bytes(), path.stat().st_mode & 0o7777) for path in found}
