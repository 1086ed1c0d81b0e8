"""Merges of SPACE-marked BPE as llama.cpp does them: by one score for each token that comes out, not by pairs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from kompressor_worker.formats.gguf_architectures import unsupported

__all__ = ["SPACE", "places_of", "runs_of_spaces"]

SPACE = "▁"
Pair = tuple[str, str]


def places_of(merges: Sequence[Pair], normal: Iterable[str], known: Collection[str]) -> dict[str, int]:
    """By token: the place of its merges among those of all tokens. `normal`: tokens that merges may make; `known`: all that llama.cpp finds
    by their text. Raises UserError where neighbours would become a token by scores and not by merges, or in another order."""
    places: dict[str, int] = {}
    before = None
    for left, right in merges:
        token = left + right
        if token != before and token in places:
            raise unsupported(
                f"tokenizer.json: merges into {token!r} stand apart, and llama.cpp has one score for all; it would merge in another order"
            )
        places.setdefault(token, len(places))
        before = token
    pairs = set(merges)
    for token in normal:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in known and right in known and (left, right) not in pairs:
                raise unsupported(f"tokenizer.json: {left!r} and {right!r} are not merged into {token!r}, and llama.cpp would merge them")
    return places


def runs_of_spaces(added: Iterable[Mapping[str, Any]], merges: Sequence[Pair]) -> list[str]:
    """Added tokens of two spaces or more, as Gemma's vocabulary has them, if merges make the longest of them out of any run of spaces
    before anything else is made of one: then llama.cpp may look for them in the text, where it takes the longest first. Else none."""
    runs = sorted({t["content"] for t in added if not t.get("special") and len(t["content"]) > 1 and set(t["content"]) == {SPACE}}, key=len)
    if not runs or [len(run) for run in runs] != list(range(2, len(runs) + 2)) or (SPACE, SPACE) not in merges:
        return []
    first, spaces = set(merges[: merges.index((SPACE, SPACE))]), {SPACE, *runs}
    longer = all((run, SPACE) in first for run in runs[:-1])
    others = any(SPACE in (left[-1:], right[:1]) and left + right not in spaces for left, right in first)
    long = spaces - {SPACE}
    operands = any((left in long or right in long) and left + right not in spaces for left, right in merges)
    return runs if longer and not others and not operands else []
