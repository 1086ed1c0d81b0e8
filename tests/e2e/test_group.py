"""Two pods that train together through the real control plane, one of them taken away and one killed on the way."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from installation import Installed

from agent.contract import RunState
from calibrated_jobs import samples, write_data
from local_cluster import LocalCluster
from waiting import PATIENCE, eventually

pytestmark = pytest.mark.cluster

STEPS = 80
PASSES: list[dict[str, Any]] = [
    {"pruneWidth": {"ratio": 0.25}},
    {"distil": {"steps": STEPS, "sequenceLength": 128, "batch": 4, "validationRows": 4, "evaluateEvery": 40, "checkpointEvery": 0}},
]


def test_two_pods_train_one_student_whatever_becomes_of_a_pod(installed: Installed, trained_llama: Path, tmp_path: Path) -> None:
    cluster = installed.cluster
    if not isinstance(cluster, LocalCluster):
        pytest.skip("on another cluster's nodes nobody kills processes from here")
    installed.bucket.upload(trained_llama, "llama")
    written = write_data(tmp_path, "llama", 32)
    installed.bucket.upload(tmp_path, "data")
    place = {"endpoint": installed.bucket.server.endpoint, "credentialsSecret": "models-s3"}
    data = samples({section: installed.bucket.uri(f"data/{file.name}") for section, file in written.items()}, 16, **place)
    worker = {"parallelism": 2, "resources": {"requests": {"cpu": "400m"}}}
    installed.apply("together", "llama", PASSES, preflight="Skip", worker=worker, **data)

    def step() -> int:
        return int(installed.status("together").get("progress", {}).get("step") or 0)

    def pod(index: int, but: str = "") -> dict[str, Any]:
        """The one that runs, of another name than `but`; nothing of one while there is none."""
        labels = f"app.kubernetes.io/instance=together,batch.kubernetes.io/job-completion-index={index}"
        found = cluster.get("pods", "-l", labels, "--field-selector=status.phase=Running")["items"]
        return next((each for each in found if each["metadata"]["name"] != but), {})

    eventually(lambda: step() > 5, 2 * PATIENCE)  # two processes import torch, read a checkpoint, and train beside other tests
    gone = pod(1)["metadata"]["name"]
    cluster.kubectl("delete", "pod", gone)
    eventually(lambda: pod(1, but=gone), 2 * PATIENCE)  # the status says Retrying until then, for less than a look takes beside other tests
    reached = step()
    eventually(lambda: step() > reached + 5, 2 * PATIENCE)
    status = installed.status("together")
    assert (status["attempt"], status["retries"], status["failures"]) == (1, 0, 0), "nobody's fault, and the same Job goes on"

    uid = pod(0)["metadata"]["uid"]
    run = RunState.read(cluster.root / "nodes/node-1/pods" / uid / "containers/worker/0")
    assert run is not None
    os.kill(run.pid, signal.SIGKILL)
    status = installed.wait("together", "Complete")
    assert (status["attempt"], status["failures"]) == (2, 1), "the leader was killed, and a next attempt has gone on"
    report = json.loads(installed.bucket.files("together")["kompressor.json"])
    trained = report["distillation"]
    assert (trained["steps"], trained["bestStep"]) == (STEPS, STEPS) and trained["recovered"]["kl"] > 0.05, (
        "what both have learned is there"
    )
    assert status["progress"]["percent"] == 100
