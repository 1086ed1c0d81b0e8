"""deletionPolicy Delete with the real `kompressor clean` and a real S3 server: what is the job's goes, and nothing else."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from test_compress import Installed, installed  # noqa: F401  (a fixture)

import jobs
from cluster_access import CommandError

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small blocks, but so many that there is a middle to be deleted in."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(6)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=100, **shape)).save_pretrained(folder)
    return folder


def log_of(installed: Installed, name: str) -> str:  # noqa: F811
    """What its worker has said; nothing while there is no container."""
    try:
        return installed.cluster.kubectl("logs", "-l", f"app.kubernetes.io/instance={name}", "--tail=-1")
    except CommandError:
        return ""


def test_deleted_when_complete_and_in_the_middle_nothing_of_it_stays(installed: Installed, model: Path) -> None:  # noqa: F811
    bucket, cluster = installed.bucket, installed.cluster
    bucket.upload(model, "source")
    for name in ("whole", "half"):
        bucket.server.client().put_object(Bucket=bucket.name, Key=f"{name}-beside/theirs.txt", Body=b"1")
    installed.apply("whole", "source", jobs.RTN_W4, preflight="Skip", deletionPolicy="Delete")
    installed.wait("whole", "Complete")
    assert "config.json" in bucket.names("whole")
    bucket.server.client().put_object(Bucket=bucket.name, Key="whole/theirs.txt", Body=b"2")
    installed.apply("half", "source", jobs.RTN_W4, preflight="Skip", deletionPolicy="Delete")
    deadline = time.monotonic() + 120
    while "model.layers.5" not in log_of(installed, "half"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    cluster.kubectl("delete", "kcj", "whole", "half", "--wait=true", "--timeout=120s", timeout=130)
    assert bucket.names("whole") == ["theirs.txt"] and bucket.names("half") == [] and bucket.uploads("half") == []
    assert bucket.names("whole-beside") == bucket.names("half-beside") == ["theirs.txt"], "a prefix that only begins alike"
    assert bucket.names("source"), "and the source is nobody's to delete"
