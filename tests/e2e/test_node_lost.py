"""A node whose agent is killed, or does not come back: containers outlive it, and the API server shows what a cluster shows."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from node_pods import WAIT, ended, log, main, pod, status

from agent.contract import RunState
from local_cluster import LocalCluster
from waiting import eventually

pytestmark = pytest.mark.cluster


@pytest.fixture
def fragile(node: LocalCluster) -> Iterator[LocalCluster]:
    """A second node, with a GPU, to be killed; the others' node is left alone."""
    node.start_node("node-7", *FRAGILE)
    yield node
    if not node.processes["node-7"].alive:
        node.start_node("node-7", *FRAGILE)
    node.kubectl("delete", "pods", "-n", "agent", "--field-selector=spec.nodeName=node-7", "--grace-period=1")
    node.stop_component("node-7")
    node.kubectl("delete", "node", "node-7")


FRAGILE = ("--no-kill-on-exit", "--capacity=nvidia.com/gpu=1,cpu=4")
HERE = {"nodeSelector": {"kubernetes.io/hostname": "node-7"}}


def kill_agent(cluster: LocalCluster) -> None:
    cluster.processes["node-7"].send(signal.SIGKILL)
    eventually(lambda: not cluster.processes["node-7"].alive)


def run_of(cluster: LocalCluster, name: str) -> Path:
    """The folder of the first run of a pod's container."""
    uid = cluster.get("pod", name, "-n", "agent")["metadata"]["uid"]
    return cluster.root / "nodes/node-7/pods" / str(uid) / "containers/main/0"


def state_of(run: Path) -> RunState:
    state = RunState.read(run)
    assert state is not None
    return state


def test_containers_outlive_a_killed_agent_and_are_taken_up(fragile: LocalCluster) -> None:
    gpu = {"limits": {"nvidia.com/gpu": "1"}}
    script = "echo up $CUDA_VISIBLE_DEVICES; while ! [ -e /tmp/end ]; do sleep 0.05; done; exit 4"
    fragile.apply(pod("stays", script, spec=HERE, resources=gpu), pod("goes", script, spec=HERE))
    runs = {}
    for name in ("stays", "goes"):
        fragile.kubectl("wait", "-n", "agent", "--for=condition=Ready", f"pod/{name}", WAIT)
        runs[name] = run_of(fragile, name)
    fragile.apply(pod("refused", "exit 0", spec={"nodeName": "node-7"}, resources=gpu))  # past the scheduler, which knows that none is free
    refused = eventually(lambda: (s := status(fragile, "refused")).get("reason") and s)
    assert (refused["phase"], refused["reason"]) == ("Failed", "UnexpectedAdmissionError") and "containerStatuses" not in refused
    kill_agent(fragile)
    # One container ends while nobody looks; the other is lost, with its shim.
    Path(f"/proc/{state_of(runs['stays']).pid}/root/tmp/end").touch()
    os.kill(state_of(runs["goes"]).shim, signal.SIGKILL)
    eventually(lambda: state_of(runs["stays"]).exit_code == 4)
    assert main(status(fragile, "stays"))["state"].get("running"), "nobody has said so yet"
    fragile.start_node("node-7", *FRAGILE)
    assert ended(fragile, "stays")[1]["exitCode"] == 4
    fragile.apply(pod("next", "echo up $CUDA_VISIBLE_DEVICES", spec={"nodeName": "node-7"}, resources=gpu))
    assert ended(fragile, "next")[0] == "Succeeded" and log(fragile, "next") == "up 0\n", "what it had is free once its end is told"
    phase, state = ended(fragile, "goes")
    assert (phase, state["exitCode"], state["reason"]) == ("Failed", 137, "ContainerStatusUnknown")
    assert (log(fragile, "stays"), log(fragile, "goes")) == ("up 0\n", "up\n")


def test_a_lost_node_keeps_its_pod_terminating(fragile: LocalCluster) -> None:
    fragile.apply(pod("isolated", "trap 'exit 75' TERM; while :; do sleep 0.05; done", spec=HERE))
    fragile.kubectl("wait", "-n", "agent", "--for=condition=Ready", "pod/isolated", WAIT)
    run = run_of(fragile, "isolated")
    kill_agent(fragile)
    fragile.kubectl("wait", "--for=condition=Ready=Unknown", "node/node-7", WAIT)
    lost = eventually(lambda: (p := fragile.get("pod", "isolated", "-n", "agent"))["metadata"].get("deletionTimestamp") and p)
    assert lost["status"]["phase"] == "Running" and main(lost["status"])["state"].get("running")
    assert Path(f"/proc/{state_of(run).pid}").exists(), "cut off, not dead: what fencing is for"
    fragile.start_node("node-7", *FRAGILE)
    eventually(lambda: not fragile.kubectl("get", "pod", "isolated", "-n", "agent", "--ignore-not-found"))
