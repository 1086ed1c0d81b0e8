"""Devices and addresses that a node lends to its pods: what is told of a pod's end holds by the time it is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from node_without_server import Node, pod

from agent.client import ApiUnavailable
from agent.pod import PodWorker


def test_a_pods_devices_are_free_before_its_end_is_told(tmp_path: Path) -> None:
    """It is deleted before anything of it has run. The end is what brings the scheduler's next pod, perhaps within milliseconds."""
    node = Node(tmp_path)
    ends = PodWorker(node.context, pod("ends", deletionTimestamp="2026-01-02T03:04:05Z"))
    assert node.gpus.free == 0
    ends._round(0.0)
    ((status, free),) = node.told
    assert (status["phase"], free) == ("Failed", 1)


def test_an_end_that_could_not_be_told_leaves_nothing_to_claim_for_the_next_agent(tmp_path: Path) -> None:
    """The device is another pod's by then."""
    node = Node(tmp_path)
    gone = pod("ends", deletionTimestamp="2026-01-02T03:04:05Z")
    ends = PodWorker(node.context, gone)
    node.away = 1
    with pytest.raises(ApiUnavailable):
        ends._round(0.0)
    assert not node.told and node.gpus.free == 1
    PodWorker(node.context, pod("next"))
    node.begin()
    assert [PodWorker(node.context, each)._home.gpus for each in (gone, pod("next"))] == [[], ["0"]]


def test_a_pod_that_is_refused_has_no_containers(tmp_path: Path) -> None:
    """As a kubelet's: it never was the node's, and the Job controller finds no exit code. An agent that starts again tries it anew."""
    node = Node(tmp_path)
    PodWorker(node.context, pod("holds"))
    PodWorker(node.context, pod("comes"))._round(0.0)
    ((status, free),) = node.told
    assert status.keys() == {"phase", "reason", "message", "startTime"} and free == 0
    assert (status["phase"], status["reason"]) == ("Failed", "UnexpectedAdmissionError") == ("Failed", node.events[-1])
    assert status["message"] == (
        "Pod was rejected: Allocate failed due to requested number of devices unavailable for nvidia.com/gpu. "
        "Requested: 1, Available: 0, which is unexpected"
    )
    node.begin()
    PodWorker(node.context, pod("comes"))
    assert node.gpus.free == 0
