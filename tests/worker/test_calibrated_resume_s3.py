"""A calibrated job from bucket to bucket, killed at moments that cover all of it: the same objects as undisturbed, and nothing beside them.

A moment is a request to S3: the undisturbed job's are counted, seeded ones are drawn from all along it, and when a later worker makes that
request it is killed before the server gets it, or after the server has done it. Nothing depends on time.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from fault_server import Fault, FaultServer
from nursery import Nursery
from thin_models import thin_llama

import jobs
from jobs import Bucket

KILLS = 10
LENGTH = 24
PASSES = [{"smoothQuant": {}}, {"gptq": {"scheme": "W4A16", "groupSize": 32}}, {"kvCache": {"scheme": "FP8"}}]
UNLIKE = {"report.html"}
"""Tells times."""


@dataclass(frozen=True)
class Moment:
    """The request number `request` after `commits` units are committed."""

    commits: int
    request: int
    kind: Literal["drop", "lose-answer"]


class Killer(FaultServer):
    """Counts a job's requests and commits over all its workers, and kills the worker that makes the request it was told."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._count = threading.Lock()
        self._pid = 0
        self._born = threading.Event()
        self.moment: Moment | None = None
        self.marks: list[Moment] = []
        """Where each request was, as a moment to be killed at."""
        self.commits = 0
        self.hits = 0

    def worker(self, nursery: Nursery, job: Path, environ: dict[str, str], moment: Moment | None) -> tuple[int, str]:
        """One worker to its end, by itself or by us: exit code and what it said."""
        self.moment, self._claimed, self._since = moment, False, 0
        self._born.clear()
        worker = nursery.worker(job, environ)
        self._pid = worker.pid
        self._born.set()
        said = worker.communicate()[1]
        return worker.returncode, said

    def take(self, method: str, path: str, byte_range: str) -> Fault | None:
        super().take(method, path, byte_range)
        with self._count:
            if method == "PUT" and path.split("?")[0].endswith("/journal.json"):
                if self._claimed:
                    self.commits += 1
                    self._since = 0
                self._claimed = True
            mark = Moment(self.commits, self._since, "drop")
            self.marks.append(mark)
            self._since += 1
            at = self.moment
            if at is None or (mark.commits, mark.request) < (at.commits, at.request):
                return None
            self.moment = None
            return Fault(at.kind, 1, "", re.compile(""), 0, self._kill)

    def _kill(self) -> None:
        self._born.wait()
        os.kill(self._pid, signal.SIGKILL)
        self.hits += 1


def moments(marks: list[Moment], kills: int, seed: int) -> list[Moment]:
    """One from each of `kills` equal stretches of a job's requests."""
    chance = random.Random(seed)
    drawn = [marks[int((number + chance.random()) * len(marks) / kills)] for number in range(kills)]
    return [Moment(at.commits, at.request, chance.choice(("drop", "lose-answer"))) for at in drawn]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six thin blocks; embeddings and head as large as a part of an upload may be."""
    return thin_llama(tmp_path_factory.mktemp("thin"), 6, hidden=128, vocabulary=20992)


def manifest(bucket: Bucket, endpoint: str, out: str, rows: int) -> dict[str, Any]:
    def sample(name: str, rows: int) -> dict[str, Any]:
        dataset = {"uri": bucket.uri(f"data/{name}.jsonl"), "tokens": "ids", "endpoint": endpoint}
        return {"dataset": dataset, "samples": rows, "sequenceLength": LENGTH}

    body = jobs.manifest(bucket.uri("model"), bucket.uri(out), PASSES, endpoint)
    body["spec"] |= {"calibration": sample("calibration", rows), "evaluation": sample("evaluation", 2)}
    return body


def upload_rows(bucket: Bucket, name: str, rows: int, seed: int) -> None:
    chance = random.Random(seed)
    lines = (json.dumps({"ids": [chance.randrange(3, 500) for _ in range(LENGTH)]}) for _ in range(rows))
    bucket.server.client().put_object(Bucket=bucket.name, Key=f"data/{name}.jsonl", Body="\n".join(lines).encode())


@pytest.mark.parametrize(("rows", "left"), [(2, "snapshot-"), (64, "blocks/")])
def test_killed_all_along(nursery: Nursery, bucket: Bucket, model: Path, tmp_path: Path, rows: int, left: str) -> None:
    """Few rows are smaller than a block, so each commit leaves a snapshot; many are larger, so it leaves the block to be run again."""
    bucket.upload(model, "model")
    for name, count, seed in (("calibration", rows, 1), ("evaluation", 2, 2)):
        upload_rows(bucket, name, count, seed)
    with Killer(bucket.server.endpoint) as store:

        def job(out: str) -> Path:
            return jobs.write(tmp_path / f"{out}.json", manifest(bucket, store.endpoint, out, rows))

        code, said = store.worker(nursery, job("whole"), bucket.environ, None)
        assert code == 0, said
        whole, marks = bucket.files("whole"), list(store.marks)
        store.commits, store.seen[:] = 0, []
        for moment in moments(marks, KILLS, seed=rows):
            code, said = store.worker(nursery, job("cut"), bucket.environ, moment)
            assert code == -signal.SIGKILL, (moment, code, said)
        code, said = store.worker(nursery, job("cut"), bucket.environ, None)
        assert code == 0, said
    cut = bucket.files("cut")
    assert cut.keys() == whole.keys()
    assert [name for name in whole if name not in UNLIKE and cut[name] != whole[name]] == []
    assert bucket.uploads("cut") == []
    assert store.hits == KILLS
    taken_up = [line for line in store.seen if line.startswith("GET") and f"/.kompressor/{left}" in line]
    assert len(taken_up) >= KILLS // 2, "that is not how these workers went on"
