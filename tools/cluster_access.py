"""A Kubernetes cluster as tests and the demo see it: a kubeconfig, kubectl, Helm. Where it comes from is not their matter.

`CurrentCluster` is the one that `$KUBECONFIG` or `~/.kube/config` points at; `local_cluster.LocalCluster` is our own.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import binaries

__all__ = ["Cluster", "ClusterError", "CommandError", "CurrentCluster", "Images", "link_binaries"]

Images = Mapping[str, Mapping[str, Any]]
"""What an image name means on a node of ours; the entries are described in agent/images.py."""


class ClusterError(Exception):
    """The cluster cannot be used as asked; the message has the remedy."""


class CommandError(Exception):
    """kubectl or Helm failed. `returncode` and `stderr` are theirs."""

    def __init__(self, command: list[str], returncode: int, stdout: str, stderr: str) -> None:
        super().__init__(f"{' '.join(command)}: exit code {returncode}\n{(stderr or stdout).strip()}")
        self.returncode = returncode
        self.stderr = stderr


class Cluster:
    """`kubeconfig`: an administrator's. `bin`: a folder with kubectl and helm. `scratch`: for the caches of both."""

    kubeconfig: Path
    bin: Path
    scratch: Path

    @property
    def environ(self) -> dict[str, str]:
        """What to add to the environment of a process that is to use this cluster."""
        return {
            "KUBECONFIG": str(self.kubeconfig),
            "PATH": f"{self.bin}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "KUBECACHEDIR": str(self.scratch / "kubectl"),
            "HELM_CACHE_HOME": str(self.scratch / "helm" / "cache"),
            "HELM_CONFIG_HOME": str(self.scratch / "helm" / "config"),
            "HELM_DATA_HOME": str(self.scratch / "helm" / "data"),
        }

    def kubectl(self, *arguments: str | Path, stdin: str | None = None, timeout: float = 240) -> str:
        """Runs kubectl as the administrator and returns what it printed; raises CommandError."""
        return self._run("kubectl", arguments, stdin, timeout)

    def helm(self, *arguments: str | Path, stdin: str | None = None, timeout: float = 300) -> str:
        """Runs Helm as the administrator and returns what it printed; raises CommandError."""
        return self._run("helm", arguments, stdin, timeout)

    def get(self, *arguments: str) -> Any:
        """`kubectl get ... -o json`, parsed."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def apply(self, *objects: Mapping[str, Any]) -> str:
        """`kubectl apply` of objects given as dicts."""
        return self.kubectl("apply", "-f", "-", stdin="\n---\n".join(json.dumps(one) for one in objects))

    def add_images(self, images: Images) -> None:
        """Makes images known to the nodes. On a cluster that is not ours nothing happens: its nodes pull their images."""

    def start(self) -> Self:
        """Returns itself, ready to be used."""
        return self

    def stop(self) -> None:
        """Ends what `start` started."""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _run(self, program: str, arguments: tuple[str | Path, ...], stdin: str | None, timeout: float) -> str:
        command = [str(self.bin / program), *(str(argument) for argument in arguments)]
        done = subprocess.run(
            command,
            input=stdin if stdin is not None else "",
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ | self.environ,
        )
        if done.returncode != 0:
            raise CommandError([program, *command[1:]], done.returncode, done.stdout, done.stderr)
        return done.stdout


class CurrentCluster(Cluster):
    """The cluster the user works with already: kind, minikube, a cloud's. Nothing is started and nothing stopped."""

    def __init__(self) -> None:
        given = os.environ.get("KUBECONFIG")
        self.kubeconfig = Path(given) if given else Path.home() / ".kube" / "config"
        # $KUBECONFIG may be a list of files, which kubectl merges; then the first one need not exist.
        if os.pathsep not in str(self.kubeconfig) and not self.kubeconfig.is_file():
            raise ClusterError(f"CLUSTER=current: {self.kubeconfig} does not exist; set KUBECONFIG, or leave CLUSTER unset for a local one")
        self.scratch = binaries.cache_root() / "clients"

    def start(self) -> Self:
        self.bin = link_binaries(self.scratch / "bin", ["kubectl", "helm"])
        try:
            self.kubectl("get", "--raw", "/readyz", timeout=20)
        except (CommandError, subprocess.TimeoutExpired) as error:
            raise ClusterError(f"CLUSTER=current: {self.kubeconfig}: the API server is not ready ({error})") from error
        return self


def link_binaries(folder: Path, names: list[str], log: binaries.Log = print) -> Path:
    """A folder that holds exactly these binaries, wherever each was found, to be put on a PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in binaries.paths(names, log=log).items():
        link = folder / f".{name}-{os.getpid()}"
        link.symlink_to(path)
        link.replace(folder / name)
    return folder
