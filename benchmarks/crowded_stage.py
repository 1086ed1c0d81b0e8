"""The control plane of the operator's tests with no node of ours: KWOK plays one, and pods that end well (kwok_stages.yaml).

with crowded_stage() as stage:
    async with running_operator(stage) as operator:
        operator.rss, operator.cpu_seconds, operator.requests()
"""

from __future__ import annotations

import asyncio
import http.client
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("tools", "tests", "tests/operator", "crds", "operator")]

from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from stage import Stage  # noqa: E402

from kwok import kwok  # noqa: E402
from local_cluster import LocalCluster  # noqa: E402
from processes import Process, StartError, free_port, spawn, wait_until  # noqa: E402

__all__ = ["CrowdedStage", "RunningOperator", "cpu_seconds", "crowded_stage", "running_operator"]

STAGES = Path(__file__).with_name("kwok_stages.yaml")
NODE = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "kwok"}}
LEASE_SECONDS = 20  # KWOK renews after a quarter; the control plane waits for ten
LISTS = {"KUBE_FEATURE_WatchListClient": "false"}
"""KWOK loses its watch of pods whenever it is slow; it then asks for all of them through a new one, again and again once there are many."""
READY_SECONDS = 90.0
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class CrowdedStage(Stage):
    around: list[Process] = field(default_factory=list)
    """Control plane and KWOK."""


@dataclass(frozen=True)
class RunningOperator:
    process: Process
    port: int
    around: Sequence[Process] = ()
    """All others that have to be there for its jobs to end."""

    @property
    def needs(self) -> list[Process]:
        return [self.process, *self.around]

    @property
    def rss(self) -> float:
        """Its resident memory now, in MB (10^6 bytes)."""
        return self._of_status("VmRSS")

    @property
    def peak_rss(self) -> float:
        """The most that it ever was, in MB."""
        return self._of_status("VmHWM")

    def _of_status(self, name: str) -> float:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{name}:"))

    @property
    def cpu_seconds(self) -> float:
        return cpu_seconds(self.process)

    def requests(self) -> Counter[str]:
        """What it has asked of the API server until now, by verb and kind; watches are not among them."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/metrics")
        families = text_string_to_metric_families(connection.getresponse().read().decode())
        connection.close()
        made: Counter[str] = Counter()
        for sample in (sample for family in families if family.name == "kompressor_api_requests" for sample in family.samples):
            made[f"{sample.labels['verb']} {sample.labels['kind']}"] += int(sample.value)
        return made

    def ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()


def cpu_seconds(process: Process) -> float:
    """User and system time of this process since its start."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@contextmanager
def crowded_stage() -> Iterator[CrowdedStage]:
    """Control plane, chart (but for the operator) and KWOK; ended and removed afterwards."""
    binary = kwok()
    with tempfile.TemporaryDirectory(prefix="kompressor-scale-") as folder:
        stage = CrowdedStage(Path(folder))
        stage.cluster = LocalCluster(stage.root / "cluster", log=print)
        with stage.cluster:
            stage.install()
            options = ["--kubeconfig", stage.cluster.kubeconfig, "--config", STAGES, "--manage-all-nodes"]
            options.append(f"--node-lease-duration-seconds={LEASE_SECONDS}")
            player = spawn("kwok", [binary, *options], log=stage.root / "kwok.log", environ=os.environ | LISTS)
            try:
                stage.cluster.apply(NODE)
                wait_until(lambda: _node_ready(stage), what="the node that KWOK plays", seconds=60, needs=[player])
                stage.enter_namespace()
                stage.around = [*stage.cluster.processes.values(), player]
                yield stage
            finally:
                player.stop(5)


def _node_ready(stage: Stage) -> bool:
    status = stage.api.call("GET", "/api/v1/nodes/kwok").get("status", {})
    return any((c["type"], c["status"]) == ("Ready", "True") for c in status.get("conditions", []))


@asynccontextmanager
async def running_operator(stage: CrowdedStage, kubeconfig: str = "") -> AsyncIterator[RunningOperator]:
    """The operator as a process of its own for the stage's namespace, once it is ready and watches."""
    port = free_port()
    environ = stage.environ(health_port=str(port), log_level="WARNING") | ({"KUBECONFIG": kubeconfig} if kubeconfig else {})
    process = spawn("operator", [sys.executable, "-m", "kompressor_operator"], log=stage.root / "operator.log", environ=environ)
    running, deadline = RunningOperator(process, port, stage.around), time.monotonic() + READY_SECONDS
    try:
        while not await asyncio.to_thread(running.ready):
            if not process.alive or time.monotonic() > deadline:
                raise StartError(f"the operator is not ready:\n{process.tail()}")
            await asyncio.sleep(0.1)
        await asyncio.sleep(2)  # its watches open just after
        yield running
    finally:
        await asyncio.to_thread(process.stop, 20)
