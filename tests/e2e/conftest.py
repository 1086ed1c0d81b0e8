"""The real parts that the end-to-end tests share: a Kubernetes cluster with one node, an S3 server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from binaries import BinaryError
from cluster_access import Cluster
from local_cluster import LocalCluster, provide
from s3 import S3Server
from waiting import eventually

sys.path.insert(0, str(Path(__file__).parent))  # no packages in tests/

import node_pods
from installation import Installed, installation, kernels_of_the_image


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


@pytest.fixture(scope="module")
def node(cluster: Cluster) -> Iterator[LocalCluster]:
    """The cluster's node, in whose namespace `agent` pods come and go."""
    if not isinstance(cluster, LocalCluster):
        pytest.skip("CLUSTER=current has nodes of its own")
    cluster.add_images({node_pods.IMAGE: {"path": [str(Path(sys.executable).parent)], "env": {"FROM_IMAGE": "yes"}}})
    cluster.kubectl("create", "namespace", "agent")
    eventually(lambda: cluster.kubectl("get", "serviceaccount", "-n", "agent", "--ignore-not-found", "default"))
    yield cluster
    cluster.kubectl("delete", "namespace", "agent", "--grace-period=1")


@pytest.fixture(scope="module")
def installed(cluster: Cluster, s3: S3Server) -> Iterator[Installed]:
    """The chart of this tree, whose images run this tree, and a bucket."""
    with kernels_of_the_image() as kernels, installation(cluster, s3, kernels) as made:
        yield made
