"""A real worker, stopped by its user in the middle of a model and let go again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from installation import Installed

import jobs
from waiting import eventually

pytestmark = pytest.mark.cluster

UNDISTURBED = ("kompressor.json", "report.html")
"""What may differ: they tell of the worker's life."""


def test_suspended_in_the_middle_it_goes_on_at_that_block_with_the_same_bytes(installed: Installed, deep: Path) -> None:
    installed.bucket.upload(deep, "deep")
    installed.apply("undisturbed", "deep", jobs.RTN_W4, preflight="Skip")
    installed.wait("undisturbed", "Complete")
    installed.apply("stopped", "deep", jobs.RTN_W4, preflight="Skip")
    cluster, selector = installed.cluster, "app.kubernetes.io/instance=stopped"
    eventually(lambda: "model.layers.5" in installed.log("stopped"))
    cluster.kubectl("patch", "kcj/stopped", "--type=merge", "-p", '{"spec":{"suspend":true}}')
    installed.wait("stopped", "Suspended")
    eventually(lambda: not cluster.get("pods", "-l", selector)["items"])
    assert "config.json" not in installed.bucket.names("stopped"), "it was not through yet"
    cluster.kubectl("patch", "kcj/stopped", "--type=merge", "-p", '{"spec":{"suspend":false}}')
    status = installed.wait("stopped", "Complete")
    assert (status["attempt"], status["retries"], status["failures"]) == (1, 0, 0)
    layer = int(status["resumedFromBlock"].removeprefix("model.layers."))
    layers = json.loads((deep / "config.json").read_text())["num_hidden_layers"]
    assert 5 < layer < layers and status["result"]["resumedFromUnit"] == layer + 1, "the embeddings are unit 0"
    one, other = installed.bucket.files("undisturbed"), installed.bucket.files("stopped")
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name] and name not in UNDISTURBED] == []
