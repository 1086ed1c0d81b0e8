"""The image table: names that this node can run, and what stands behind them.

    {"kompressor/worker:dev": {"path": ["/venv/bin"], "env": {"HF_HUB_OFFLINE": "1"}, "user": 65532}}

`path` goes before the standard PATH. Optional: `env`, `root` (a folder used as the root file system instead of this
machine's), `keep` (folders of this machine that stay where they are even if a volume is mounted above them: a checkout
under /tmp), `user` and `group` (numbers), `workingDir`, `entrypoint`, `cmd`: as in an image's configuration.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

STANDARD_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Image:
    """One entry of the table; the names are those of its JSON."""

    name: str
    path: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    root: str = "/"
    keep: tuple[str, ...] = ()
    user: int = 0
    group: int = 0
    workingDir: str = "/"
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        """HOME is `/`, not this machine's: a pod must not find the developer's credentials and caches there."""
        return {"PATH": ":".join([*self.path, STANDARD_PATH]), "HOME": "/", **self.env}


class ImageError(Exception):
    """`reason` is the waiting reason (ErrImagePull, ErrImageNeverPull, InvalidImage)."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class ImageTable:
    """Reads its file at every look: an image added later is found by the next try, as on a real registry."""

    file: Path

    def find(self, name: str, pull_policy: str) -> Image:
        """The image; ImageError in the kubelet's words where the table has none of that name."""
        table = json.loads(self.file.read_text())
        if name in table:
            return _image(name, table[name])
        if pull_policy == "Never":
            raise ImageError("ErrImageNeverPull", f'Container image "{name}" is not present with pull policy of Never')
        known = ", ".join(sorted(table)) or "none"
        raise ImageError(
            "ErrImagePull",
            f'rpc error: code = NotFound desc = failed to pull and unpack image "{name}": failed to resolve reference '
            f'"{name}": {name}: not found (this node runs only the images in its table: {known})',
        )


def _image(name: str, entry: dict[str, Any]) -> Image:
    known = {each.name for each in fields(Image)} - {"name"}
    if unknown := sorted(set(entry) - known):
        raise ImageError("InvalidImage", f"image {name}: {unknown[0]} in the table is unknown; choose {sorted(known)}")
    lists = ("path", "keep", "entrypoint", "cmd")
    values: dict[str, Any] = {key: tuple(value) if key in lists else value for key, value in entry.items()}
    return Image(name=name, **values)
