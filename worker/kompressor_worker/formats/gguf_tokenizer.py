"""A tokenizer's files as GGUF's metadata, from which llama.cpp makes the same tokens of a text; refused where it would not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kompressor_worker.errors import CorruptSource
from kompressor_worker.formats.gguf_architectures import unsupported
from kompressor_worker.formats.gguf_vocabulary import Vocabulary, of_json, of_sentencepiece, text_of
from kompressor_worker.headers import load_json

__all__ = ["FILES", "TokenizerMetadata", "tokenizer_metadata"]

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What is read here, where it is there."""
ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "</s>", "<eos>")
"""Texts of tokens that llama.cpp takes for ends of an answer by themselves."""


@dataclass(frozen=True)
class TokenizerMetadata:
    values: Mapping[str, Any]
    """The library's GGUFValue by key."""
    strips: bool = False
    """Whether the model's name must say Phi-3, by which llama.cpp knows that special tokens take the whitespace behind them."""
    warnings: tuple[str, ...] = ()


def tokenizer_metadata(files: Mapping[str, bytes], rows: int, config: Mapping[str, Any]) -> TokenizerMetadata:
    """`files`: those of FILES that the source has, by name. `rows`: of the embeddings. `config`: the decoder's part of config.json. Raises
    UserError for a tokenizer that llama.cpp does not have, CorruptSource."""
    said = {name: load_json(name, files[name], duplicates=True) for name in files if name.endswith(".json")}
    name = next((name for name in ("tokenizer.json", "tokenizer.model") if name in files), None)
    if name is None:
        raise unsupported("no tokenizer.json and no tokenizer.model among its files, and a GGUF file has its tokenizer inside; upload one")
    settings = {**said.get("special_tokens_map.json", {}), **said.get("tokenizer_config.json", {})}
    try:
        if name in said:
            vocabulary = of_json(said[name], rows, settings)
        else:
            vocabulary = of_sentencepiece(files[name], rows, said.get("added_tokens.json", {}), settings)
        values = _values(vocabulary, settings, config, said.get("generation_config.json", {}), _template(files, said))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CorruptSource(
            f"{name}, tokenizer_config.json: not as a tokenizer is written ({type(error).__name__}: {error}); upload the files again"
        ) from error
    return TokenizerMetadata(values, vocabulary.strips, tuple(vocabulary.warnings))


def _values(
    v: Vocabulary, settings: Mapping[str, Any], config: Mapping[str, Any], generation: Mapping[str, Any], template: Any
) -> dict[str, Any]:
    import gguf

    writer = gguf.GGUFWriter(None, "")
    writer.kv_data = [{}]
    writer.add_tokenizer_model(v.model)
    writer.add_tokenizer_pre(v.pre)
    writer.add_token_list(v.tokens)
    writer.add_token_types(v.types)
    if v.scores is not None:
        writer.add_token_scores(v.scores)
    if v.merges is not None:
        writer.add_token_merges(v.merges)
    if v.space_prefix is not None:
        writer.add_add_space_prefix(v.space_prefix)
    ids = {text: number for number, text in enumerate(v.tokens)}
    for name, added in zip(("bos", "eos"), v.adds, strict=True):
        token = added or text_of(settings.get(f"{name}_token"))
        number = ids.get(token) if token is not None else _first(config.get(f"{name}_token_id"))
        if added is not None and number is None:
            raise unsupported(f"tokenizer: {added!r}, which is put around a text, is no token of the vocabulary")
        if number is not None and number < len(v.tokens):
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
        getattr(writer, f"add_add_{name}_token")(added is not None)
    for name, key in (("unk", "unknown"), ("pad", "padding")):
        if (number := ids.get(text_of(settings.get(f"{name}_token")) or "")) is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", number)
    _add_ends(writer, v, ids, [generation.get("eos_token_id"), config.get("eos_token_id")])
    if template:
        writer.add_chat_template(template)
    return dict(writer.kv_data[0])


def _add_ends(writer: Any, v: Vocabulary, ids: Mapping[str, int], said: Sequence[Any]) -> None:
    """Other ends of an answer than eos, of which GGUF has two more places."""
    ends = [number for found in said for number in (found if isinstance(found, list) else [found]) if isinstance(number, int)]
    eos = writer.kv_data[0].get("tokenizer.ggml.eos_token_id")
    known = {eos and eos.value, *(ids.get(text) for text in ENDS)}
    others = [number for number in dict.fromkeys(ends) if number not in known and number < len(v.tokens)]
    for name, number in zip(("eot", "eom"), others, strict=False):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    if len(others) > 2:
        v.warnings.append(f"tokens {others[2:]} end an answer too, and GGUF has no place for so many; llama.cpp goes on after them")


def _template(files: Mapping[str, bytes], said: Mapping[str, Mapping[str, Any]]) -> Any:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    return said.get("chat_template.json", {}).get("chat_template") or said.get("tokenizer_config.json", {}).get("chat_template")


def _first(number: Any) -> int | None:
    found = number[0] if isinstance(number, list) and number else number
    return found if type(found) is int else None
