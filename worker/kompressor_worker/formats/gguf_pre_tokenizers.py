"""How a text is cut into words before its merges, in tokenizer.json and by llama.cpp's names for the same.

llama.cpp has the rules compiled in, under a name each (`tokenizer.ggml.pre`); its converters find the name by a digest of what a known
tokenizer makes of a text. Here the rules are compared themselves: what is not exactly one of these is refused, naming what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kompressor_worker.formats.gguf_architectures import unsupported

__all__ = ["pre_tokenizer", "rules"]

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}|{REST}"

Rule = tuple[str, Any]
"""Split and its regular expression; bytes, and whether GPT-2's expression comes before; digits, and whether each is alone."""

KNOWN: dict[tuple[Rule, ...], dict[bool, str]] = {
    (("split", LLAMA3), ("bytes", False)): {True: "llama-bpe", False: "smaug-bpe"},
    (("split", QWEN2), ("bytes", False)): {False: "qwen2"},
    (("bytes", True),): {False: "gpt-2"},
    (("digits", True), ("bytes", True)): {False: "smollm"},
}
"""To llama.cpp's name, by whether a word that is in the vocabulary is taken as it is (`ignore_merges`)."""

CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
"""What is in the expressions of Mistral's tekken and of GPT-4o, whose counterparts in llama.cpp end words at combining marks."""


def pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name, for a tokenizer.json of byte-level BPE. Raises UserError."""
    found = rules(tokenizer.get("pre_tokenizer"))
    ignore = bool(tokenizer["model"].get("ignore_merges"))
    names = next((names for known, names in KNOWN.items() if known == found), None)  # what is not understood has no hash
    if names is None and any(kind == "split" and all(part in what for part in CASED) for kind, what in found):
        raise unsupported(
            "tokenizer.json: pre_tokenizer goes by letters' case, and llama.cpp's rules that do (tekken, gpt-4o) cut words at accents "
            "and vowel signs"
        )
    if names is None:
        raise unsupported(f"tokenizer.json: pre_tokenizer has {_strange(found)}, which no rule of llama.cpp known here has")
    if ignore not in names:
        raise unsupported(
            f"tokenizer.json: model.ignore_merges {ignore} beside this pre_tokenizer is not what llama.cpp's {names[not ignore]} does"
        )
    return names[ignore]


def _strange(found: tuple[Rule, ...]) -> str:
    """What sets it apart from the rules that are most like it, in words."""
    if not found:
        return "no rule at all"

    def shared(known: tuple[Rule, ...]) -> int:
        return next((n for n, (a, b) in enumerate(zip(known, found, strict=False)) if a != b), min(len(known), len(found)))

    at = max(map(shared, KNOWN))
    return said(found[at]) if at < len(found) else f"nothing behind {said(found[-1])}"


def said(rule: Rule) -> str:
    kind, what = rule
    words = {
        "bytes": f"ByteLevel with use_regex {what}",
        "digits": f"Digits with individual_digits {what}",
        "split": f"Split by {what!r:.120}",
    }
    return words.get(kind, f"{kind} {what!r:.120}")


def rules(found: Any) -> tuple[Rule, ...]:
    """Of tokenizer.json's `pre_tokenizer`; what is not understood is kept as it is written."""
    if found is None:
        return ()
    kind = found.get("type")
    if kind == "Sequence":
        return tuple(rule for part in found.get("pretokenizers", ()) for rule in rules(part))
    if kind == "ByteLevel" and not found.get("add_prefix_space", True):
        return (("bytes", bool(found.get("use_regex", True))),)
    if kind == "Digits":
        return (("digits", bool(found.get("individual_digits", False))),)
    pattern = found.get("pattern")
    isolated = (found.get("behavior"), bool(found.get("invert"))) in (("Isolated", False), ("Removed", True))
    if kind == "Split" and isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str) and isolated:
        return (("split", pattern["Regex"]),)  # these expressions leave nothing between two matches: removing that is keeping all
    return ((str(kind), {key: value for key, value in found.items() if key != "type"}),)
