"""Names of linears as the patterns that compressed-tensors and vLLM match: a few regular expressions instead of a
thousand names.

Both match `re:` patterns with `re.match` on a module's name. Patterns begin with `.*` and end with `$`: loaders put
other prefixes before the layers (a multimodal model's language model, for one), and translate plain names but not
regular expressions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern, `re:` or plain, matches a module's name, as compressed-tensors' `match_name`."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern == name


def patterns_for(members: Sequence[str], names: Sequence[str]) -> list[str]:
    """Patterns that match every one of `members` and none other of `names`, in the order of `names`.

    A name outside any layer (`lm_head`) stays a plain name.
    """
    wanted = set(members)
    families: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        families.setdefault(_family(name), []).append(name)
    patterns: list[str] = []
    for family, siblings in families.items():
        chosen = [name for name in siblings if name in wanted]
        if not chosen:
            continue
        if "#" not in family:
            patterns += chosen
            continue
        others = [name for name in names if name not in wanted]
        layers = None if len(chosen) == len(siblings) else sorted({_first_index(name) for name in chosen})
        pattern = _regex(family, layers)
        # an odd subset (some experts of a layer, a prefix twice): names are always right
        exact = any(matches(pattern, other) for other in others) or not all(matches(pattern, name) for name in chosen)
        patterns += chosen if exact else [pattern]
    return patterns


def subtree_patterns(modules: Iterable[str], names: Sequence[str], spared: Sequence[str]) -> list[str]:
    """Patterns that match these modules and all below them, but none of `spared`. `names` are the decoder's linears.

    Outside the decoder's layers a whole branch (a vision tower) is one pattern, named after where it parts from them.
    """
    decoder = next((_prefix(name) for name in names if "#" in _family(name)), ())
    # a module that has quantised ones below it, such as a layer with a matrix of its own, is no Linear itself
    found = dict.fromkeys(_subtree(module.split("."), decoder) for module in modules)
    return [p for p in found if p is not None and not any(matches(p, name) for name in spared)]


def _subtree(parts: Sequence[str], decoder: Sequence[str]) -> str | None:
    shared = next((i for i, (part, other) in enumerate(zip(parts, decoder, strict=False)) if part != other), min(len(parts), len(decoder)))
    if shared == len(parts) or not parts[shared]:
        return None  # the decoder itself, or the model around it
    inside = parts[shared - 1 :] if shared == len(decoder) and shared else [parts[shared]]
    root = r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in inside)
    return rf"re:(.*\.)?{root}(\..*)?$"


def _prefix(name: str) -> tuple[str, ...]:
    family = _family(name)
    return family[: family.index("#")]


def _family(name: str) -> tuple[str, ...]:
    """The name's parts, with # for every index: what a layer's or an expert's namesakes have in common."""
    return tuple("#" if part.isdigit() else part for part in name.split("."))


def _first_index(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())


def _regex(family: tuple[str, ...], layers: Iterable[int] | None) -> str:
    first = family.index("#")
    inner = [r"\d+" if part == "#" else re.escape(part) for part in family[first + 1 :]]
    if layers is None and inner:
        return "re:" + r"\.".join([".*", *inner]) + "$"
    numbers = [r"\d+"] if layers is None else [str(layer) for layer in layers]
    which = numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"
    return "re:" + r"\.".join([".*" + re.escape(family[first - 1]), which, *inner]) + "$"
