"""Descriptions that stand in several places of a schema are written out in the first: the others name it."""

from __future__ import annotations

from kompressor_api.structural import Schema

__all__ = ["Said", "say_once"]

Said = dict[tuple[str, str], str]
"""(name of a field, its description) -> path of the object that it is a field of."""
WORTH = 12
"""Characters that a pointer must save."""


def say_once(node: Schema, path: str, said: Said, keep: bool = False) -> None:
    """Of all fields below `node`, whose own path is `path`, replaces descriptions that `said` knows by where they are to be read, and adds
    the others to it. `keep`: replaces none."""
    for name, child in node.get("properties", {}).items():
        text = child["description"]
        where = said.setdefault((name, text), path)
        pointer = f"As in {where}."
        if not keep and where != path and len(text) - len(pointer) >= WORTH:
            child["description"] = pointer
        say_once(child.get("items", child), f"{path}.{name}", said, keep)
