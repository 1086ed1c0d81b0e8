"""A tokenizer's vocabulary as GGUF has it: text, type and score of every row of the embeddings, merges, and what comes around a text.

llama.cpp knows two kinds that the families have: byte-level BPE, by merges (`gpt2`), and SentencePiece's BPE, by scores (`llama`), where of
all neighbours that are a token together those with the highest score become one. What either would do otherwise is refused. Its source is
src/llama-vocab.cpp, as of b11739.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kompressor_worker.errors import CorruptSource
from kompressor_worker.formats import sentencepiece_model
from kompressor_worker.formats.gguf_architectures import unsupported
from kompressor_worker.formats.gguf_merges import SPACE, places_of, runs_of_spaces
from kompressor_worker.formats.gguf_pre_tokenizers import pre_tokenizer, rules
from kompressor_worker.formats.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

__all__ = ["Vocabulary", "of_json", "of_sentencepiece", "text_of"]

PAD_SCORE, ADDED_SCORE = -10000.0, -1000.0
STRIPPING = ("<unk>", "<s>", "<|endoftext|>")
"""Added tokens that do not take the whitespace behind them in the vocabulary of which llama.cpp knows, by the model's name, that all others
do."""
TAKEN_FOR_SPECIAL = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "</s>",
    "<eos>", "<end_of_utterance>", "<|eom_id|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<turn|>", "<|tool_response>",
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<PRE>", "<|code_prefix|>", "<|prefix|>",
    "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<SUF>", "<|code_suffix|>", "<|suffix|>",
    "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<MID>", "<|code_middle|>", "<|middle|>",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>",
    "<|file_sep|>", "<|channel|>", "<|message|>", "<|start|>", "<|constrain|>",
})  # fmt: skip
"""Texts that llama.cpp takes for special tokens where a vocabulary has them, whatever their type."""


@dataclass
class Vocabulary:
    """By id; ids that no token has are padding."""

    model: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    pre: str = "default"
    space_prefix: bool | None = None
    adds: tuple[str | None, str | None] = (None, None)
    """Tokens that are put before and behind a text."""
    strips: bool = False
    warnings: list[str] = field(default_factory=list)


def of_json(tokenizer: Mapping[str, Any], rows: int, settings: Mapping[str, Any]) -> Vocabulary:
    model = tokenizer["model"]
    if (kind := model.get("type", "BPE")) != "BPE":
        raise unsupported(f"tokenizer.json: model.type {kind}, and llama.cpp has these families' tokenizers as BPE only")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise unsupported(f"tokenizer.json: model.{key} {model[key]!r}, which llama.cpp does not have")
    made = _by_scores(tokenizer, rows) if model.get("byte_fallback") else _byte_level(tokenizer, rows)
    made.adds = _adds(tokenizer, settings)
    _warn_of_special(made)
    return made


def _byte_level(tokenizer: Mapping[str, Any], rows: int) -> Vocabulary:
    tokens, types = _listed(tokenizer, rows)
    made = Vocabulary("gpt2", tokens, types, merges=[" ".join(pair) for pair in _merges(tokenizer)], pre=pre_tokenizer(tokenizer))
    kinds = [kind for kind, _ in _parts(tokenizer.get("normalizer"), "normalizers")]
    if kinds == ["NFC"]:
        made.warnings.append(
            "the tokenizer composes characters first (NFC), and llama.cpp does not: a text that is not in NFC gets other tokens"
        )
    elif kinds:
        raise unsupported(f"tokenizer.json: normalizer {', '.join(kinds)}, which llama.cpp does not have for byte-level BPE")
    made.strips = _strips(tokenizer)
    return made


def _by_scores(tokenizer: Mapping[str, Any], rows: int) -> Vocabulary:
    """SentencePiece's BPE out of merges: a token's score is the place of its merges, all of which must stand together."""
    vocab: Mapping[str, int] = tokenizer["model"]["vocab"]
    prefix = _space_prefix(tokenizer)
    tokens, types = _listed(tokenizer, rows)
    for token in tokenizer.get("added_tokens", ()):
        if token.get("normalized") and (prefix or SPACE in token["content"] or " " in token["content"]):
            raise unsupported(
                f"tokenizer.json: the added token {token['content']!r} is looked for in the normalised text, and llama.cpp does not"
            )
    # a tab is a token of its own in Gemma's vocabulary, in place of its byte
    if missing := next(
        (t for byte in range(256) if (t := f"<0x{byte:02X}>") not in vocab and not (byte < 128 and chr(byte) in vocab)), None
    ):
        raise unsupported(f"tokenizer.json: byte_fallback without the token {missing}")
    unknown = tokenizer["model"].get("unk_token")
    for number, text in enumerate(tokens):
        if types[number] == NORMAL and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[number] = BYTE
        elif text == unknown:
            types[number] = UNKNOWN
        elif types[number] == USER_DEFINED and SPACE in text and text in vocab:
            types[number] = NORMAL  # it stands for spaces, which merges find
    if tokenizer["model"].get("ignore_merges"):
        raise unsupported("tokenizer.json: model.ignore_merges true beside byte_fallback, which llama.cpp does not have")
    merges = _merges(tokenizer)
    for text in runs_of_spaces(tokenizer.get("added_tokens", ()), merges) if not prefix else ():
        tokens[vocab[text]], types[vocab[text]] = " " * len(text), USER_DEFINED
    kept = [pair for pair in merges if types[vocab[pair[0] + pair[1]]] in (NORMAL, BYTE)]
    places = places_of(kept, {text for text, kind in zip(tokens, types, strict=True) if kind == NORMAL}, set(tokens))
    scores = [
        -float(places[text]) if text in places else 0.0 if kind in (NORMAL, BYTE) else PAD_SCORE if kind == UNUSED else ADDED_SCORE
        for text, kind in zip(tokens, types, strict=True)
    ]
    return Vocabulary("llama", tokens, types, scores, space_prefix=prefix, strips=_strips(tokenizer))


def _space_prefix(tokenizer: Mapping[str, Any]) -> bool:
    """X UserError for other rules than llama.cpp's."""
    steps = _parts(tokenizer.get("normalizer"), "normalizers")
    words = rules(tokenizer.get("pre_tokenizer"))
    replaced = ("Replace", {"pattern": {"String": " "}, "content": SPACE})
    between = ("Split", {"pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False})
    if steps == [("Prepend", {"prepend": SPACE}), replaced] and not words:
        return True
    if steps == [replaced] and words in ((), (between,)):
        return False
    if not steps and len(words) == 1 and words[0][0] == "Metaspace" and words[0][1].get("replacement") == SPACE:
        scheme = words[0][1].get("prepend_scheme", "always" if words[0][1].get("add_prefix_space", True) else "never")
        if words[0][1].get("split") is not False:
            raise unsupported("tokenizer.json: pre_tokenizer Metaspace with split true, and llama.cpp merges across words")
        if scheme == "never":
            return False
        why = {
            "first": "before the first word alone, and llama.cpp puts one behind every special token too",
            "always": "before a text that does not begin with one, and llama.cpp before any",
        }.get(scheme, "as no rule of llama.cpp's does")
        raise unsupported(
            f"tokenizer.json: pre_tokenizer Metaspace with prepend_scheme {scheme!r} puts a space {why}; give it the normalizers Prepend "
            "and Replace instead, if the model may see what those make"
        )
    found = ", ".join(kind for kind, _ in (*steps, *words)) or "nothing"
    raise unsupported(
        f"tokenizer.json: {found} before merges of BPE with byte_fallback, and llama.cpp puts {SPACE} for spaces, with one in front or not"
    )


def of_sentencepiece(data: bytes, rows: int, added: Mapping[str, Any], settings: Mapping[str, Any]) -> Vocabulary:
    model = sentencepiece_model.parse(data)
    if model.model_type != sentencepiece_model.BPE:
        raise unsupported("tokenizer.model: not a model of BPE, and llama.cpp has these families' tokenizers as that only")
    if model.rules or model.extra_whitespaces_removed:
        raise unsupported("tokenizer.model: it replaces characters or drops spaces before, which llama.cpp does not")
    pieces = {number: (p.text, p.score, p.type) for number, p in enumerate(model.pieces)}
    for text, number in added.items():
        pieces[int(number)] = (text, ADDED_SCORE, USER_DEFINED)
    for key, token in (settings.get("added_tokens_decoder") or {}).items():
        _check_added(token)
        pieces[int(key)] = (token["content"], ADDED_SCORE, CONTROL if token.get("special") else USER_DEFINED)
    if max(pieces) >= rows:
        raise unsupported(f"tokenizer.model: token {pieces[max(pieces)][0]!r} has id {max(pieces)}, and the embeddings have {rows} rows")
    padding = _padding(rows, {text for text, _, _ in pieces.values()})
    listed = [pieces.get(number, (padding[number], PAD_SCORE, UNUSED)) for number in range(rows)]
    tokens = [text.replace(SPACE, " ") if kind == USER_DEFINED else text for text, _, kind in listed]
    _check_twice(tokens)
    begin = text_of(settings.get("bos_token")) or (listed[1][0] if listed[1][2] == CONTROL else None)
    adds = (
        begin if settings.get("add_bos_token", True) else None,
        text_of(settings.get("eos_token")) if settings.get("add_eos_token") else None,
    )
    kinds, scores = [kind for _, _, kind in listed], [score for _, score, _ in listed]
    made = Vocabulary("llama", tokens, kinds, scores, space_prefix=model.dummy_prefix, adds=adds)
    _warn_of_special(made)
    return made


def _listed(tokenizer: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embeddings. Raises UserError."""
    found: dict[int, tuple[str, int]] = {int(number): (text, NORMAL) for text, number in tokenizer["model"]["vocab"].items()}
    for token in tokenizer.get("added_tokens", ()):
        _check_added(token)
        found[int(token["id"])] = (token["content"], CONTROL if token.get("special") else USER_DEFINED)
    if max(found) >= rows:
        raise unsupported(f"tokenizer.json: token {found[max(found)][0]!r} has id {max(found)}, and the embeddings have {rows} rows")
    padding = _padding(rows, {text for text, _ in found.values()})
    listed = [found.get(number, (padding[number], UNUSED)) for number in range(rows)]
    tokens = [text for text, _ in listed]
    _check_twice(tokens)
    return tokens, [kind for _, kind in listed]


def _warn_of_special(v: Vocabulary) -> None:
    if taken := [text for text, kind in zip(v.tokens, v.types, strict=True) if kind == NORMAL and text in TAKEN_FOR_SPECIAL]:
        named = ", ".join(map(repr, taken))
        v.warnings.append(
            f"llama.cpp takes {named} for special wherever it stands, and the tokenizer does not: a text that has it gets other tokens"
        )


def _check_added(token: Mapping[str, Any]) -> None:
    for key in ("lstrip", "single_word"):
        if token.get(key):
            raise unsupported(f"tokenizer.json: the added token {token.get('content')!r} has {key}, which llama.cpp does not know")


def _strips(tokenizer: Mapping[str, Any]) -> bool:
    """Whether special tokens take the whitespace behind them, as llama.cpp has it for one family: all but STRIPPING. Raises UserError."""
    added = tokenizer.get("added_tokens", ())
    taking = {token["content"] for token in added if token.get("rstrip")}
    if not taking:
        return False
    if taking != {token["content"] for token in added} - set(STRIPPING) or "</s>" not in taking:
        raise unsupported(
            f"tokenizer.json: the added token {min(taking)!r} has rstrip, which llama.cpp knows of Phi-3's vocabulary only, where all but "
            f"{', '.join(STRIPPING)} have it"
        )
    return True


def _padding(rows: int, taken: set[str]) -> list[str]:
    return [f"[PAD{number}]" if f"[PAD{number}]" not in taken else f"[PAD{number}_]" for number in range(rows)]


def _check_twice(tokens: Sequence[str]) -> None:
    if len(set(tokens)) < len(tokens):
        twice = next(text for text, count in Counter(tokens).items() if count > 1)
        raise unsupported(f"tokenizer: two tokens are {twice!r}, and llama.cpp takes one of a text")


def _merges(tokenizer: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in tokenizer["model"].get("merges", ())]
    if odd := next((pair for pair in pairs if len(pair) != 2 or any(" " in part for part in pair)), None):
        raise unsupported(f"tokenizer.json: the merge {odd!r} has a space in it, which llama.cpp cannot read")
    vocab = tokenizer["model"]["vocab"]
    if odd := next((pair for pair in pairs if "".join(pair) not in vocab), None):
        raise CorruptSource(f"tokenizer.json: the merge {odd!r} makes no token of the vocabulary; upload the file again")
    return pairs  # type: ignore[return-value]  # pairs


def _parts(found: Any, key: str) -> list[tuple[str, dict[str, Any]]]:
    """Type and parameters of each step of a normalizer, sequences flattened."""
    if found is None:
        return []
    if found.get("type") == "Sequence":
        return [part for step in found.get(key, ()) for part in _parts(step, key)]
    return [(str(found.get("type")), {name: value for name, value in found.items() if name != "type"})]


def _adds(tokenizer: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The tokens that are put before and behind a text: what tokenizer_config.json says goes before what tokenizer.json does, as in
    transformers. Raises UserError."""
    if settings.get("add_bos_token") is not None or settings.get("add_eos_token") is not None:
        said = [text_of(settings.get(f"{end}_token")) if settings.get(f"add_{end}_token") else None for end in ("bos", "eos")]
        return said[0], said[1]
    adds: tuple[str | None, str | None] = (None, None)
    for kind, parameters in _parts(tokenizer.get("post_processor"), "processors"):
        if kind == "ByteLevel":
            continue  # offsets alone
        if kind != "TemplateProcessing":
            raise unsupported(f"tokenizer.json: post_processor {kind}, which llama.cpp does not have")
        single = [piece.get("SpecialToken", {}).get("id") for piece in parameters.get("single", ())]
        if single.count(None) != 1 or len(single) - 1 - single.index(None) > 1 or single.index(None) > 1:
            raise unsupported(f"tokenizer.json: post_processor puts {single} around a text, and llama.cpp one token at most at either end")
        at = single.index(None)
        adds = (single[0] if at else None), (single[-1] if at < len(single) - 1 else None)
    return adds


def text_of(token: Any) -> str | None:
    """Of a token as it is written in tokenizer_config.json: its text, or an object with that."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None
