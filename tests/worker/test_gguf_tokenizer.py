"""GGUF: tokenizers laid out as published ones give the same ids in llama.cpp; those that would not are refused, in a line that says why."""

from __future__ import annotations

import copy
import json
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizer_files
from tokenizer_files import TEXT
from tokenizers import Tokenizer

from gguf_files import Request, llama_cpp
from kompressor_worker.errors import CorruptSource, UserError
from kompressor_worker.formats.gguf_tokenizer import TokenizerMetadata, tokenizer_metadata

KINDS: dict[str, tuple[Callable[[], dict[str, Any]], str, str]] = {
    "llama3": (tokenizer_files.llama3, "llama-bpe", "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"),
    "phi4": (tokenizer_files.phi4, "smaug-bpe", "<|im_sep|>{}<|endoftext|>"),
    "qwen2": (tokenizer_files.qwen2, "qwen2", "<|im_start|>user\n{}<|im_end|>\n<tool_call> {{}}</tool_call>"),
    "gpt2": (tokenizer_files.gpt2, "gpt-2", "{}<|endoftext|> a"),
    "smollm": (tokenizer_files.smollm, "smollm", "<|im_start|>{}<|endoftext|>"),
    "llama2": (tokenizer_files.llama2, "default", "<|im_start|>user {}</s> [TOOL]x[TOOL] <s>y"),
    "metaspace": (tokenizer_files.metaspace, "default", "{}</s>a <s> b"),
    "gemma": (tokenizer_files.gemma, "default", "<start_of_turn>user\n{}<end_of_turn>\n<table>"),
    "phi3": (tokenizer_files.phi3, "default", "<|user|>\n {}<|end|> \n<|assistant|>  x</s>  y<|endoftext|>\n z<s> w"),
}
"""The tokenizer, llama.cpp's name of its pre-tokenizer, and how special tokens stand around a text."""
TEXTS = ("", " ", "a", " a  b", "\n", "\n\n\n\n", f"x{' ' * 20}y    ", *TEXT.splitlines(True), TEXT)


def rows_of(tokenizer: Mapping[str, Any]) -> int:
    return 3 + max(*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"]))


def metadata(tokenizer: Mapping[str, Any], settings: Mapping[str, Any] | None = None, **others: bytes) -> TokenizerMetadata:
    files = {"tokenizer.json": json.dumps(tokenizer).encode(), "tokenizer_config.json": json.dumps(settings or {}).encode(), **others}
    return tokenizer_metadata(files, rows_of(tokenizer), {"bos_token_id": 1, "eos_token_id": 2})


def vocabulary_file(made: TokenizerMetadata, path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("x (Phi-3)" if made.strips else "x")
    writer.kv_data[0] |= made.values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def built() -> dict[str, dict[str, Any]]:
    return {name: build() for name, (build, _, _) in KINDS.items()}


def test_llama_cpp_makes_the_same_tokens(built: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    asked, expected = [], []
    for name, tokenizer in built.items():
        made = metadata(tokenizer)
        assert made.values["tokenizer.ggml.pre"].value == KINDS[name][1]
        texts = [*TEXTS, *(KINDS[name][2].format(text) for text in TEXTS)]
        if made.warnings:  # of texts that are not composed
            texts = [unicodedata.normalize("NFC", text) for text in texts]
        asked.append(Request(vocabulary_file(made, tmp_path / f"{name}.gguf"), texts=texts))
        library = Tokenizer.from_str(json.dumps(tokenizer))
        expected.append([library.encode(text).ids for text in texts])
    answers = llama_cpp(asked, tmp_path)
    for name, request, wanted, (_, ids) in zip(built, asked, expected, answers, strict=True):
        for text, theirs, ours in zip(request.texts, wanted, ids, strict=True):
            assert ours == theirs, (name, text)


def test_a_sentencepiece_file_alone_will_do(tmp_path: Path) -> None:
    tokenizer = tokenizer_files.sentencepiece(["<unk>", "<s>", "</s>"])
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True}
    files = {"tokenizer.model": tokenizer_files.piece_file(tokenizer), "tokenizer_config.json": json.dumps(settings).encode()}
    made = tokenizer_metadata(files, rows_of(tokenizer), {})
    path = vocabulary_file(made, tmp_path / "model.gguf")
    library = Tokenizer.from_str(json.dumps(tokenizer))
    ((_, ids),) = llama_cpp([Request(path, texts=TEXTS)], tmp_path)
    assert ids == [library.encode(text).ids for text in TEXTS]
    assert made.values["tokenizer.ggml.eos_token_id"].value == library.token_to_id("</s>")


def test_special_tokens_and_the_chat_template_come_along(built: dict[str, dict[str, Any]]) -> None:
    tokenizer = built["qwen2"]
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    settings = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}, "bos_token": None, "add_bos_token": False}
    ends = {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"], ids["<tool_call>"]]}
    made = metadata(tokenizer, settings, **{"generation_config.json": json.dumps(ends).encode(), "chat_template.jinja": b"{{ messages }}"})
    values = {key.removeprefix("tokenizer."): value.value for key, value in made.values.items()}
    assert values["ggml.eos_token_id"] == ids["<|im_end|>"]
    assert values["ggml.eot_token_id"] == ids["<tool_call>"]
    assert values["ggml.padding_token_id"] == ids["<|endoftext|>"]
    assert (values["ggml.add_bos_token"], values["ggml.add_eos_token"]) == (False, False)
    assert values["chat_template"] == "{{ messages }}"
    assert values["ggml.tokens"][-1] == f"[PAD{rows_of(tokenizer) - 1}]"
    both = metadata(tokenizer, {**settings, "bos_token": "<|im_start|>", "add_bos_token": True, "add_eos_token": True})
    assert [both.values[f"tokenizer.ggml.add_{end}_token"].value for end in ("bos", "eos")] == [True, True]
    assert both.values["tokenizer.ggml.bos_token_id"].value == ids["<|im_start|>"]


def test_a_token_that_llama_cpp_takes_for_a_special_one_is_told_of(built: dict[str, dict[str, Any]]) -> None:
    tokenizer = copy.deepcopy(built["qwen2"])
    tokenizer["model"]["vocab"]["</s>"] = rows_of(tokenizer)
    assert "'</s>'" in metadata(tokenizer).warnings[-1]
    assert "'</s>'" not in "".join(metadata(built["qwen2"]).warnings)


def model(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tokenizer: tokenizer["model"].update(changes)


def set_to(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tokenizer: tokenizer.update({key: value})


def added(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tokenizer: tokenizer["added_tokens"][-1].update(changes)


def without_a_merge(tokenizer: dict[str, Any]) -> None:
    del tokenizer["model"]["merges"][40]


def merged_later(tokenizer: dict[str, Any]) -> None:
    merges = tokenizer["model"]["merges"]
    twice = next(n for n in range(len(merges) - 1) if "".join(merges[n]) == "".join(merges[n + 1]))
    merges.append(merges.pop(twice))


def without_a_space(tokenizer: dict[str, Any]) -> None:
    """A run of four is no token by itself."""
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "▁" * 4]


def without_a_byte(tokenizer: dict[str, Any]) -> None:
    del tokenizer["model"]["vocab"]["<0x7F>"]


def rule(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tokenizer: tokenizer["pre_tokenizer"]["pretokenizers"][0].update(changes)


def metaspace(scheme: str) -> Callable[[dict[str, Any]], None]:
    words = {"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme}
    return lambda tokenizer: tokenizer.update(normalizer=None, pre_tokenizer=words)


TEKKEN = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|\p{N}|\s+"
REFUSED: dict[str, tuple[str, Callable[[dict[str, Any]], None], str]] = {
    "unigram": ("llama2", model(type="Unigram"), "model.type Unigram"),
    "dropout": ("gpt2", model(dropout=0.1), "model.dropout 0.1"),
    "another expression": ("qwen2", rule(pattern={"Regex": "x+"}), "pre_tokenizer has Split by 'x+'"),
    "tekken": ("llama3", rule(pattern={"Regex": TEKKEN}), "cut words at accents and vowel signs"),
    "digits": (
        "smollm",
        lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(individual_digits=False),
        "Digits with individual_digits False",
    ),
    "a space in front": ("gpt2", lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "ByteLevel {'add_prefix_space': True"),
    "no pre-tokenizer": ("gpt2", set_to("pre_tokenizer", None), "pre_tokenizer has no rule at all"),
    "whole words first": ("qwen2", model(ignore_merges=True), "model.ignore_merges True"),
    "lower case": ("gpt2", set_to("normalizer", {"type": "Lowercase"}), "normalizer Lowercase"),
    "stripping to the left": ("gpt2", added(lstrip=True), "'<|endoftext|>' has lstrip"),
    "words alone": ("llama2", added(single_word=True), "'[TOOL]' has single_word"),
    "stripping to the right": ("llama2", added(rstrip=True), "'[TOOL]' has rstrip"),
    "normalised": ("llama2", added(normalized=True), "'[TOOL]' is looked for in the normalised text"),
    "one merge less": ("llama2", without_a_merge, "are not merged into"),
    "merges apart": ("llama2", merged_later, "stand apart"),
    "spaces apart": ("gemma", without_a_space, "stand apart"),
    "no byte": ("gemma", without_a_byte, "without the token <0x7F>"),
    "first": ("llama2", metaspace("first"), "behind every special token too"),
    "always": ("llama2", metaspace("always"), "does not begin with one"),
    "NFKC": ("llama2", set_to("normalizer", {"type": "NFKC"}), "NFKC before merges"),
    "two behind": (
        "llama3",
        lambda t: t["post_processor"]["processors"][1]["single"].extend([{"SpecialToken": {"id": "a", "type_id": 0}}] * 2),
        "one token at most at either end",
    ),
    "roberta": ("gpt2", set_to("post_processor", {"type": "RobertaProcessing"}), "post_processor RobertaProcessing"),
    "the same twice": ("gpt2", added(content="a"), "two tokens are 'a'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_do_otherwise_is_refused(built: dict[str, dict[str, Any]], case: str) -> None:
    name, change, message = REFUSED[case]
    tokenizer = copy.deepcopy(built[name])
    change(tokenizer)
    with pytest.raises(UserError) as refused:
        metadata(tokenizer)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_files_that_do_not_fit_are_refused(built: dict[str, dict[str, Any]]) -> None:
    tokenizer = json.dumps(built["gpt2"]).encode()
    with pytest.raises(UserError, match="the embeddings have 300 rows"):
        tokenizer_metadata({"tokenizer.json": tokenizer}, 300, {})
    with pytest.raises(UserError, match=r"no tokenizer.json and no tokenizer.model"):
        tokenizer_metadata({"tokenizer_config.json": b"{}"}, 300, {})
    with pytest.raises(CorruptSource, match=r"tokenizer.model: not a SentencePiece model"):
        tokenizer_metadata({"tokenizer.model": b"\x0a\xff"}, 300, {})
    with pytest.raises(CorruptSource, match="not as a tokenizer is written"):
        tokenizer_metadata({"tokenizer.json": b'{"model": {"type": "BPE", "vocab": []}}'}, 300, {})
    pieces = tokenizer_files.piece_file(built["llama2"])
    with pytest.raises(UserError, match="not a model of BPE"):
        tokenizer_metadata({"tokenizer.model": pieces.replace(b"\x12\x02\x18\x02", b"\x12\x02\x18\x01")}, 2000, {})
    with pytest.raises(UserError, match="drops spaces"):
        tokenizer_metadata({"tokenizer.model": pieces.replace(b"\x1a\x02\x20\x00", b"\x1a\x02\x20\x01")}, 2000, {})
