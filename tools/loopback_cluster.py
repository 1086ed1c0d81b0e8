"""The local cluster itself: its processes, started in order and ended in order, its keys, its nodes. See local_cluster.py."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import binaries
import control_plane
from certificates import write_kubeconfig
from cluster_access import Cluster, ClusterError, Images, link_binaries
from control_plane import COMPONENTS, Identities, Ports
from processes import Process, StartError, free_ports, spawn, wait_until
from readiness import Readiness

__all__ = ["LocalCluster", "Log"]

Log = Callable[[str], None]

NODE_AGENT = Path(__file__).with_name("node_agent.py")
_READY_SECONDS = 90.0
# The API server waits up to a minute for open watches. etcd outlives it, so killing it loses nothing.
_GRACE = {"kube-apiserver": 3.0}
_DEFAULT_GRACE = 10.0


class LocalCluster(Cluster):
    """Starts on `start` (or `with`), ends on `stop`; its processes die with this one, however that ends.

    `root` holds everything (keys, logs, etcd, a folder for each node); by default a temporary folder, removed on `stop`.
    `images` is the nodes' image table: what an image name means on this machine; `node_arguments` go to every agent.
    `keep` lets the processes outlive this one; leaving the `with` block then stops nothing, `python
    tools/local_cluster.py down` does.

    Start it from a thread that lives as long as the cluster should (see processes.py).
    """

    def __init__(
        self,
        root: Path | None = None,
        *,
        nodes: int = 0,
        images: Images | None = None,
        node_arguments: Sequence[str] = (),
        keep: bool = False,
        log: Log = lambda line: None,
    ) -> None:
        self._temporary = root is None and not keep
        if root is None:
            root = kept_root() if keep else Path(tempfile.mkdtemp(prefix="kompressor-cluster-"))
        self.root = root.absolute()
        self.keep = keep
        self.server = ""
        self.ca = self.root / "pki" / "ca.crt"
        self.kubeconfig = self.root / "pki" / "admin.kubeconfig"
        self.bin = self.root / "bin"
        self.scratch = self.root / "clients"
        self.processes: dict[str, Process] = {}
        """By component or node name, in the order they started."""
        self.nodes = [f"node-{number}" for number in range(1, nodes + 1)]
        self._images = dict(images or {})
        self._node_arguments = tuple(node_arguments)
        self._adopted: list[Process] = []
        self._log = log
        self._ids: Identities | None = None
        self._ports: Ports | None = None

    # ---- life

    def start(self) -> Self:
        """Returns when the API server is ready, Pods can be created and every node is Ready; raises StartError."""
        if self.keep and (old := LocalCluster.kept()) is not None:
            if any(process.alive for process in old.processes.values()):
                raise ClusterError(f"{old.root}: a cluster runs there; `python tools/local_cluster.py down` ends it")
            old.stop()  # what is left of one that did not survive a restart of the machine
        began = time.monotonic()
        link_binaries(self.bin, [*COMPONENTS, "kubectl", "helm"], self._log)
        try:
            self._prepare()
            self._boot(lambda what: self._log(f"{what} after {time.monotonic() - began:.1f} s"))
            if self.keep:
                self._write_state()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Nodes first (their pods end as on a drained machine), then the control plane backwards, etcd last."""
        self._stop_nodes()
        for names in (["kube-scheduler", "kube-controller-manager"], ["kube-apiserver"], ["etcd"]):
            group = [self.processes[name] for name in names if name in self.processes]
            for process in group:
                process.send(signal.SIGTERM)
            for process in group:
                process.stop(_GRACE.get(process.name, _DEFAULT_GRACE))
                del self.processes[process.name]
        for process in self._adopted:
            process.stop(_DEFAULT_GRACE)
        self._adopted.clear()
        _remove(self.root / "etcd")  # the logs stay, except in a temporary folder
        if self.keep:
            _state_file().unlink(missing_ok=True)
        if self._temporary:
            _remove(self.root)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self.keep:
            self.stop()

    def add_images(self, images: Images) -> None:
        """Adds to the nodes' image table; the agents look at it whenever a container starts."""
        self._images |= images
        partial = self.root / "images.json.part"
        partial.write_text(json.dumps(self._images, indent=1))
        partial.replace(self.root / "images.json")

    def adopt(self, process: Process) -> None:
        """Has `stop` (and `down`) end this process too, after the nodes: the S3 server that their pods write to."""
        self._adopted.append(process)
        if self.keep:
            self._write_state()

    # ---- parts, for tests of failure

    def stop_component(self, name: str) -> None:
        """Ends one of COMPONENTS or a node, with SIGKILL after its grace."""
        self.processes[name].stop(_GRACE.get(name, _DEFAULT_GRACE))

    def start_component(self, name: str) -> None:
        """Starts one of COMPONENTS again, on its old ports and with its old keys, and waits until it serves."""
        if self.processes[name].alive:
            raise ClusterError(f"{name} (pid {self.processes[name].pid}) is running; call stop_component first")
        self._spawn_component(name)
        if name in ("etcd", "kube-apiserver"):
            wait_until(self.ready, what="/readyz", seconds=_READY_SECONDS, needs=[self.processes[name]])

    def start_node(self, name: str, *arguments: str) -> None:
        """Starts the agent of a node, new or stopped before, and waits until the Node is Ready.

        `arguments` are more of the agent's, such as `--capacity=nvidia.com/gpu=1` or `--labels=zone=a`.
        """
        self._spawn_node(name, arguments)
        self._wait_for_nodes([name])

    # ---- steps of start

    def _prepare(self) -> None:
        for folder in ("etcd", "run", "nodes", "logs"):
            _remove(self.root / folder)  # of a cluster before this one, with other keys
        for folder in ("run", "nodes", "logs"):
            (self.root / folder).mkdir(parents=True)
        self.root.chmod(0o755)  # pods may run as any user; what is secret has its own mode
        self._ports = Ports(*free_ports(5))
        self.server = self._ports.server
        self._ids = control_plane.make_identities(self.root / "pki", self.server)
        self.add_images({})

    def _boot(self, step: Log) -> None:
        # The API server waits for etcd by itself, so both load at the same time.
        for name in ("etcd", "kube-apiserver"):
            self._spawn_component(name)
        needs = list(self.processes.values())
        wait_until(self.ready, what="/readyz", seconds=_READY_SECONDS, needs=needs)
        step("API server ready")
        # Not before: without the bootstrap roles the controller manager gives up, and the rest waits longer than this.
        for name in ("kube-controller-manager", "kube-scheduler"):
            self._spawn_component(name)
        needs = list(self.processes.values())
        for name in self.nodes:
            self._spawn_node(name)
        wait_until(self._readiness().pods, what="the default service account", seconds=_READY_SECONDS, needs=needs)
        step("controllers ready")
        if self.nodes:
            self._wait_for_nodes(self.nodes)
            step(f"{', '.join(self.nodes)} ready")

    def _spawn_component(self, name: str) -> None:
        assert self._ids is not None and self._ports is not None
        command = control_plane.command(name, self.bin / name, self.root, self._ids, self._ports)
        self.processes[name] = spawn(name, command, log=self._log_of(name), keep=self.keep)

    def _spawn_node(self, name: str, arguments: Sequence[str] = ()) -> None:
        folder = self.root / "nodes" / name
        if not (folder / "kubeconfig").exists():
            self._identify_node(name, folder)
        options: list[str | Path] = ["--kubeconfig", folder / "kubeconfig", "--name", name, "--root", folder]
        options += [
            "--images",
            self.root / "images.json",
            "--names",
            self.root / "run" / "names",
            "--address",
            (folder / "address").read_text(),
        ]
        if not self.keep:
            options.append("--kill-on-exit")
        self.processes[name] = spawn(
            name,
            [sys.executable, NODE_AGENT, *options, *self._node_arguments, *arguments],
            log=self._log_of(name),
            keep=self.keep,
            death_signal=signal.SIGTERM,  # it has pods to end
        )

    def _identify_node(self, name: str, folder: Path) -> None:
        """A client certificate that the Node authorizer knows, and a serving one for `kubectl logs`."""
        assert self._ids is not None
        authority, user = self._ids.cluster, f"system:node:{name}"
        client = authority.issue(folder / "client", user, organizations=["system:nodes"])
        write_kubeconfig(folder / "kubeconfig", server=self.server, authority=authority.certificate, pair=client, user=user)
        address = f"127.0.1.{len(list(folder.parent.iterdir()))}"
        authority.issue(folder / "serving", user, names=[name], addresses=[address])
        (folder / "address").write_text(address)

    def _stop_nodes(self) -> None:
        nodes = {name: process for name, process in self.processes.items() if name not in COMPONENTS}
        for process in nodes.values():
            process.send(signal.SIGTERM)
        for name, process in nodes.items():
            # An agent that was killed, or is now, may have left its pods' processes.
            if not process.alive or not process.stop(_DEFAULT_GRACE):
                folder = str(self.root / "nodes" / name)
                options = ["--name", name, "--root", folder, "--kubeconfig", "unused", "--images", "unused"]
                subprocess.run([sys.executable, str(NODE_AGENT), "--end", *options], check=True)
            del self.processes[name]

    @property
    def everything(self) -> list[Process]:
        """All processes that `stop` ends."""
        return [*self.processes.values(), *self._adopted]

    def ready(self) -> bool:
        """Does the API server answer that it is ready?"""
        return self._readiness().api_server()

    def _wait_for_nodes(self, names: list[str]) -> None:
        agents = [self.processes[name] for name in names]
        ready = self._readiness()
        wait_until(lambda: all(map(ready.node, names)), what="nodes", seconds=_READY_SECONDS, needs=agents)

    def _readiness(self) -> Readiness:
        pki = self.root / "pki"
        return Readiness(self.server, self.ca, pki / "admin.crt", pki / "admin.key")

    def _log_of(self, name: str) -> Path:
        return self.root / "logs" / f"{name}.log"

    # ---- a cluster that outlives its maker

    def _write_state(self) -> None:
        state = {
            "root": str(self.root),
            "server": self.server,
            "nodes": self.nodes,
            "processes": [process.record() for process in self.processes.values()],
            "adopted": [process.record() for process in self._adopted],
        }
        partial = _state_file().with_suffix(".part")
        partial.write_text(json.dumps(state, indent=1))
        partial.replace(_state_file())

    @staticmethod
    def kept() -> LocalCluster | None:
        """The cluster that an `up` (or `keep=True`) left running, as an object to use or to stop; None where none is."""
        try:
            state = json.loads(_state_file().read_text())
        except FileNotFoundError:
            return None
        cluster = LocalCluster(Path(state["root"]), keep=True)
        cluster.server, cluster.nodes = state["server"], state["nodes"]
        cluster.processes = {record["name"]: Process.from_record(record) for record in state["processes"]}
        cluster._adopted = [Process.from_record(record) for record in state["adopted"]]
        return cluster


def kept_root() -> Path:
    return binaries.cache_root() / "cluster"


def _state_file() -> Path:
    return kept_root().with_suffix(".json")


def _remove(folder: Path) -> None:
    """Removes a folder, but never through a mount that a pod's volume may have left in it."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    if left := [mount for mount in mounts if mount.startswith(f"{folder}/")]:
        raise StartError(f"{folder}: not removed, {left[0]} is still mounted in it; `umount` it, then remove the folder")
    shutil.rmtree(folder, ignore_errors=True)
