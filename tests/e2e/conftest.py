"""The real parts that the end-to-end tests share: a Kubernetes cluster with one node, an S3 server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from binaries import BinaryError
from cluster_access import Cluster
from local_cluster import provide
from s3 import S3Server

sys.path.insert(0, str(Path(__file__).parent))  # no packages in tests/


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node; images are added by `cluster.add_images`. `CLUSTER=current` uses the cluster of $KUBECONFIG instead."""
    wanted = provide(nodes=1, root=tmp_path_factory.mktemp("cluster"))
    try:
        wanted.start()
    except BinaryError as error:
        pytest.skip(f"no control plane: {error}")
    yield wanted
    wanted.stop()


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of small blocks, but so many that there is a middle to be stopped or deleted in; read-only."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = tmp_path_factory.mktemp("deep")
    LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=120, **shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A versitygw of its own, or the server that $KOMPRESSOR_TEST_S3 names."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    try:
        server.start()
    except BinaryError as error:
        pytest.skip(f"no S3 server: {error}")
    yield server
    server.stop()
