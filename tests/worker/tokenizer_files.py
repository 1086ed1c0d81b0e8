"""Small tokenizers laid out as the published ones are: the same normalizers, pre-tokenizers, decoders and kinds of added tokens."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from kompressor_worker.formats.gguf_pre_tokenizers import LLAMA3, QWEN2

__all__ = [
    "TEXT", "byte_level", "gemma",
    "gpt2", "llama2", "llama3", "metaspace", "phi3", "phi4", "piece_file", "qwen2", "sentencepiece", "smollm",
]  # fmt: skip

TEXT = """def fib(n: int) -> int:
\treturn n if n < 2 else fib(n - 1) + fib(n - 2)   # O(2**n)!!


for i in range(1234567):    print(f"{i:>8}: {fib(i)!r}")  \n \n  \n\n\n\t\t \t
We've told you: I'M here, they'll come, it's 3.14159 or 1,000,000.00; 2025-01-31T23:59:59Z?!...
Emoji: 🚀 👩‍👩‍👧‍👦 🏳️‍🌈 ✅✅ 🦙🦙🦙 e\u0301 café naïve Ünïcödé straße ǅ
Русский текст, українська мова; Ελληνικά· עברית מימין לשמאל — العربية ١٢٣٤ हिन्दी में लिखा ไทยไม่มีวรรค
中文没有空格，日本語のテキスト、한국어 텍스트 ½ ² Ⅻ ①
   leading spaces and trailing\x20\x20\x20
aaaaaaaaaaaaaaaaaaaa                                 bbbbbbb ------======= ''''''\"\"\"\"
<html><body class="x">&amp;</body></html> \\frac{1}{2} $x^2$ C:\\Windows\\ https://example.org/a?b=c#d
"""
SAMPLE = "the quick brown fox jumps over the lazy dog and they will return to the range of the text with spaces "


def byte_level(
    pre: Any,
    specials: Sequence[str],
    plain: Sequence[str] = (),
    begin: str | None = None,
    normalizer: Any = None,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """tokenizer.json of byte-level BPE. `plain`: added tokens that are not special. `begin`: what is put before a text."""
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer, made.decoder = pre, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    made.train_from_iterator([*TEXT.splitlines(True), SAMPLE] * 2, trainer)
    if normalizer is not None:
        made.normalizer = normalizer
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    if begin is not None:
        made.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, made.token_to_id(begin))]
                ),
            ]
        )
    found: dict[str, Any] = json.loads(made.to_str())
    return found


def template(tokenizer: Any, begin: str) -> Any:
    special = [(begin, tokenizer.token_to_id(begin))]
    return processors.TemplateProcessing(single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=special)


def split(pattern: str) -> Any:
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    return pre_tokenizers.Sequence(parts)


def llama3() -> dict[str, Any]:
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return byte_level(split(LLAMA3), specials, begin="<|begin_of_text|>", ignore_merges=True)


def phi4() -> dict[str, Any]:
    parts = [pre_tokenizers.Split(Regex(LLAMA3), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    return byte_level(pre_tokenizers.Sequence(parts), ["<|endoftext|>", "<|im_sep|>"])


def qwen2() -> dict[str, Any]:
    return byte_level(
        split(QWEN2), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<tool_call>", "</tool_call>"], normalizer=normalizers.NFC()
    )


def gpt2() -> dict[str, Any]:
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"])


def smollm() -> dict[str, Any]:
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return byte_level(pre_tokenizers.Sequence(parts), ["<|endoftext|>", "<|im_start|>"])


def sentencepiece(
    specials: Sequence[str], extra: Sequence[str] = (), prefix: bool = True, added: Sequence[Mapping[str, Any]] = (), begin: str = "<s>"
) -> dict[str, Any]:
    """tokenizer.json of SentencePiece's BPE as transformers converts it. `extra`: tokens beside those that are learned."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, max_token_length=12, limit_alphabet=90)
    learned.train_from_iterator([line for line in [*TEXT.splitlines(), SAMPLE] * 2 if line.strip()], trainer)
    tokens = sorted(learned.get_vocab(), key=lambda text: (len(text) == 1, learned.token_to_id(text)))
    runs = ["▁" * n for n in (2, 4, 3, 8)]
    listed = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *extra, *runs, *tokens]
    vocab = {text: number for number, text in enumerate(dict.fromkeys(listed))}
    normal = [text for text in vocab if text not in specials]
    merges = [
        [text[:cut], text[cut:]]
        for text in normal
        for cut in range(len(text) - 1, 0, -1)
        if text[:cut] in vocab and text[cut:] in vocab and not text.startswith("<0x")
    ]
    made = Tokenizer(models.BPE(vocab, [(a, b) for a, b in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replaced = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replaced]) if prefix else replaced
    if not prefix:
        made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    for token in added:
        kinds = {"normalized": False, "special": False, **token}
        made.add_tokens([AddedToken(kinds.pop("content"), **kinds)])
    made.post_processor = template(made, begin)
    found: dict[str, Any] = json.loads(made.to_str())
    return found


def llama2() -> dict[str, Any]:
    return sentencepiece(["<unk>", "<s>", "</s>"], added=[{"content": "<|im_start|>", "special": True}, {"content": "[TOOL]"}])


def metaspace() -> dict[str, Any]:
    """Spaces marked by the pre-tokenizer, none in front."""
    words = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
    return {**sentencepiece(["<unk>", "<s>", "</s>"]), "normalizer": None, "pre_tokenizer": words}


def gemma() -> dict[str, Any]:
    """Runs of spaces and of newlines are tokens; merges into them come first, and those into one of them do not stand together."""
    newlines, spaces = ["\n\n", "\n\n\n"], ["▁" * n for n in range(2, 9)]
    made = sentencepiece(
        ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
        extra=["\n", *newlines, *spaces, "\t"],
        prefix=False,
        added=[{"content": text} for text in (*newlines, *spaces, "<table>")],
        begin="<bos>",
    )
    runs = [pair for pair in made["model"]["merges"] if set("".join(pair)) in ({"▁"}, {"\n"})]
    vocab: dict[str, int] = made["model"]["vocab"]
    vocab["<unused>"] = vocab.pop("\t")
    vocab["\t"] = vocab.pop("<0x09>")
    others = [pair for pair in made["model"]["merges"] if pair not in runs]
    made["model"]["merges"] = sorted(runs, key=lambda pair: (-len(pair[0]), -len(pair[1]))) + others
    return made


def phi3() -> dict[str, Any]:
    made = sentencepiece(["<unk>", "<s>", "</s>"])
    number = max(made["model"]["vocab"].values())
    plain = {"single_word": False, "lstrip": False, "normalized": False}
    for token in made["added_tokens"]:
        token.update({"rstrip": token["content"] == "</s>", "special": token["content"] != "</s>"})
    for text in ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"):
        number += 1
        made["added_tokens"].append({"id": number, "content": text, **plain, "rstrip": text != "<|endoftext|>", "special": True})
    made["post_processor"] = None
    return made


def piece_file(tokenizer: Mapping[str, Any]) -> bytes:
    """tokenizer.model of what `sentencepiece` made."""
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    made = {left + right: 0 for left, right in tokenizer["model"]["merges"]}
    scores = {text: -float(place) for place, text in enumerate(made)}
    data = b""
    for text in sorted(vocab, key=vocab.__getitem__):
        kind = 6 if text.startswith("<0x") else 2 if text == "<unk>" else 3 if text in ("<s>", "</s>") else 1
        piece = field(1, text.encode()) + b"\x15" + struct.pack("<f", scores.get(text, 0.0)) + b"\x18" + bytes([kind])
        data += field(1, piece)
    trainer, normalizer = b"\x18\x02", b"\x20\x00"  # model_type BPE; remove_extra_whitespaces false
    return data + field(2, trainer) + field(3, normalizer)


def field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2]) + varint(len(data)) + data


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)
