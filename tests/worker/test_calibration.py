"""Rows drawn from real files by a real tokenizer, beside what the tokenizers library makes of the same documents; and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest
from hub_server import HubServer, Repository
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from corpus import Corpus
from jobs import Bucket
from kompressor_api.datasets import CalibrationSpec, DriftSpec, EvaluationSpec, Sample
from kompressor_api.names import Reason
from kompressor_api.v1alpha1 import SourceLocation
from kompressor_worker.calibration import Rows, check_dataset, content_of, rank, read_rows
from kompressor_worker.commands import refuse_file_uris
from kompressor_worker.errors import CorruptSource, KompressorError, NotFound, Terminated, UserError
from kompressor_worker.job import Job, validate_spec
from kompressor_worker.records import Document
from kompressor_worker.storage.locations import open_data, open_source
from kompressor_worker.tokenizer import CUT, ModelTokenizer

STORIES = Corpus().text(seed=7, characters=30_000).splitlines()
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ '?' if m.tool_calls is defined else '' }}"
    "{{ '' if loop.last else '\\n' }}{% endfor %}{{ eos_token }}"
)


@pytest.fixture(scope="module")
def encoding(trained_llama: Path) -> Tokenizer:
    """The tokenizers library itself."""
    return Tokenizer.from_file(str(trained_llama / "tokenizer.json"))


@pytest.fixture(scope="module")
def tokenizer(trained_llama: Path) -> ModelTokenizer:
    return model_tokenizer(trained_llama)


def model_tokenizer(folder: Path) -> ModelTokenizer:
    return ModelTokenizer(open_source(SourceLocation(uri=f"file://{folder}"), {}))


def copy_of(model: Path, folder: Path) -> Path:
    """The model's small files, to be broken."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def calibration(uri: Path | str, *, kind: type[Sample] = CalibrationSpec, dataset: dict[str, Any] | None = None, **options: Any) -> Sample:
    where = f"file://{uri}" if isinstance(uri, Path) else uri
    return kind.model_validate({"dataset": {"uri": where, **(dataset or {})}, **options})


def rows_of(sample: Sample, tokenizer: ModelTokenizer, **options: Any) -> Rows:
    return read_rows(open_data(sample, {}), sample, tokenizer, **options)


def ids_of(rows: Rows) -> list[list[int]]:
    return [row.tolist() for row in rows.tokens]


def jsonl(path: Path, records: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# -- which rows


def test_rows_are_the_beginnings_of_the_documents_of_smallest_rank(tmp_path: Path, tokenizer: ModelTokenizer, encoding: Tokenizer) -> None:
    data = jsonl(tmp_path / "a.jsonl", [{"id": n, "text": story} for n, story in enumerate(STORIES)])
    rows = rows_of(calibration(data, samples=16, sequenceLength=40, seed=3), tokenizer)
    drawn = sorted(range(len(STORIES)), key=lambda n: rank(n, 3))[:16]
    assert ids_of(rows) == [encoding.encode(STORIES[n]).ids[:40] for n in drawn]
    assert rows.documents == len(STORIES) and rows.skipped == 0
    assert rows.bos == "each document begins with <s> (1), which the tokenizer adds"


def test_another_seed_draws_others_and_more_samples_begin_with_fewer(tmp_path: Path, tokenizer: ModelTokenizer) -> None:
    data = jsonl(tmp_path / "a.jsonl", [{"text": story} for story in STORIES])
    few, many, other = (
        ids_of(rows_of(calibration(data, samples=n, sequenceLength=20, seed=s), tokenizer)) for n, s in ((5, 0), (30, 0), (30, 1))
    )
    assert many[:5] == few and many != other


def test_the_digest_is_of_lengths_and_ids(tmp_path: Path, tokenizer: ModelTokenizer) -> None:
    data = jsonl(tmp_path / "a.jsonl", [{"ids": [5, 6, 7]}, {"ids": [8, 9]}])
    rows = rows_of(calibration(data, dataset={"tokens": "ids"}, samples=2, sequenceLength=8), tokenizer)
    words = b"".join(n.to_bytes(8, "little") for row in ids_of(rows) for n in (len(row), *row))
    assert rows.digest == f"sha256:{hashlib.sha256(words).hexdigest()}"
    assert sorted(ids_of(rows)) == [[5, 6, 7], [8, 9]] and rows.bos == "as the token ids were given"
    padded, lengths = rows.padded(fill=0)
    assert [row[:n].tolist() for row, n in zip(padded, lengths, strict=True)] == ids_of(rows) and padded.shape == (2, 3)


def test_text_jsonl_and_parquet_of_one_dataset_give_the_same_rows(tmp_path: Path, tokenizer: ModelTokenizer) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\n \n" + "\r\n\r\n\n".join(STORIES).encode())
    jsonl(tmp_path / "lines.json", [{"text": story} for story in STORIES])
    table = pyarrow.table({"other": list(range(len(STORIES))), "story": STORIES})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    of = {
        "a.txt": {},
        "lines.json": {"format": "jsonl"},
        "a.parquet": {"field": "story"},
    }
    rows = [rows_of(calibration(tmp_path / name, dataset=d, samples=9, sequenceLength=33), tokenizer) for name, d in of.items()]
    assert len({r.digest for r in rows}) == 1 and {r.documents for r in rows} == {len(STORIES)}


def test_parts_in_a_folder_are_one_dataset_in_the_order_of_their_names(tmp_path: Path, tokenizer: ModelTokenizer) -> None:
    one = jsonl(tmp_path / "one.jsonl", [{"text": story} for story in STORIES])
    for number, at in enumerate(range(0, len(STORIES), 30)):
        jsonl(tmp_path / "parts" / f"part-{number:02}.jsonl", [{"text": story} for story in STORIES[at : at + 30]])
    (tmp_path / "parts" / "LICENSE.txt").write_text("words that are no data")
    jsonl(tmp_path / "parts" / "_temporary" / "part-00.jsonl", [{"text": "a writer's half file"}])
    whole, parts = (rows_of(calibration(uri, samples=12, sequenceLength=30), tokenizer) for uri in (one, tmp_path / "parts"))
    assert whole.digest == parts.digest


DOCUMENTS = st.lists(st.text(st.sampled_from("ab é\n𝄞"), max_size=40), min_size=1, max_size=12)


@settings(max_examples=40)
@given(documents=DOCUMENTS, chunk=st.integers(1, 64), seed=st.integers(0, 9), format=st.sampled_from(["jsonl", "text", "parquet"]))
def test_rows_do_not_depend_on_chunks(
    documents: list[str], chunk: int, seed: int, format: str, tmp_path_factory: pytest.TempPathFactory, tokenizer: ModelTokenizer
) -> None:
    path = tmp_path_factory.mktemp("data") / f"a.{'txt' if format == 'text' else format}"
    if format == "parquet":
        parquet.write_table(pyarrow.table({"text": documents}), path, row_group_size=3)
    elif format == "jsonl":
        path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents))
    else:
        path.write_text("\n\n".join(documents))
    usable = sum(1 for text in documents if text.strip()) if format != "text" else None
    sample = calibration(path, samples=max(1, min(usable or 1, 4)), sequenceLength=6, seed=seed)
    try:
        whole = rows_of(sample, tokenizer)
    except UserError as error:
        assert not any(text.strip() for text in documents) and error.reason == Reason.BAD_DATA
        return
    pieces = rows_of(sample, tokenizer, chunk=chunk)
    assert (pieces.digest, pieces.documents, pieces.skipped) == (whole.digest, whole.documents, whole.skipped)


@settings(max_examples=40)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=15), row=st.integers(2, 16), seed=st.integers(0, 9), ended=st.booleans())
def test_packing_loses_nothing_but_the_tail(
    lengths: list[int], row: int, seed: int, ended: bool, tmp_path_factory: pytest.TempPathFactory, tokenizer: ModelTokenizer
) -> None:
    """Document n is [n + 3] times its length, so that every token tells where it came from. EOS is not doubled."""
    documents = [[n + 3] * length for n, length in enumerate(lengths)]
    given = [[*ids, 2] if ended else ids for ids in documents]
    data = jsonl(tmp_path_factory.mktemp("data") / "a.jsonl", [{"ids": ids} for ids in given])
    kept = [[*ids, 2] for ids, g in zip(documents, given, strict=True) if len(g) >= 2]
    full = sum(map(len, kept)) // row
    sample = calibration(data, dataset={"tokens": "ids"}, samples=max(1, full), sequenceLength=row, packing=True, seed=seed)
    if not full:
        with pytest.raises(UserError, match="0 of the 1 rows"):
            rows_of(sample, tokenizer)
        return
    rows = rows_of(sample, tokenizer)
    assert {len(ids) for ids in ids_of(rows)} == {row}
    order = sorted((n for n, g in enumerate(given) if len(g) >= 2), key=lambda n: rank(n, seed))
    stream = [token for n in order for token in [*documents[n], 2]]
    assert [token for ids in ids_of(rows) for token in ids] == stream[: full * row]
    assert len(stream) - full * row < row


def test_packed_text_keeps_each_documents_bos(tmp_path: Path, tokenizer: ModelTokenizer, encoding: Tokenizer) -> None:
    data = jsonl(tmp_path / "a.jsonl", [{"text": story} for story in STORIES])
    rows = rows_of(calibration(data, samples=10, sequenceLength=128, packing=True), tokenizer)
    order = sorted(range(len(STORIES)), key=lambda n: rank(n, 0))
    stream = [token for n in order for token in [*encoding.encode(STORIES[n]).ids, 2]]
    assert [token for ids in ids_of(rows) for token in ids] == stream[: 10 * 128]


@pytest.mark.parametrize("characters", [CUT, 1])
def test_a_book_is_not_tokenised_for_its_first_page(
    tmp_path: Path, trained_llama: Path, encoding: Tokenizer, characters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At one character a token the part tried first is too short, and the whole is taken."""
    monkeypatch.setattr("kompressor_worker.tokenizer.CUT", characters)
    book = " ".join(STORIES) * 3
    data = jsonl(tmp_path / "a.jsonl", [{"text": book}])
    tokenizer = Counting(open_source(SourceLocation(uri=f"file://{trained_llama}"), {}))
    rows = rows_of(calibration(data, samples=1, sequenceLength=16), tokenizer)
    assert ids_of(rows) == [encoding.encode(book).ids[:16]]
    assert (tokenizer.characters > len(book)) == (characters == 1)


def test_what_is_held_and_tokenised_grows_with_the_samples_not_with_the_data(tmp_path: Path, trained_llama: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", [{"text": f"number {n}"} for n in range(2000)])
    tokenizer = Counting(open_source(SourceLocation(uri=f"file://{trained_llama}"), {}))
    for options in ({"samples": 4}, {"samples": 4, "packing": True}):
        tokenizer.texts = 0
        assert rows_of(calibration(data, sequenceLength=8, **options), tokenizer).documents == 2000
        assert tokenizer.texts < 80  # 4 (1 + ln 500) = 29 are expected, and a few more where it is tokens that are counted


class Counting(ModelTokenizer):
    texts = 0
    characters = 0

    def _encode(self, text: str, special: bool) -> list[int]:
        self.texts += 1
        self.characters += len(text)
        return super()._encode(text, special)


def test_what_is_not_drawn_is_not_parsed(tmp_path: Path, tokenizer: ModelTokenizer) -> None:
    """A broken line matters if it is drawn: here the last one, of the largest rank of all."""
    seed = next(s for s in range(100) if max(range(4), key=lambda n: rank(n, s)) == 3)
    jsonl(tmp_path / "a.jsonl", [{"text": "a few words"}] * 3)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("no JSON")
    assert len(rows_of(calibration(tmp_path / "a.jsonl", samples=3, seed=seed), tokenizer).tokens) == 3
    with pytest.raises(UserError, match=r"a\.jsonl: line 4: is not JSON"):
        rows_of(calibration(tmp_path / "a.jsonl", samples=4, seed=seed), tokenizer)


# -- chats


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


# -- what is refused


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


def test_told_to_stop(tmp_path: Path, tokenizer: ModelTokenizer) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Terminated):
        rows_of(calibration(jsonl(tmp_path / "a.jsonl", [{"text": "a b"}]), samples=1), tokenizer, stop=stop)


# -- files


@pytest.mark.parametrize(
    ("files", "dataset", "said"),
    [
        ({"a.csv": b"x"}, {}, "a.csv: no known format; the names of JSON lines end in .jsonl or .ndjson"),
        ({"a.jsonl.gz": b"x"}, {}, "unpack what is compressed"),
        ({"a.jsonl": b"{}", "b.parquet": b"x"}, {}, "a.jsonl and b.parquet are both there; say which by dataset.format"),
        ({"a.jsonl": b"{}", "b.txt": b"x"}, {"format": "parquet"}, "no parquet files (.parquet) among a.jsonl, b.txt"),
        ({"a.jsonl": b"", "b.jsonl": b""}, {}, "no data in it"),
        ({"a.parquet": b"not at all Parquet"}, {}, "a.parquet: cannot be read as Parquet"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, files: dict[str, bytes], dataset: dict[str, Any], said: str) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    sample = calibration(tmp_path, dataset=dataset)
    with pytest.raises(UserError) as caught:
        check_dataset(open_data(sample, {}), sample)
    assert said in str(caught.value) and caught.value.reason == Reason.BAD_DATA


def test_data_that_is_not_there(tmp_path: Path) -> None:
    sample = calibration(tmp_path / "none.jsonl", kind=EvaluationSpec)
    with pytest.raises(NotFound, match=r"none\.jsonl; give the file or the folder that holds the data") as caught:
        check_dataset(open_data(sample, {}), sample)
    assert caught.value.reason == Reason.DATA_NOT_FOUND


def test_plan_looks_at_the_first_record_without_torch(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", [{"txt": "a"}])
    program = (
        "import sys; from kompressor_api.datasets import *; from kompressor_worker.calibration import *;"
        "from kompressor_worker.storage.locations import open_data;"
        f"s = CalibrationSpec.model_validate({{'dataset': {{'uri': 'file://{data}', 'field': sys.argv[1]}}}});"
        "print(check_dataset(open_data(s, {}), s).bytes, {'torch', 'transformers'} & set(sys.modules))"
    )
    good, bad = (subprocess.run([sys.executable, "-c", program, name], capture_output=True, text=True) for name in ("txt", "text"))
    assert good.stdout == f"{data.stat().st_size} set()\n"
    assert "did you mean txt?" in bad.stderr


# -- stores


def test_one_object_or_a_prefix_of_a_bucket(bucket: Bucket, tokenizer: ModelTokenizer) -> None:
    client = bucket.server.client()
    text = "".join(json.dumps({"text": story}) + "\n" for story in STORIES).encode()
    for key in ("data/a.jsonl", "data/a.jsonl.old", "set/part.jsonl"):
        client.put_object(Bucket=bucket.name, Key=key, Body=text)
    environ = {"DATA_AWS_ACCESS_KEY_ID": bucket.server.access_key, "DATA_AWS_SECRET_ACCESS_KEY": bucket.server.secret_key}
    digests = set()
    for path in ("data/a.jsonl", "set", "set/part.jsonl"):
        sample = calibration(bucket.uri(path), dataset={"endpoint": bucket.server.endpoint}, samples=8, sequenceLength=30)
        source = open_data(sample, environ)
        assert len(source.list()) == 1
        digests.add(read_rows(source, sample, tokenizer, chunk=1000).digest)
    assert len(digests) == 1
    sample = calibration(bucket.uri("dat"), dataset={"endpoint": bucket.server.endpoint})
    with pytest.raises(NotFound, match="nothing there; give the prefix that holds the data") as caught:
        open_data(sample, environ).list()
    assert caught.value.reason == Reason.DATA_NOT_FOUND


def test_a_dataset_of_a_hub(monkeypatch: pytest.MonkeyPatch, tokenizer: ModelTokenizer) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    text = "".join(json.dumps({"text": story}) + "\n" for story in STORIES).encode()
    with HubServer() as hub:
        hub.repositories["datasets/org/stories"] = Repository({"README.md": b"x", "data/a.jsonl": text, "data/b.jsonl": text})
        environ = {"HF_ENDPOINT": hub.endpoint, "KOMPRESSOR_STORAGE_ATTEMPTS": "1"}
        listed = {}
        for path in ("", "/data", "/data/a.jsonl"):
            sample = calibration(f"hf://datasets/org/stories{path}", samples=8, sequenceLength=30)
            source = open_data(sample, environ)
            listed[path] = [info.name for info in check_dataset(source, sample).files]
            assert read_rows(source, sample, tokenizer).documents == len(STORIES) * len(listed[path])
        assert listed == {"": ["data/a.jsonl", "data/b.jsonl"], "/data": ["a.jsonl", "b.jsonl"], "/data/a.jsonl": ["a.jsonl"]}
        sample = calibration("hf://org/stories")
        with pytest.raises(KompressorError, match="org/stories"):
            open_data(sample, environ)


def test_a_claim(tmp_path: Path, tokenizer: ModelTokenizer) -> None:
    jsonl(tmp_path / "logs" / "today" / "a.jsonl", [{"text": story} for story in STORIES])
    for path in ("today", "today/a.jsonl"):
        sample = calibration(f"pvc://logs/{path}", kind=DriftSpec, samples=4, sequenceLength=16)
        source = open_data(sample, {"KOMPRESSOR_CLAIM_DIRECTORY": str(tmp_path)})
        assert len(read_rows(source, sample, tokenizer).tokens) == 4


def test_a_uniform_draw() -> None:
    """Every document has the same chance, wherever it stands."""
    drawn = Counter(n for seed in range(2000) for n in sorted(range(20), key=lambda n: rank(n, seed))[:5])
    assert all(abs(drawn[n] - 500) < 5 * 19.4 for n in range(20))  # five standard deviations of 2000 draws at 1/4


def test_empty_is_nothing_for_every_kind() -> None:
    for options, value in (({}, " "), ({"messages": "a"}, []), ({"tokens": "a"}, None)):
        assert content_of(Document(0, "a: line 1", value), calibration("s3://a/b", dataset=options).dataset) is None


SPEC = {"model": {"source": {"uri": "s3://a/b"}}, "output": {"uri": "s3://a/c"}, "passes": [{"rtn": {"scheme": "W8A8"}}]}


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            {"calibration": {"dataset": {"uri": "s3://a/d", "feild": "x"}}},
            "spec.calibration.dataset.feild: is not a field; did you mean field?",
        ),
        (
            {"evaluation": {"dataset": {"uri": "s3://a/d"}, "gates": [{"metric": "kl", "maxKl": 1}]}},
            "spec.evaluation.gates.0.maxKl: is not a field; did you mean maxKL?",
        ),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(section: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        validate_spec(SPEC | section, "job.yaml")
    assert said in str(caught.value)


def test_a_recipe_needs_a_cluster() -> None:
    spec = {name: value for name, value in SPEC.items() if name != "passes"} | {"recipeRef": {"name": "w4"}}
    with pytest.raises(UserError, match=r"spec\.recipeRef: a recipe \(w4\) needs a cluster; write its passes into spec\.passes"):
        validate_spec(spec, "job.yaml")


def test_a_pods_own_disk_holds_no_data() -> None:
    spec = validate_spec(SPEC | {"calibration": {"dataset": {"uri": "file:///data/a.jsonl"}}}, "job.yaml")
    job = Job("a", "b", "c", spec, "d")
    refuse_file_uris(job, in_cluster=False)
    with pytest.raises(UserError, match=r"spec\.calibration\.dataset\.uri: file:///data/a\.jsonl is a pod's own disk"):
        refuse_file_uris(job, in_cluster=True)
