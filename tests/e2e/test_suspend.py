"""A real worker, stopped by its user in the middle of a model and let go again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_compress import Installed, installed  # noqa: F401  (a fixture)

import jobs
from cluster_access import CommandError

pytestmark = pytest.mark.cluster

LAYERS = 120
UNDISTURBED = ("kompressor.json", "report.html")
"""What may differ: they tell of the worker's life."""


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small blocks, but so many that there is a middle to stop in."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = tmp_path_factory.mktemp("deep")
    LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=LAYERS, **shape)).save_pretrained(folder)
    return folder


def until(look: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def log(installed: Installed, selector: str) -> str:  # noqa: F811
    """Empty as long as there is no container to have one."""
    try:
        return installed.cluster.kubectl("logs", "-l", selector, "--tail=-1")
    except CommandError:
        return ""


def test_suspended_in_the_middle_it_goes_on_at_that_block_with_the_same_bytes(installed: Installed, deep: Path) -> None:  # noqa: F811
    installed.bucket.upload(deep, "deep")
    installed.apply("undisturbed", "deep", jobs.RTN_W4, preflight="Skip")
    installed.wait("undisturbed", "Complete")
    installed.apply("stopped", "deep", jobs.RTN_W4, preflight="Skip")
    cluster, selector = installed.cluster, "app.kubernetes.io/instance=stopped"
    until(lambda: "model.layers.5" in log(installed, selector))
    cluster.kubectl("patch", "kcj/stopped", "--type=merge", "-p", '{"spec":{"suspend":true}}')
    installed.wait("stopped", "Suspended")
    until(lambda: not cluster.get("pods", "-l", selector)["items"])
    assert "config.json" not in installed.bucket.names("stopped"), "it was not through yet"
    cluster.kubectl("patch", "kcj/stopped", "--type=merge", "-p", '{"spec":{"suspend":false}}')
    status = installed.wait("stopped", "Complete")
    assert (status["attempt"], status["retries"], status["failures"]) == (1, 0, 0)
    layer = int(status["resumedFromBlock"].removeprefix("model.layers."))
    assert 5 < layer < LAYERS and status["result"]["resumedFromUnit"] == layer + 1, "the embeddings are unit 0"
    one, other = installed.bucket.files("undisturbed"), installed.bucket.files("stopped")
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name] and name not in UNDISTURBED] == []
