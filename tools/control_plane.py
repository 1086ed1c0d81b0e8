"""The command lines of a control plane on loopback, pure: paths and ports in, arguments out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from certificates import Authority, Pair, write_kubeconfig, write_signing_key

__all__ = ["COMPONENTS", "Identities", "Ports", "command", "make_identities"]

COMPONENTS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
"""In the order they start; they stop in the reverse one, etcd last."""

SERVICE_RANGE = "10.96.0.0/16"
_FIRST_SERVICE_ADDRESS = "10.96.0.1"

# A dead node is noticed, and its pods evicted, within seconds: tests of node loss cannot wait the default five minutes.
_NODE_GRACE = "10s"
_EVICTION_SECONDS = 5


@dataclass(frozen=True)
class Ports:
    etcd: int
    etcd_peer: int
    apiserver: int
    controller_manager: int
    scheduler: int

    @property
    def server(self) -> str:
        return f"https://127.0.0.1:{self.apiserver}"


@dataclass(frozen=True)
class Identities:
    """Everything secret of one cluster. `etcd` is an authority of its own: a node's certificate must not open etcd."""

    cluster: Authority
    etcd: Authority
    etcd_server: Pair
    etcd_client: Pair
    apiserver: Pair
    kubelet_client: Pair
    service_accounts: Path
    admin: Path
    controller_manager: Path
    scheduler: Path


def make_identities(folder: Path, server: str) -> Identities:
    """Writes fresh authorities, certificates, kubeconfigs and the service account key into `folder`."""
    cluster = Authority(folder / "ca", "kompressor-cluster")
    etcd = Authority(folder / "etcd-ca", "kompressor-etcd")
    services = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"]

    def kubeconfig(name: str, user: str, group: str) -> Path:
        pair = cluster.issue(folder / name, user, organizations=[group] if group else [])
        path = folder / f"{name}.kubeconfig"
        return write_kubeconfig(path, server=server, authority=cluster.certificate, pair=pair, user=user)

    return Identities(
        cluster=cluster,
        etcd=etcd,
        etcd_server=etcd.issue(folder / "etcd", "etcd", names=["localhost"], addresses=["127.0.0.1"]),
        etcd_client=etcd.issue(folder / "etcd-client", "kube-apiserver"),
        apiserver=cluster.issue(
            folder / "apiserver",
            "kube-apiserver",
            names=["localhost", *services],
            addresses=["127.0.0.1", _FIRST_SERVICE_ADDRESS],
        ),
        kubelet_client=cluster.issue(folder / "kubelet-client", "kube-apiserver-kubelet-client"),
        service_accounts=write_signing_key(folder / "service-accounts"),
        admin=kubeconfig("admin", "kubernetes-admin", "system:masters"),
        controller_manager=kubeconfig("controller-manager", "system:kube-controller-manager", ""),
        scheduler=kubeconfig("scheduler", "system:kube-scheduler", ""),
    )


def command(name: str, program: Path, root: Path, ids: Identities, ports: Ports) -> list[str]:
    """The arguments that start one of COMPONENTS."""
    flags = {
        "etcd": _etcd,
        "kube-apiserver": _apiserver,
        "kube-controller-manager": _controller_manager,
        "kube-scheduler": _scheduler,
    }[name](root, ids, ports)
    return [str(program), *(f"--{flag}={value}" for flag, value in flags.items())]


def _etcd(root: Path, ids: Identities, ports: Ports) -> Mapping[str, object]:
    client, peer = f"https://127.0.0.1:{ports.etcd}", f"https://127.0.0.1:{ports.etcd_peer}"
    return {
        "name": "kompressor",
        "data-dir": root / "etcd",
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": f"kompressor={peer}",
        "cert-file": ids.etcd_server.certificate,
        "key-file": ids.etcd_server.key,
        "trusted-ca-file": ids.etcd.certificate,
        "client-cert-auth": "true",
        "peer-cert-file": ids.etcd_server.certificate,
        "peer-key-file": ids.etcd_server.key,
        "peer-trusted-ca-file": ids.etcd.certificate,
        "peer-client-cert-auth": "true",
        "unsafe-no-fsync": "true",  # a cluster that is thrown away need not survive a power cut
        "log-level": "warn",
    }


def _apiserver(root: Path, ids: Identities, ports: Ports) -> Mapping[str, object]:
    return {
        "bind-address": "127.0.0.1",
        "advertise-address": "127.0.0.1",
        "secure-port": ports.apiserver,
        "endpoint-reconciler-type": "none",  # an Endpoints object may not hold a loopback address
        "cert-dir": root / "run",
        "tls-cert-file": ids.apiserver.certificate,
        "tls-private-key-file": ids.apiserver.key,
        "client-ca-file": ids.cluster.certificate,
        "etcd-servers": f"https://127.0.0.1:{ports.etcd}",
        "etcd-cafile": ids.etcd.certificate,
        "etcd-certfile": ids.etcd_client.certificate,
        "etcd-keyfile": ids.etcd_client.key,
        "service-account-issuer": "https://kubernetes.default.svc.cluster.local",
        "service-account-key-file": ids.service_accounts,
        "service-account-signing-key-file": ids.service_accounts,
        "service-cluster-ip-range": SERVICE_RANGE,
        "authorization-mode": "Node,RBAC",
        "enable-admission-plugins": "NodeRestriction",
        "default-not-ready-toleration-seconds": _EVICTION_SECONDS,
        "default-unreachable-toleration-seconds": _EVICTION_SECONDS,
        "allow-privileged": "true",
        "kubelet-preferred-address-types": "InternalIP",
        "kubelet-certificate-authority": ids.cluster.certificate,
        "kubelet-client-certificate": ids.kubelet_client.certificate,
        "kubelet-client-key": ids.kubelet_client.key,
        "profiling": "false",
    }


def _controller_manager(root: Path, ids: Identities, ports: Ports) -> Mapping[str, object]:
    return {
        **_client_flags(ids.controller_manager, ports.controller_manager, root),
        "use-service-account-credentials": "true",
        "service-account-private-key-file": ids.service_accounts,
        "root-ca-file": ids.cluster.certificate,
        "cluster-signing-cert-file": ids.cluster.pair.certificate,
        "cluster-signing-key-file": ids.cluster.pair.key,
        "concurrent-job-syncs": 50,
        "kube-api-qps": 500,
        "kube-api-burst": 1000,
        "node-monitor-grace-period": _NODE_GRACE,
        "node-monitor-period": "2s",
    }


def _scheduler(root: Path, ids: Identities, ports: Ports) -> Mapping[str, object]:
    return {**_client_flags(ids.scheduler, ports.scheduler, root), "kube-api-qps": 500, "kube-api-burst": 1000}


def _client_flags(kubeconfig: Path, port: int, root: Path) -> Mapping[str, object]:
    return {
        "kubeconfig": kubeconfig,
        "authentication-kubeconfig": kubeconfig,
        "authorization-kubeconfig": kubeconfig,
        "bind-address": "127.0.0.1",
        "secure-port": port,
        "cert-dir": root / "run",
        "leader-elect": "false",  # the only one there is; waiting for a lease would cost seconds
        "profiling": "false",
    }
