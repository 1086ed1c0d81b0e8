"""Chats become rows by the checkpoint's template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest
from calibration_data import TEMPLATE, calibration, copy_of, ids_of, jsonl, model_tokenizer, rows_of
from tokenizers import Tokenizer

from kompressor_api.names import Reason
from kompressor_worker.calibration import Rows
from kompressor_worker.errors import UserError
from kompressor_worker.tokenizer import ModelTokenizer

CHAT = [{"role": "user", "content": "Who mended the old kettle?"}, {"role": "assistant", "content": "Ada the baker."}]


def test_chats_are_written_by_the_template(tmp_path: Path, trained_llama: Path, encoding: Tokenizer) -> None:
    model = copy_of(trained_llama, tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    written = "[user] Who mended the old kettle?\n[assistant] Ada the baker."
    expected = [[1, *encoding.encode(written, add_special_tokens=False).ids, 2]]
    jsonl(tmp_path / "a.jsonl", [{"chat": CHAT}])
    parquet.write_table(pyarrow.table({"chat": [[{**m, "tool_calls": None} for m in CHAT]]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        rows = rows_of(calibration(tmp_path / name, dataset={"messages": "chat"}, samples=1), model_tokenizer(model))
        assert ids_of(rows) == expected
        assert rows.bos == "as the chat template writes it"


def test_a_missing_template_is_named_with_the_remedy(tmp_path: Path, trained_llama: Path, tokenizer: ModelTokenizer) -> None:
    data = jsonl(tmp_path / "a.jsonl", [{"chat": CHAT}])
    for attempt in (
        lambda: tokenizer.check(chat=True),
        lambda: rows_of(calibration(data, dataset={"messages": "chat"}, samples=1), tokenizer),
    ):
        with pytest.raises(UserError, match=r"no chat template among its files \(chat_template.jinja.*add one, or give text") as caught:
            attempt()
        assert str(trained_llama) in str(caught.value)


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        ("hello", "a chat is a list of {role, content}, not str"),
        ([{"from": "human", "value": "hi"}], "a message has the keys from, value; role and content are expected"),
        ([{"role": "user", "content": "never"}], r"the chat template of file://.* refuses it (not never); correct the messages"),
        ([{"role": "user", "content": "what the template leaves out"}], "1 documents, 1 of them empty"),
    ],
)
def test_chats_that_are_none(tmp_path: Path, trained_llama: Path, chat: Any, said: str) -> None:
    model = copy_of(trained_llama, tmp_path / "model")
    refusing = "{% if messages[0].content == 'never' %}{{ raise_exception('not never') }}{% endif %}"
    (model / "chat_template.jinja").write_text(refusing)
    data = jsonl(tmp_path / "a.jsonl", [{"chat": chat}])
    with pytest.raises(UserError) as caught:
        rows_of(calibration(data, dataset={"messages": "chat"}, samples=1), model_tokenizer(model))
    assert said.replace("file://.*", f"file://{model}") in str(caught.value) and "a.jsonl: line 1" in str(caught.value)


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_half_a_surrogate_pair(kind: str, tmp_path: Path, trained_llama: Path) -> None:
    """JSON has a way to write it, no tokenizer takes it; a whole pair is one character."""
    model = copy_of(trained_llama, tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)

    def read(text: str) -> Rows:
        value = text if kind == "text" else [{"role": "user", "content": text}]
        dataset = {} if kind == "text" else {"messages": "messages"}
        data = jsonl(tmp_path / "a.jsonl", [{kind: value}])
        return rows_of(calibration(data, samples=1, dataset=dataset), model_tokenizer(model))

    assert read("a good day \U0001f642").tokens
    with pytest.raises(UserError, match=r"a\.jsonl: line 1: has \\ud83d, half of a surrogate pair.*leave the document out") as caught:
        read("a good day \ud83d")
    assert caught.value.reason is Reason.BAD_DATA
