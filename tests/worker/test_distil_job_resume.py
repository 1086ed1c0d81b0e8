"""A job that trains, killed while its student is made, while it is trained, and while what came out is published: it goes on there."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nursery import Nursery
from test_calibrated_resume import data
from test_resume import TRIES
from thin_models import thin_qwen3

import jobs
from corpus import Corpus
from jobs import Bucket
from kompressor_worker.distil.checkpoints import MANIFEST
from kompressor_worker.distilling import CHECKPOINTS, STUDENT
from kompressor_worker.job import load_job
from kompressor_worker.journal import decode
from kompressor_worker.storage import JOURNAL, Output
from kompressor_worker.storage.locations import open_output
from models import save_tokenizer, train_tokenizer

STEPS = 8
SCHEMES = {"file": "W8A16", "s3": "W8A16", "gguf": "Q4_0"}
PASSES: list[dict[str, Any]] = [
    {"pruneLayers": {"layers": 8, "correction": "none"}},
    {"distil": {"sequenceLength": 24, "packing": False, "batch": 4, "validationRows": 2, "steps": STEPS, "checkpointEvery": 0}},
]
UNLIKE = ("report.html", "kompressor.json", "tensorboard/events.out.tfevents.0.kompressor")
"""Times are in them."""


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten of them, and a tokenizer, which a GGUF file has in it."""
    folder = thin_qwen3(tmp_path_factory.mktemp("blocks"), 10)
    save_tokenizer(train_tokenizer(Corpus(0), 512), folder)
    return folder


def committed(output: Output) -> int:
    found = output.read(JOURNAL)
    return 0 if found is None else decode(found[0], "").unit


def trained(output: Output) -> int:
    """Steps that are committed."""
    found = output.inner(CHECKPOINTS).read(MANIFEST)
    last = None if found is None else json.loads(found[0]).get("last")
    return int(last["step"]) if last else 0


MOMENTS: list[Callable[[Output], bool]] = [
    lambda output: committed(output.inner(STUDENT)) >= 2,
    lambda output: trained(output) >= 2,
    lambda output: trained(output) >= 5,
    lambda output: committed(output) >= 2,
]


def cut_off(nursery: Nursery, job: Path, environ: dict[str, str], moment: Callable[[Output], bool]) -> str:
    """A worker that is killed as soon as storage says so; all that it said."""
    output = open_output(load_job(job, {}).spec.output, environ)
    worker = nursery.worker(job, environ)
    while worker.poll() is None:
        if moment(output):
            worker.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    return worker.communicate()[1]


@pytest.mark.parametrize("where", SCHEMES)
def test_killed_in_every_phase_it_goes_on_there(where: str, nursery: Nursery, blocks: Path, bucket: Bucket, tmp_path: Path) -> None:
    environ, endpoint = (bucket.environ, bucket.server.endpoint) if where == "s3" else ({}, None)

    def job(out: str) -> Path:
        rounded = {"rtn": {"scheme": SCHEMES[where]}}
        body: dict[str, Any] = jobs.manifest(blocks.as_uri(), "", [PASSES[0], rounded, PASSES[1]])
        body["spec"]["output"] = {"uri": bucket.uri(out), "endpoint": endpoint} if endpoint else {"uri": (tmp_path / out).as_uri()}
        body["spec"]["output"] |= {"format": "gguf", "maxFileBytes": 1 << 20} if where == "gguf" else {}
        for seed, name in enumerate(("calibration", "evaluation")):
            dataset = {"uri": data(tmp_path / f"{name}.jsonl", 24, 24, seed), "tokens": "ids"}
            body["spec"][name] = {"dataset": dataset, "samples": 16, "sequenceLength": 24}
        return jobs.write(tmp_path / f"{out}.json", body)

    def files(out: str) -> dict[str, bytes]:
        if where == "s3":
            return bucket.files(out)
        folder = tmp_path / out
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    code, said = nursery.run(job("whole"), environ)
    assert code == 0, said
    whole = files("whole")
    for out in TRIES:
        heard = [cut_off(nursery, job(out), environ, moment) for moment in MOMENTS]
        code, said = nursery.run(job(out), environ)
        assert code == 0, said
        if "already holds" in said or "going on at unit" not in said:  # a busy machine let a worker come to its end
            continue
        made = files(out)
        assert made.keys() == whole.keys()
        assert [name for name in whole if name not in UNLIKE and made[name] != whole[name]] == []
        one, other = (json.loads(each["kompressor.json"])["distillation"] for each in (whole, made))
        assert [e["loss"] for e in one["curve"]] == [e["loss"] for e in other["curve"]] and other["steps"] == STEPS
        assert one["evaluations"] == other["evaluations"] and len(other["processes"]) > len(one["processes"])
        assert "finished unit 0 embeddings" not in heard[1], "the student was made anew"
        if where == "s3":
            assert bucket.uploads(out) == [] and not [name for name in bucket.names(out) if name.startswith(".kompressor")]
        else:
            assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []
        return
    pytest.fail("no worker was killed in time")
