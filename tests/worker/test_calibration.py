"""Rows drawn from real files by a real tokenizer, beside what the tokenizers library makes of the same documents."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
from calibration_data import STORIES, calibration, ids_of, jsonl, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from kompressor_api.datasets import CalibrationSpec
from kompressor_api.names import Reason
from kompressor_api.v1alpha1 import SourceLocation
from kompressor_worker.calibration import content_of, rank, read_rows
from kompressor_worker.errors import Terminated, UserError
from kompressor_worker.records import Document
from kompressor_worker.storage.locations import open_data, open_source
from kompressor_worker.streamed_rows import stream_rows
from kompressor_worker.tokenizer import CUT, ModelTokenizer


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


def test_told_to_stop(tmp_path: Path, tokenizer: ModelTokenizer) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Terminated):
        rows_of(calibration(jsonl(tmp_path / "a.jsonl", [{"text": "a b"}]), samples=1), tokenizer, stop=stop)


def test_a_uniform_draw() -> None:
    """Every document has the same chance, wherever it stands."""
    drawn = Counter(n for seed in range(2000) for n in sorted(range(20), key=lambda n: rank(n, seed))[:5])
    assert all(abs(drawn[n] - 500) < 5 * 19.4 for n in range(20))  # five standard deviations of 2000 draws at 1/4


def test_empty_is_nothing_for_every_kind() -> None:
    for options, value in (({}, " "), ({"messages": "a"}, []), ({"tokens": "a"}, None)):
        assert content_of(Document(0, "a: line 1", value), calibration("s3://a/b", dataset=options).dataset) is None


@pytest.mark.parametrize("packing", [True, False])
def test_all_rows_from_disk(tmp_path: Path, tokenizer: ModelTokenizer, packing: bool) -> None:
    """As many as there are, in the documents' own order, with nothing but the current one in memory."""
    documents = [f"the {n} stories of {n % 7} foxes " * (1 + n % 3) for n in range(40)] + [""]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    dataset = {"uri": f"file://{tmp_path}/data.jsonl"}
    sample = CalibrationSpec.model_validate({"dataset": dataset, "samples": 1, "sequenceLength": 32, "packing": packing})
    streamed = stream_rows(open_data(sample, {}), sample, tokenizer)
    everything = sample.model_copy(update={"samples": len(streamed.tokens)})
    drawn = read_rows(open_data(everything, {}), everything, tokenizer)
    assert len(streamed.tokens) == len(drawn.tokens) and (streamed.documents, streamed.bos) == (drawn.documents, drawn.bos)
    assert sum(map(len, streamed.tokens)) == sum(map(len, drawn.tokens))
    if not packing:
        assert sorted(row.tolist() for row in streamed.tokens) == sorted(row.tolist() for row in drawn.tokens)
        assert streamed.tokens[1].tolist() == tokenizer.text("", documents[1], 32)[:32]
    with pytest.raises(IndexError):
        streamed.tokens[len(streamed.tokens)]
