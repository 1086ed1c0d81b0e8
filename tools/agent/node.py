"""The Node object, its status and its Lease: registered, kept fresh, made again if someone deletes it."""

import logging
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

from agent.client import MERGE, ApiError, ApiUnavailable, Client, Object
from agent.clock import micro_timestamp, timestamp

log = logging.getLogger(__name__)
_LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
_LEASE_SECONDS = 40
_STATUS_SECONDS = 60.0
_FAILED_RETRY_SECONDS = 1.0
VERSION = "v0.1.0-node-agent"


@dataclass(frozen=True)
class NodeSpec:
    """What the node says of itself. `port` is where its logs are served, 0 if they are not."""

    name: str
    address: str
    capacity: dict[str, str]
    labels: dict[str, str]
    port: int


def machine_capacity() -> dict[str, str]:
    """This machine's processors and memory, and the usual number of pods."""
    total = next(line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    disk = os.statvfs("/")
    storage = disk.f_blocks * disk.f_frsize // 1024
    return {"cpu": str(os.cpu_count() or 1), "memory": f"{total}Ki", "pods": "110", "ephemeral-storage": f"{storage}Ki"}


class Heartbeat:
    """Registers the node, then renews its lease every `renew_seconds` and its status every minute."""

    def __init__(self, client: Client, spec: NodeSpec, renew_seconds: float) -> None:
        self._client = client
        self._spec = spec
        self._renew_seconds = renew_seconds
        self._uid = ""
        self._status_at = 0.0
        self._ready_since = time.time()

    def register(self) -> None:
        """Until the server has the node; every failure is logged."""
        while True:
            try:
                self._register()
                self._beat(time.time())
                return
            except (ApiUnavailable, ApiError) as error:
                log.info("registering %s: %s; trying again", self._spec.name, error)
                time.sleep(_FAILED_RETRY_SECONDS)

    def run(self) -> None:
        """For ever."""
        while True:
            time.sleep(self._renew_seconds)
            try:
                self._beat(time.time())
            except (ApiUnavailable, ApiError) as error:
                log.info("heartbeat of %s: %s", self._spec.name, error)
                self._status_at = 0.0
                if isinstance(error, ApiError) and error.code == 404:
                    self.register()
            except Exception:
                log.exception("heartbeat of %s: unexpected; going on", self._spec.name)

    def _register(self) -> None:
        body = {
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": self._spec.name, "labels": self._labels()},
            "status": self._status(time.time()),
        }  # fmt: skip
        try:
            node = self._client.post("/api/v1/nodes", body)
            log.info("node %s registered", self._spec.name)
        except ApiError as error:
            if error.code != 409:
                raise
            change = {"metadata": {"labels": self._labels()}}
            node = self._client.patch(f"/api/v1/nodes/{self._spec.name}", change)
        self._uid = node["metadata"]["uid"]
        self._status_at = 0.0

    def _beat(self, now: float) -> None:
        self._renew_lease(now)
        if now - self._status_at >= _STATUS_SECONDS:
            self._client.patch(f"/api/v1/nodes/{self._spec.name}/status", {"status": self._status(now)})
            self._status_at = now

    def _renew_lease(self, now: float) -> None:
        name, renewed = self._spec.name, micro_timestamp(now)
        try:
            self._client.patch(f"{_LEASES}/{name}", {"spec": {"renewTime": renewed}}, MERGE)
        except ApiError as error:
            if error.code != 404:
                raise
            owner = {"apiVersion": "v1", "kind": "Node", "name": name, "uid": self._uid}
            spec = {"holderIdentity": name, "leaseDurationSeconds": _LEASE_SECONDS, "renewTime": renewed}
            self._client.post(_LEASES, {"metadata": {"name": name, "ownerReferences": [owner]}, "spec": spec})

    def _labels(self) -> dict[str, str]:
        machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
        own = {"kubernetes.io/hostname": self._spec.name, "kubernetes.io/os": "linux", "kubernetes.io/arch": machine}
        return own | self._spec.labels

    def _status(self, now: float) -> Object:
        spec = self._spec
        calm = (("MemoryPressure", "KubeletHasSufficientMemory"), ("DiskPressure", "KubeletHasNoDiskPressure"),
                ("PIDPressure", "KubeletHasSufficientPID"))  # fmt: skip
        conditions = [self._condition(kind, "False", reason, now) for kind, reason in calm]
        return {
            "capacity": spec.capacity,
            "allocatable": spec.capacity,
            "conditions": [*conditions, self._condition("Ready", "True", "KubeletReady", now)],
            "addresses": [{"type": "InternalIP", "address": spec.address}, {"type": "Hostname", "address": spec.name}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": spec.port}},
            "nodeInfo": self._info(),
        }

    def _condition(self, kind: str, status: str, reason: str, now: float) -> Object:
        return {
            "type": kind, "status": status, "reason": reason, "message": f"node agent of {self._spec.name}",
            "lastHeartbeatTime": timestamp(now), "lastTransitionTime": timestamp(self._ready_since),
        }  # fmt: skip

    def _info(self) -> Object:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = platform.machine()
        return {
            "machineID": boot.replace("-", ""), "systemUUID": boot, "bootID": boot, "kernelVersion": platform.release(),
            "osImage": "processes on this machine", "operatingSystem": "linux",
            "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine),
            "containerRuntimeVersion": "process://0.1.0", "kubeletVersion": VERSION, "kubeProxyVersion": "",
        }  # fmt: skip
