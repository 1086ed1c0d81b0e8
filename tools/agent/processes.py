"""Pure: a pod's container, made into what a shim runs. Nothing here touches the machine or the API server."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent.contract import MemoryLimit, Mount, ProcessSpec
from agent.environment import ConfigError, expand
from agent.images import Image
from agent.quantity import parse

Object = dict[str, Any]

# What containerd and CRI-O leave to root in a container that asks for nothing.
_DEFAULT_CAPABILITIES = (
    "CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP",
    "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE",
)  # fmt: skip
TERMINATION_LOG = "/dev/termination-log"


class CommandMissing(Exception):
    """Neither the container nor its image names a command: CreateContainerError."""


@dataclass(frozen=True)
class NodeFacts:
    """What a container learns from the machine it runs on."""

    name: str
    address: str
    service_host: str
    service_port: int
    allocatable: dict[str, str]
    user_namespace: bool
    leashed: bool


def process_spec(
    pod: Object, container: Object, image: Image, env: dict[str, str], mounts: list[Mount], gpus: list[str] | None,
    traversable: list[str], memory: MemoryLimit, node: NodeFacts,
) -> ProcessSpec:  # fmt: skip
    """`env` is what the pod gives; the image's comes below it. `gpus`: the pod's devices, None where the node has none.

    Raises ConfigError for a user that the pod forbids, CommandMissing where there is nothing to run.
    """
    security = security_context(pod, container)
    uid, gid = identity(pod, container, image)
    return ProcessSpec(
        argv=command(container, image, env),
        env={**image.environment(), "HOSTNAME": host_name(pod), **_gpu_environment(gpus), **env},
        cwd=container.get("workingDir") or image.workingDir,
        hostname=host_name(pod),
        hosts=hosts_file(pod),
        uid=uid,
        gid=gid,
        groups=groups(pod),
        lower=image.root,
        mounts=sorted([*mounts, *kept(image, mounts)], key=lambda mount: mount.target.rstrip("/").count("/")),
        traversable=traversable,
        devices=_devices(gpus or []),
        read_only_root=bool(security.get("readOnlyRootFilesystem")),
        no_new_privileges=security.get("allowPrivilegeEscalation") is False,
        capabilities=capabilities(security),
        user_namespace=node.user_namespace,
        leashed=node.leashed,
        memory=memory,
    )


def kept(image: Image, mounts: Sequence[Mount]) -> list[Mount]:
    """The image's own folders that a volume would hide."""
    covered = [mount.target.rstrip("/") + "/" for mount in mounts]
    return [Mount(folder, folder, read_only=True) for folder in image.keep if any(folder.startswith(above) for above in covered)]


def service_environment(node: NodeFacts) -> dict[str, str]:
    """Where the API server is, in every container's environment."""
    return {
        "KUBERNETES_SERVICE_HOST": node.service_host,
        "KUBERNETES_SERVICE_PORT": str(node.service_port),
        "KUBERNETES_SERVICE_PORT_HTTPS": str(node.service_port),
    }


def _gpu_environment(gpus: list[str] | None) -> dict[str, str]:
    """A device plugin hides the other devices from the container; here the variables have to."""
    if gpus is None:
        return {}
    return {"NVIDIA_VISIBLE_DEVICES": ",".join(gpus) or "void", "CUDA_VISIBLE_DEVICES": ",".join(gpus)}


def _devices(gpus: list[str]) -> list[str]:
    shared = ["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-caps"]
    return [f"/dev/nvidia{number}" for number in gpus] + shared if gpus else []


def command(container: Object, image: Image, env: Mapping[str, str]) -> list[str]:
    """`command` replaces the image's entrypoint and its cmd; `args` its cmd; `$(VAR)` is expanded in both."""
    given, args = container.get("command"), container.get("args")
    argv = [*(given or image.entrypoint), *(args or (() if given else image.cmd))]
    if not argv:
        raise CommandMissing(f'container "{container["name"]}": no command specified, and image {image.name} has none')
    return [expand(item, env) for item in argv]


def security_context(pod: Object, container: Object) -> Object:
    """The pod's, overridden by the container's."""
    return {**(pod["spec"].get("securityContext") or {}), **(container.get("securityContext") or {})}


def identity(pod: Object, container: Object, image: Image) -> tuple[int, int]:
    """(uid, gid) of the container's first process; ConfigError if runAsNonRoot forbids it."""
    security = security_context(pod, container)
    uid = security.get("runAsUser", image.user)
    gid = security.get("runAsGroup", image.group if uid == image.user else 0)
    if security.get("runAsNonRoot") and uid == 0:
        meta = pod["metadata"]
        where = f'(pod: "{meta["name"]}_{meta["namespace"]}({meta["uid"]})", container: {container["name"]})'
        if "runAsUser" in security:
            raise ConfigError(f"container's runAsUser breaks non-root policy {where}")
        raise ConfigError(f"container has runAsNonRoot and image will run as root {where}")
    return uid, gid


def groups(pod: Object) -> list[int]:
    """Supplementary groups of every container of the pod."""
    security = pod["spec"].get("securityContext") or {}
    extra = [security["fsGroup"]] if "fsGroup" in security else []
    return [*security.get("supplementalGroups", []), *extra]


def capabilities(security: Object) -> list[str] | None:
    """Those that root keeps; None for a privileged container, which keeps all."""
    if security.get("privileged"):
        return None
    asked = security.get("capabilities") or {}
    dropped = {name.removeprefix("CAP_") for name in asked.get("drop") or []}
    added = [name.removeprefix("CAP_") for name in asked.get("add") or []]
    kept = [] if "ALL" in dropped else [name for name in _DEFAULT_CAPABILITIES if name not in dropped]
    return None if "ALL" in added else sorted({*kept, *added})


def memory_limit(container: Object) -> int:
    """Bytes; 0 for none."""
    limit = ((container.get("resources") or {}).get("limits") or {}).get("memory")
    return int(parse(limit)) if limit else 0


def host_name(pod: Object) -> str:
    """At most 63 bytes, as the kubelet cuts it."""
    return str(pod["spec"].get("hostname") or pod["metadata"]["name"])[:63].rstrip("-.")


def hosts_file(pod: Object) -> str:
    """/etc/hosts as the kubelet writes it."""
    lines = [
        "# Kubernetes-managed hosts file.",
        "127.0.0.1\tlocalhost",
        "::1\tlocalhost ip6-localhost ip6-loopback",
        f"{pod['status']['podIP']}\t{host_name(pod)}",
    ]
    aliases = pod["spec"].get("hostAliases") or []
    if aliases:
        lines += ["", "# Entries added by HostAliases."]
        lines += ["\t".join([alias["ip"], *alias.get("hostnames", [])]) for alias in aliases]
    return "\n".join(lines) + "\n"
