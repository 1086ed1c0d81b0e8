"""Removing folders that containers have written to."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def remove(folder: Path) -> None:
    """As far as it goes. An overlay's work folder is closed even to its owner, who may open it."""

    def opened(function: Callable[..., Any], path: str, error: Any) -> None:
        place = Path(path)
        if place != folder and place.is_dir() and not place.is_symlink():
            with contextlib.suppress(OSError):
                place.chmod(0o700)
                shutil.rmtree(place, ignore_errors=True)

    shutil.rmtree(folder, onerror=opened)
