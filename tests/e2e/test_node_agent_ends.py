"""What a node has started ends with its pod, whatever the container makes of signals."""

from __future__ import annotations

import os
import time
from pathlib import Path

from node_without_server import Node, pod

from agent.contract import ProcessSpec, process_start
from agent.pod import PodWorker
from agent.runs import Run


def test_a_pod_that_the_api_server_has_forgotten_leaves_no_process_and_no_folder(tmp_path: Path) -> None:
    """Its object goes at once where it is deleted by force, or with a node that seemed lost. Its first process ignores SIGTERM."""
    node, folder = Node(tmp_path), tmp_path / "pods" / "gone"
    place = folder / "containers" / "main" / "0"
    place.mkdir(parents=True)
    spec = ProcessSpec(
        argv=["sleep", "600"], env={"PATH": "/usr/bin:/bin"}, cwd="/", hostname="gone", hosts="", uid=os.getuid(), gid=os.getgid(),
        groups=[], lower="/", mounts=[], traversable=[], devices=[], read_only_root=False, no_new_privileges=False, capabilities=None,
        user_namespace=os.geteuid() != 0, leashed=False,
    )  # fmt: skip
    run = Run.start(place, spec, -1)
    try:
        worker = PodWorker(node.context, pod("gone"))
        assert process_start(run.state.pid) and worker.containers[0].running and node.gpus.free == 0

        worker.forget()
        deadline = time.monotonic() + 60
        while not worker.finished and time.monotonic() < deadline:
            worker._round(time.time())
            time.sleep(0.02)
        assert worker.finished and not process_start(run.state.pid)
        assert not folder.exists() and node.gpus.free == 1
    finally:
        run.kill()
        run.release()
