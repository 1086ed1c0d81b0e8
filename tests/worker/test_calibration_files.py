"""Which files are a dataset, in folders, buckets, claims and on a hub."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from calibration_data import STORIES, calibration, jsonl
from hub_server import HubServer, Repository

from jobs import Bucket
from kompressor_api.datasets import DriftSpec, EvaluationSpec
from kompressor_api.names import Reason
from kompressor_worker.calibration import check_dataset, read_rows
from kompressor_worker.errors import KompressorError, NotFound, UserError
from kompressor_worker.storage.locations import open_data
from kompressor_worker.tokenizer import ModelTokenizer


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
