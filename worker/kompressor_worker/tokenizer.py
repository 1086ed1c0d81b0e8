"""The tokenizer that lies beside a checkpoint: text and chats to token ids, as transformers does it. Code of a checkpoint is never run."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from kompressor_api.names import Reason
from kompressor_worker.architectures import text_config
from kompressor_worker.errors import CorruptSource, UserError
from kompressor_worker.headers import load_json
from kompressor_worker.storage import Source

__all__ = ["ModelTokenizer"]

FILES = re.compile(
    r"config\.json|tokenizer.*\.json|.*\.(model|tiktoken)|(vocab|merges)\.(json|txt)|tekken\.json|added_tokens\.json"
    r"|special_tokens_map\.json|chat_template\.(jinja|json)|additional_chat_templates/[^/]*\.jinja"
)
"""What a tokenizer is made of; nothing else is fetched."""
VOCABULARIES = re.compile(r"tokenizer\.json|.*\.(model|tiktoken)|vocab\.(json|txt)|tekken\.json")
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/default.jinja")
LARGEST_FILE = 256 << 20
"""Bytes; the largest vocabularies take some 40 MB."""
HALF = re.compile(r"[\ud800-\udfff]")
"""JSON can write one half of a surrogate pair, as texts have that were cut in UTF-16: no character, and no tokenizer takes it."""
CUT = 64
"""Characters a token: text is tokenised up to so many a token wanted, if that turns out to be twice what is needed."""


class ModelTokenizer:
    """Tokenizer of the checkpoint at `source`. Nothing is read before it is needed, transformers included."""

    def __init__(self, source: Source) -> None:
        self.uri = source.uri
        self._source = source

    def check(self, chat: bool) -> None:
        """By the files' names and tokenizer_config.json alone, without transformers. Raises UserError (no tokenizer, no template)."""
        if not any(VOCABULARIES.fullmatch(name) for name in self._files):
            raise UserError(
                f"{self.uri}: no tokenizer among its files (tokenizer.json, tokenizer.model, vocab.json); upload it beside config.json, or "
                "give token ids and name their column in dataset.tokens",
                Reason.UNSUPPORTED_MODEL,
            )
        if chat and not any(name in self._files for name in TEMPLATES):
            name = "tokenizer_config.json"
            if name not in self._files or not load_json(name, self._source.read(name), duplicates=True).get("chat_template"):
                raise self._no_template()

    @cached_property
    def vocabulary(self) -> int:
        """Rows of the embeddings: ids are below it. Raises CorruptSource."""
        size = text_config(self._config).get("vocab_size")
        if not isinstance(size, int) or size < 1:
            raise CorruptSource(f"{self.uri}: config.json: vocab_size {size!r} is no number of tokens; upload config.json again")
        return size

    @cached_property
    def eos(self) -> int | None:
        """End of a sequence, from config.json, else from the tokenizer; the first one if there are several."""
        found = text_config(self._config).get("eos_token_id", self._config.get("eos_token_id"))
        found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, int):
            return found
        if not any(VOCABULARIES.fullmatch(name) for name in self._files):
            return None
        return self._tokenizer.eos_token_id  # type: ignore[no-any-return]

    @cached_property
    def bos_rule(self) -> str:
        """How documents of text begin, in words for the report."""
        begin = self._tokenizer.bos_token_id
        if begin is not None and self._encode("a", True)[:1] == [begin]:
            return f"each document begins with {self._tokenizer.bos_token} ({begin}), which the tokenizer adds"
        return "none: the tokenizer adds none"

    def text(self, place: str, text: str, limit: int | None) -> list[int]:
        """Ids with the special tokens that the tokenizer adds to a text by itself; at least the first `limit` of them. Raises UserError."""
        return self._begin(place, text, limit, special=True)

    def chat(self, place: str, messages: Any, limit: int | None) -> list[int]:
        """Ids of a list of {role, content} as the chat template writes it out. Raises UserError: no template, or it refuses."""
        if not self._tokenizer.chat_template:
            raise self._no_template()
        from jinja2 import TemplateError

        checked = messages_of(place, messages)
        try:
            written: Any = self._tokenizer.apply_chat_template(checked, tokenize=False)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise UserError(
                f"{place}: the chat template of {self.uri} refuses it ({error}); correct the messages", Reason.BAD_DATA
            ) from error
        return self._begin(place, written, limit, special=False)

    def _begin(self, place: str, text: str, limit: int | None, special: bool) -> list[int]:
        """A book is not tokenised for its first page: what is cut off far behind the limit does not change what stands before it."""
        if half := HALF.search(text):
            raise UserError(
                f"{place}: has \\u{ord(half[0]):04x}, half of a surrogate pair, which is no character, behind {half.start():,} others; "
                "write the whole character, or leave the document out",
                Reason.BAD_DATA,
            )
        if limit is not None and len(text) > CUT * limit:
            ids = self._encode(text[: CUT * limit], special)
            if len(ids) >= 2 * limit:
                return ids
        return self._encode(text, special)

    def _encode(self, text: str, special: bool) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        return load_json("config.json", self._source.read("config.json"), duplicates=True)

    @cached_property
    def _files(self) -> Sequence[str]:
        return [name for name, info in self._source.list().items() if FILES.fullmatch(name) and info.size <= LARGEST_FILE]

    @cached_property
    def _tokenizer(self) -> Any:
        self.check(chat=False)
        from transformers import AutoTokenizer

        with tempfile.TemporaryDirectory(prefix="kompressor-tokenizer-") as folder:
            for name in self._files:
                path = Path(folder) / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(self._source.read(name))
            try:
                _forget_code(Path(folder) / "config.json")
                return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            except Exception as error:  # whatever a broken or exotic tokenizer makes transformers and its relatives raise
                raise UserError(
                    f"{self.uri}: its tokenizer cannot be loaded ({type(error).__name__}: {_first_line(error)}); its own code is not run: "
                    "save it as tokenizer.json (save_pretrained), or give token ids and name their column in dataset.tokens",
                    Reason.UNSUPPORTED_MODEL,
                ) from error

    def _no_template(self) -> UserError:
        return UserError(
            f"{self.uri}: no chat template among its files (chat_template.jinja, or chat_template in tokenizer_config.json); add one, or "
            "give text and name its column in dataset.field",
            Reason.UNSUPPORTED_MODEL,
        )


def messages_of(place: str, messages: Any) -> list[dict[str, Any]]:
    """`messages`, if they are a chat. Raises UserError."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError(
            f"{place}: a chat is a list of {{role, content}}, not {type(messages).__name__}; correct dataset.messages", Reason.BAD_DATA
        )
    for message in messages:
        if not isinstance(message.get("role"), str):
            raise UserError(
                f"{place}: a message has the keys {', '.join(message) or 'none'}; role and content are expected, rename them",
                Reason.BAD_DATA,
            )
    return messages


def _forget_code(config: Path) -> None:
    """transformers would ask for the model's own code, though the tokenizer needs none of it."""
    loaded = json.loads(config.read_text())
    if loaded.pop("auto_map", None) is not None:
        config.write_text(json.dumps(loaded))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:300]
