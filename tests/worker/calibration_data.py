"""Datasets as files, the samples that are asked of them, and the rows that come."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corpus import Corpus
from kompressor_api.datasets import CalibrationSpec, Sample
from kompressor_api.v1alpha1 import SourceLocation
from kompressor_worker.calibration import Rows, read_rows
from kompressor_worker.storage.locations import open_data, open_source
from kompressor_worker.tokenizer import ModelTokenizer

STORIES = Corpus().text(seed=7, characters=30_000).splitlines()
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ '?' if m.tool_calls is defined else '' }}"
    "{{ '' if loop.last else '\\n' }}{% endfor %}{{ eos_token }}"
)


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
