"""Host names of pods in a headless Service, in place of a cluster's DNS.

A pod's `<hostname>.<subdomain>` is for the others to find it by. The nodes of this machine tell one another in a folder which pods have
one, a file each, and every such pod's /etc/hosts is rewritten in place, as often as one comes or goes. As in DNS, there is no name without
a Service that selects the pod, nor for one that is not ready, unless the Service publishes those too.
"""

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agent.client import ApiError, ApiUnavailable, Client, Object
from agent.lookups import read
from agent.processes import host_name, hosts_file

log = logging.getLogger(__name__)
LOOK_SECONDS = 0.25
_ZONE = "svc.cluster.local"
HOSTS = "etc-hosts"
"""In a pod's folder, as the kubelet calls it."""


@dataclass
class _Named:
    describe: Callable[[], Object]
    """The pod as it is now, with its address."""
    hosts: Path
    told: bool = False
    """The other nodes know of it."""


class Names:
    """The pods of this node that have such a name, and what is known of those of all nodes."""

    def __init__(self, client: Client, folder: Path, node: str) -> None:
        self._client, self._folder, self._node = client, folder, node
        self._pods: dict[str, _Named] = {}
        self._lock = threading.RLock()
        self._some = threading.Event()
        self._known: list[Object] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{node}_*"):  # by an agent before this one; its pods come again
            left.unlink(missing_ok=True)

    def start(self) -> None:
        threading.Thread(target=self._follow, name="names", daemon=True).start()

    def enter(self, uid: str, describe: Callable[[], Object], folder: Path) -> None:
        """A pod that is about to run, whose own folder this is."""
        if not describe()["spec"].get("subdomain"):
            return
        named = _Named(describe, folder / HOSTS)
        with self._lock:
            self._pods[uid] = named
            self._write(named, self._read())
        self._some.set()

    def leave(self, uid: str) -> None:
        """It is over: nobody finds it any more."""
        with self._lock:
            if self._pods.pop(uid, None) is not None:
                self._file(uid).unlink(missing_ok=True)
            if not self._pods:
                self._some.clear()

    def _follow(self) -> None:
        """For ever."""
        while True:
            self._some.wait()
            threading.Event().wait(LOOK_SECONDS)
            try:
                self._look()
            except (ApiUnavailable, ApiError, OSError) as error:
                log.info("names: %s; looking again", error)

    def _look(self) -> None:
        with self._lock:
            pods = dict(self._pods)
        for uid, named in pods.items():
            if not named.told and self._in_dns(named.describe()):
                self._tell(uid, named)
        with self._lock:
            known = self._read()
            if known != self._known:
                for named in self._pods.values():
                    self._write(named, known)
                self._known = known

    def _in_dns(self, pod: Object) -> bool:
        """Is there a headless Service of the pod's subdomain that selects it, ready as it is?"""
        meta, name = pod["metadata"], pod["spec"]["subdomain"]
        service = read(self._client, f"/api/v1/namespaces/{meta['namespace']}/services/{name}")
        spec = service["spec"] if service else {}
        selector, labels = spec.get("selector") or {}, meta.get("labels") or {}
        if spec.get("clusterIP") != "None" or not selector or not selector.items() <= labels.items():
            return False
        ready = any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions") or ())
        return bool(spec.get("publishNotReadyAddresses")) or ready

    def _tell(self, uid: str, named: _Named) -> None:
        pod = named.describe()
        told = {
            "namespace": pod["metadata"]["namespace"],
            "service": pod["spec"]["subdomain"],
            "host": host_name(pod),
            "ip": pod["status"]["podIP"],
        }
        with self._lock:
            if uid in self._pods:  # or it is over by now
                new = self._folder / f".{self._node}_{uid}"
                new.write_text(json.dumps(told))
                new.replace(self._file(uid))
                named.told = True

    def _read(self) -> list[Object]:
        """What all nodes have told."""
        found = []
        for file in sorted(self._folder.glob("[!.]*")):
            try:
                found.append(json.loads(file.read_text()))
            except FileNotFoundError:  # another node's pod has just ended
                continue
        return found

    def _write(self, named: _Named, known: list[Object]) -> None:
        """In place, for it is the inode that is mounted into the containers."""
        pod = named.describe()
        text = hosts_file(pod) + "".join(_line(record, pod["metadata"]["namespace"]) for record in known)
        with named.hosts.open("r+" if named.hosts.exists() else "w") as file:
            file.write(text)
            file.truncate()
        named.hosts.chmod(0o644)

    def _file(self, uid: str) -> Path:
        return self._folder / f"{self._node}_{uid}"


def _line(record: Object, namespace: str) -> str:
    """All names of a pod, as its namesakes' search domains make them."""
    short = f"{record['host']}.{record['service']}"
    longer = [f"{short}.{record['namespace']}{zone}" for zone in ("", ".svc", f".{_ZONE}")]
    return "\t".join([record["ip"], *reversed(longer), *([short] if record["namespace"] == namespace else [])]) + "\n"
