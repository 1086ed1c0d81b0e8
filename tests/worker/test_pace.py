"""Progress inside a block: bytes add up whatever was expected, percent only rises, and a signal is heard between two batches."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nursery import Nursery
from transformers import LlamaConfig, LlamaForCausalLM

import jobs
from kompressor_worker.job import load_job
from kompressor_worker.layout import ModelLayout, SourceTensor, StageLayout, StoredTensor, UnitLayout
from kompressor_worker.pace import Pace
from kompressor_worker.progress import Progress, Snapshot
from kompressor_worker.run import run

SECONDS_TO_STOP = 10


@given(st.integers(0, 1 << 50), st.floats(0, 1e15), st.lists(st.floats(0, 1e15), max_size=20))
def test_pieces_add_up(total: int, expected: float, works: list[float]) -> None:
    told: list[int] = []
    pace = Pace(total, expected, told.append)
    for work in works:
        pace(work)
    assert len(told) == len(works) and sum(told) <= total
    pace.finish()
    assert sum(told) == total and min(told) >= 0


def four_units() -> ModelLayout:
    units = tuple(
        UnitLayout(name, (StageLayout(name, (SourceTensor(name, "U8", (8,), (StoredTensor(name, "U8", (8,), "f", 0, 8),)),)),))
        for name in "abcd"
    )
    return ModelLayout({}, "BF16", None, units, (), "")


def test_units_that_are_made_again_take_nothing_back() -> None:
    layout = four_units()
    seen: list[Snapshot] = []
    ticks = iter(range(100))
    progress = Progress([seen.append], clock=lambda: float(next(ticks)))
    progress.start(layout, 2)
    for unit, done in ((0, 4), (0, 8), (1, 16), (2, 20)):
        progress.done(unit, done)
    assert [(s.units_done, s.percent) for s in seen] == [(2, 50), (2, 50), (2, 50), (2, 50), (2, 62)]
    assert all(s.bytes_per_second >= 0 and (s.eta_seconds or 0) >= 0 for s in seen)


@pytest.mark.parametrize("first", [0, 3, 4])
def test_a_training_lies_before_the_stream_that_publishes(first: int) -> None:
    """Also for a worker that finds all units committed, and only publishes."""
    layout, seen = four_units(), list[Snapshot]()
    progress = Progress([seen.append])
    progress.start(layout, first, student=True, trains=True)
    progress.training(layout)
    progress.streaming(layout)
    for unit in range(first, 4):
        progress.done(unit, 8 * (unit + 1))
    progress.publishing()
    percents = [s.percent for s in seen]
    assert percents == sorted(percents) and percents[-1] == 100 and seen[0].phase == "Training"


def job(folder: Path, hidden: int, layers: int, rows: int, length: int) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=512, tie_word_embeddings=False)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    chance = random.Random(1)
    lines = (json.dumps({"ids": [chance.randrange(3, 500) for _ in range(length)]}) for _ in range(rows))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    sample: dict[str, Any] = {"dataset": {"uri": (folder / "rows.jsonl").as_uri(), "tokens": "ids"}, "samples": rows}
    sample["sequenceLength"] = length
    passes = [{"smoothQuant": {}}, {"gptq": {"scheme": "W4A16", "groupSize": 32}}]
    body = jobs.manifest((folder / "model").as_uri(), (folder / "out").as_uri(), passes)
    body["spec"] |= {"calibration": sample, "evaluation": sample}
    return jobs.write(folder / "job.json", body)


def test_percent_moves_inside_a_block_and_ends_at_all(tmp_path: Path) -> None:
    seen: list[Snapshot] = []
    run(load_job(job(tmp_path, 64, 2, 64, 256), {}), {}, Progress([seen.append]), threading.Event())
    assert seen[-2].bytes_done == seen[-2].bytes_total > 0
    assert [s.bytes_done for s in seen] == sorted(s.bytes_done for s in seen)
    for unit in ("model.layers.0", "model.layers.1"):
        inside = {s.bytes_done for s in seen if s.unit == unit}
        jumps = [b - a for a, b in pairwise(sorted(inside))]
        assert len(jumps) > 10 and max(jumps) < 0.3 * (max(inside) - min(inside)), (unit, jumps)


def test_a_slow_block_hears_the_signal(nursery: Nursery, tmp_path: Path) -> None:
    """A block takes most of a minute here; told to stop inside the first one, the worker says so within seconds."""
    process = nursery.worker(job(tmp_path, 512, 1, 160, 1024))
    assert process.stderr is not None
    while "model.layers.0" not in (line := process.stderr.readline()):
        assert line, "it ended before it reached the block"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 75, said
    assert time.monotonic() - began < SECONDS_TO_STOP
    assert "finished unit 1" not in said and not (tmp_path / "out").exists()
