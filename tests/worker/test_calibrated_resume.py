"""A calibrated job that is cut off goes on with the same activations, and ends with the same bytes as one that was left in peace."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from nursery import Nursery
from test_resume import files_of, refuse_other_bytes
from thin_models import thin_llama

import jobs

PASSES = [
    {"smoothQuant": {}},
    {"sparseGPT": {"pattern": "2:4"}},
    {"gptq": {"scheme": "W4A16", "groupSize": 32, "ignore": ["re:.*down_proj"]}},  # pruned, not quantised
]


def data(path: Path, rows: int, length: int, seed: int) -> str:
    """Token ids, written once: a file's ETag is its size and time."""
    chance = random.Random(seed)
    if not path.exists():
        lines = (json.dumps({"ids": [chance.randrange(3, 500) for _ in range(length)]}) for _ in range(rows))
        path.write_text("\n".join(lines))
    return path.as_uri()


def job(tmp_path: Path, model: Path, out: str, rows: int, **output: str) -> Path:
    def sample(name: str, seed: int) -> dict[str, Any]:
        dataset = {"uri": data(tmp_path / f"{name}-{rows}.jsonl", rows, 24, seed), "tokens": "ids"}
        return {"dataset": dataset, "samples": rows, "sequenceLength": 24}

    body = jobs.manifest(model.as_uri(), (tmp_path / out).as_uri(), PASSES)
    body["spec"] |= {"calibration": sample("calibration", 1), "evaluation": sample("evaluation", 2)}
    body["spec"]["output"] |= output
    return jobs.write(tmp_path / f"{out}.json", body)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty of them."""
    return thin_llama(tmp_path_factory.mktemp("blocks"), 20)


@pytest.mark.parametrize(("rows", "leaves", "stored"), [(2, "snapshots", "dense"), (60, "blocks", "dense"), (60, "blocks", "bitmask")])
def test_killed_ten_times(nursery: Nursery, rows: int, leaves: str, stored: str, blocks: Path, tmp_path: Path) -> None:
    """Few rows are smaller than a block, so every commit leaves a snapshot; many rows are larger, so it leaves the block."""
    code, said = nursery.run(job(tmp_path, blocks, "whole", rows, sparseStorage=stored))
    assert code == 0, said
    whole = files_of(tmp_path / "whole")
    report = json.loads(whole["kompressor.json"])
    assert report["evaluation"]["kl"] > 0 and report["result"].get("bitmaskLinears", 0) == (20 if stored == "bitmask" else 0)
    refuse_other_bytes(nursery, lambda out: job(tmp_path, blocks, out, rows, sparseStorage=stored), 10, rows)


def test_other_data_is_another_job(nursery: Nursery, blocks: Path, tmp_path: Path) -> None:
    """The output holds the result of one sample; asked for another one, the field that differs is named."""
    first = job(tmp_path, blocks, "out", 2)
    assert nursery.run(first)[0] == 0
    assert "already holds this result" in nursery.run(first)[1]
    code, said = nursery.run(job(tmp_path, blocks, "out", 3))
    assert code == 64
    assert "a result whose calibration is" in said
