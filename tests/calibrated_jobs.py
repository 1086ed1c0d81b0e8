"""Calibrated jobs on the trained models: text of the model's own language to measure with, and the exact rows a job was judged by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from corpus import Corpus
from kompressor_worker.calibration import read_rows
from kompressor_worker.job import load_job
from kompressor_worker.storage.locations import open_data, open_source
from kompressor_worker.tokenizer import ModelTokenizer
from models import RECIPES

__all__ = ["evaluation_rows", "samples", "write_data"]

SEEDS = {"calibration": 21, "evaluation": 1_000_003}
"""Of the text; the models were trained on that of seed 0."""
LENGTH = 128
"""Tokens in a row."""


def write_data(folder: Path, kind: str, rows: int = 64) -> dict[str, Path]:
    """calibration.jsonl and evaluation.jsonl, each with text for `rows` packed rows of LENGTH tokens, by section of the spec."""
    written = {}
    for section, seed in SEEDS.items():
        stories = Corpus(RECIPES[kind].language).text(seed, characters=rows * LENGTH * 5).splitlines()
        written[section] = folder / f"{section}.jsonl"
        written[section].write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    return written


def samples(uris: dict[str, str], rows: int = 64, **location: Any) -> dict[str, Any]:
    """`spec.calibration` and `spec.evaluation` of that data; `location` is what else there is to say of where it lies."""
    drawn = {"samples": rows, "sequenceLength": LENGTH, "packing": True}
    return {section: {"dataset": {"uri": uri, **location}, **drawn} for section, uri in uris.items()}


def evaluation_rows(job: Path) -> torch.Tensor:
    """Token ids [rows, LENGTH] (int64) that the job at this path is evaluated on."""
    spec = load_job(job, {}).spec
    assert spec.evaluation is not None
    tokenizer = ModelTokenizer(open_source(spec.model.source, {}))
    return torch.stack(read_rows(open_data(spec.evaluation, {}), spec.evaluation, tokenizer).tokens).long()
