"""Data and tokenizers of which no rows can be made: what is said, and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from calibration_data import STORIES, calibration, copy_of, ids_of, jsonl, model_tokenizer, rows_of

from kompressor_api.datasets import DriftSpec, EvaluationSpec
from kompressor_api.names import Reason
from kompressor_worker.errors import CorruptSource, UserError
from kompressor_worker.tokenizer import ModelTokenizer


@pytest.mark.parametrize(
    ("lines", "dataset", "said"),
    [
        (['{"text": "a b"}', "", '{"txt": "c d", "id": 1}'], {}, "a.jsonl: line 3: no column 'text', but 'txt', 'id'; did you mean txt?"),
        (['{"a": "b c"}'], {"messages": "chat"}, "no column 'chat', but 'a'; set dataset.messages"),
        (['{"text": "a b"'], {}, "a.jsonl: line 1: is not JSON"),
        (["[1, 2]"], {}, "a.jsonl: line 1: a JSON object is expected, not list"),
        (['{"text": 3}'], {}, "a.jsonl: line 1: 'text' is of type int, and not text"),
        (['{"text": [4, 5]}'], {}, "'text' is a list of token ids, and not text; name it in dataset.tokens"),
        (['{"text": [{"role": "user", "content": "x"}]}'], {}, "'text' is a chat, and not text; name it in dataset.messages"),
        (['{"text": "words"}'], {"tokens": "text"}, "'text' is text, and not a list of token ids; name it in dataset.field"),
        (['{"ids": [4, 5, 512]}'], {"tokens": "ids"}, "a.jsonl: line 1: ids[2] is 512, and file://"),
        (['{"ids": [4, -1]}'], {"tokens": "ids"}, "ids[1] is -1"),
        (['{"ids": [4, true]}'], {"tokens": "ids"}, "not a list of token ids"),
        (["\xff"], {}, "a.jsonl: line 1: is not JSON"),
        (
            ['{"text": ""}', '{"text": null}', '{"text": " "}'],
            {},
            "3 documents, 3 of them empty or of fewer than 2 tokens in 'text' (first: a",
        ),
        (["", " "], {}, "0 of the 3 rows that calibration.samples asks for: 0 documents; give more data"),
        (['{"text": "some words"}', '{"text": "others"}'], {}, "2 of the 3 rows that calibration.samples asks for: 2 documents; set calib"),
    ],
)
def test_data_that_is_refused(tmp_path: Path, tokenizer: ModelTokenizer, lines: list[str], dataset: dict[str, Any], said: str) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        rows_of(calibration(tmp_path / "a.jsonl", dataset=dataset, samples=3), tokenizer)
    assert said in str(caught.value) and caught.value.reason == Reason.BAD_DATA


def test_too_little_data_says_what_to_do(tmp_path: Path, tokenizer: ModelTokenizer) -> None:
    data = jsonl(tmp_path / "a.jsonl", [{"ids": [4] * 9}, {"ids": [5]}])
    of = {"dataset": {"tokens": "ids"}, "samples": 4, "sequenceLength": 3}
    with pytest.raises(UserError, match=r"1 of the 4 rows that drift.samples .*set drift.samples to 1 at most, or set packing"):
        rows_of(calibration(data, kind=DriftSpec, **of), tokenizer)
    with pytest.raises(
        UserError, match=r"3 of the 4 rows .*packed into rows of 3 tokens; set evaluation.samples to 3 at most, or set a sm"
    ):
        rows_of(calibration(data, kind=EvaluationSpec, packing=True, **of), tokenizer)


def test_text_that_is_not_utf8(tmp_path: Path, tokenizer: ModelTokenizer) -> None:
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt: line 1: is not UTF-8"):
        rows_of(calibration(tmp_path / "a.txt", samples=1), tokenizer)


def test_a_tokenizer_of_another_version(tmp_path: Path, trained_llama: Path) -> None:
    model = copy_of(trained_llama, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 50}))
    data = jsonl(tmp_path / "a.jsonl", [{"text": STORIES[0]}])
    with pytest.raises(CorruptSource, match=r"its tokenizer makes id \d+, and config.json says vocab_size 50"):
        rows_of(calibration(data, samples=1), model_tokenizer(model))


def test_tokenizers_that_cannot_be_had(tmp_path: Path, trained_llama: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", [{"text": STORIES[0], "ids": [4, 5]}])
    model = copy_of(trained_llama, tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="its tokenizer cannot be loaded"):
        rows_of(calibration(data, samples=1), model_tokenizer(model))
    (model / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer among its files .*give token ids and name their column in dataset.tokens") as caught:
        rows_of(calibration(data, samples=1), model_tokenizer(model))
    assert caught.value.reason == Reason.UNSUPPORTED_MODEL
    assert ids_of(rows_of(calibration(data, dataset={"tokens": "ids"}, samples=1), model_tokenizer(model))) == [[4, 5]]


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path, trained_llama: Path) -> None:
    model = copy_of(trained_llama, tmp_path / "model")
    ran = tmp_path / "ran"
    (model / "evil.py").write_text(f"import pathlib; pathlib.Path({str(ran)!r}).touch()\nclass Evil: ...\n")
    for name in ("config.json", "tokenizer_config.json"):
        loaded = json.loads((model / name).read_text())
        (model / name).write_text(
            json.dumps(loaded | {"auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}})
        )
    data = jsonl(tmp_path / "a.jsonl", [{"text": STORIES[0]}])
    try:
        rows_of(calibration(data, samples=1), model_tokenizer(model))
    except UserError as error:
        assert "its own code is not run" in str(error)
    assert not ran.exists()


def test_packing_needs_an_end(tmp_path: Path, trained_llama: Path) -> None:
    model = copy_of(trained_llama, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    (model / "tokenizer.json").unlink()
    data = jsonl(tmp_path / "a.jsonl", [{"ids": [4, 5]}])
    with pytest.raises(
        UserError, match=r"neither config.json \(eos_token_id\) nor the tokenizer has one; add it, or set calibration.packing"
    ):
        rows_of(calibration(data, dataset={"tokens": "ids"}, samples=1, packing=True), model_tokenizer(model))
