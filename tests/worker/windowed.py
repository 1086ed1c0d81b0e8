"""Published models with windows in other layers than those that a job chose: the same files, another config.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

__all__ = ["FULL", "SLIDING", "config_of", "variant"]

SLIDING, FULL = "sliding_attention", "full_attention"


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def variant(folder: Path, name: str, layer_types: list[str]) -> Path:
    """Beside the folder."""
    made = folder.with_name(name)
    shutil.copytree(folder, made)
    (made / "config.json").write_text(json.dumps({**config_of(folder), "layer_types": layer_types}))
    return made
