"""A pod's volumes as folders of this machine, ready to be mounted into its containers."""

import base64
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from agent import payload
from agent.client import ApiError, Client, Object
from agent.contract import Mount
from agent.environment import ConfigError, expand
from agent.fields import pod_field, resource_field
from agent.lookups import lookup_in
from agent.payload import File, Owner
from agent.storage import StorageError, claim, host_path
from agent.tokens import Tokens

_REFRESH_SECONDS, _RETRY_SECONDS = 60.0, 5.0
_Files = dict[str, File]


class MountError(Exception):
    """A volume cannot be set up yet: the pod stays in ContainerCreating and a FailedMount event says why."""


class Volumes:
    """One pod's volumes under `folder`; `claims` is where claims without a volume live."""

    def __init__(self, pod: Object, folder: Path, claims: Path, client: Client, allocatable: dict[str, str]) -> None:
        self._pod = pod
        self._folder = folder
        self._claims = claims
        self._client = client
        self._allocatable = allocatable
        self._lookup = lookup_in(client, pod["metadata"]["namespace"])
        self._tokens = Tokens(client, pod)
        self._owner = _owner(pod)
        self._fs_group: int | None = (pod["spec"].get("securityContext") or {}).get("fsGroup")
        self._tried = 0.0

    def prepare(self) -> dict[str, Path]:
        """Every volume's folder by its name. MountError for the first that is not to be had."""
        places = {}
        self._tried = time.time()
        for volume in self._pod["spec"].get("volumes") or []:
            try:
                places[volume["name"]] = self._place(volume)
            except (StorageError, ConfigError, ApiError, ValueError, OSError) as error:
                raise MountError(f'MountVolume.SetUp failed for volume "{volume["name"]}" : {error}') from error
        return places

    def due(self) -> float:
        """When `prepare` should be called again, for changed secrets and config maps and for tokens to renew."""
        kinds = {kind for volume in self._pod["spec"].get("volumes") or [] for kind in volume}
        if not kinds & {"secret", "configMap", "projected", "downwardAPI"}:
            return float("inf")
        return min(self._tried + _REFRESH_SECONDS, max(self._tokens.due(), self._tried + _RETRY_SECONDS))

    def _place(self, volume: Object) -> Path:
        name = volume["name"]
        if "hostPath" in volume:
            return host_path(volume["hostPath"])
        namespace = self._pod["metadata"]["namespace"]
        if "persistentVolumeClaim" in volume:
            return claim(self._client, namespace, volume["persistentVolumeClaim"]["claimName"], self._claims)
        if "ephemeral" in volume:
            return claim(self._client, namespace, f"{self._pod['metadata']['name']}-{name}", self._claims)
        folder = self._folder / str(name)
        if "emptyDir" in volume:
            if not folder.exists():
                folder.mkdir(parents=True)
                Owner(gid=self._owner.gid).take(folder)
                folder.chmod(0o777 if self._fs_group is None else 0o2777)
            return folder
        reader = next((read for kind, read in self._readers().items() if kind in volume), None)
        if reader is None:
            kind = next(kind for kind in volume if kind != "name")
            raise StorageError(f"volume type {kind} is not served by the node agent; use emptyDir, hostPath or a claim")
        source = next(value for kind, value in volume.items() if kind != "name")
        folder.mkdir(parents=True, exist_ok=True)
        payload.write(folder, self._readable(reader(source, source.get("defaultMode", 0o644))), self._owner)
        return folder

    def _readable(self, files: _Files) -> _Files:
        if self._fs_group is None:
            return files
        return {name: File(file.data, file.mode | 0o440) for name, file in files.items()}

    def _readers(self) -> dict[str, Callable[[Object, int], _Files]]:
        return {
            "secret": lambda source, mode: self._entries("Secret", {**source, "name": source.get("secretName")}, mode),
            "configMap": lambda source, mode: self._entries("ConfigMap", source, mode),
            "downwardAPI": self._downward,
            "projected": self._projected,
        }

    def _projected(self, source: Object, mode: int) -> _Files:
        files: _Files = {}
        for part in source.get("sources") or []:
            if "serviceAccountToken" in part:
                wanted = part["serviceAccountToken"]
                token = self._tokens.get(wanted.get("audience", ""), wanted.get("expirationSeconds", 3600))
                private = self._owner.uid is not None or self._fs_group is not None
                files[wanted["path"]] = File(token.encode(), 0o600 if private else mode)
            elif "secret" in part:
                files |= self._entries("Secret", part["secret"], mode)
            elif "configMap" in part:
                files |= self._entries("ConfigMap", part["configMap"], mode)
            elif "downwardAPI" in part:
                files |= self._downward(part["downwardAPI"], mode)
            else:
                raise StorageError(f"projected source {', '.join(part)} is not served by the node agent")
        return files

    def _entries(self, kind: str, source: Object, mode: int) -> _Files:
        found = self._lookup(kind, source["name"])
        optional = source.get("optional", False)
        if found is None:
            if optional:
                return {}
            raise StorageError(f'{kind.lower()} "{source["name"]}" not found')
        entries = _bytes(kind, found)
        if not source.get("items"):
            return {key: File(data, mode) for key, data in entries.items()}
        files = {}
        for item in source["items"]:
            if item["key"] in entries:
                files[item["path"]] = File(entries[item["key"]], item.get("mode", mode))
            elif not optional:
                what = "secret" if kind == "Secret" else "config"
                raise StorageError(f"references non-existent {what} key: {item['key']}")
        return files

    def _downward(self, source: Object, mode: int) -> _Files:
        files = {}
        for item in source.get("items") or []:
            if "fieldRef" in item:
                text = pod_field(self._pod, item["fieldRef"]["fieldPath"])
            else:
                text = resource_field(self._pod, {}, item["resourceFieldRef"], self._allocatable)
            files[item["path"]] = File(text.encode(), item.get("mode", mode))
        return files


def container_mounts(container: Object, places: Mapping[str, Path], env: Mapping[str, str]) -> list[Mount]:
    """A container's volumeMounts; ConfigError for a subPath that leaves its volume."""
    mounts = []
    for mount in container.get("volumeMounts") or []:
        source = places[mount["name"]]
        inside = mount.get("subPath") or expand(mount.get("subPathExpr", ""), env)
        if inside:
            source = _sub_path(source, inside, mount["name"])
        mounts.append(Mount(str(source), mount["mountPath"], mount.get("readOnly", False)))
    return mounts


def _sub_path(volume: Path, inside: str, name: str) -> Path:
    # Resolved to the file itself: a subPath is bound once and does not follow later changes, as on any node.
    wanted, root = (volume / inside).resolve(), volume.resolve()
    if not wanted.is_relative_to(root):
        raise ConfigError(f'failed to prepare subPath for volumeMount "{name}": {inside} leads out of the volume')
    if not wanted.exists():
        wanted.mkdir(parents=True)
        wanted.chmod(root.stat().st_mode & 0o7777)
    return wanted


def _bytes(kind: str, found: Object) -> dict[str, bytes]:
    data, binary = found.get("data") or {}, found.get("binaryData") or {}
    encoded = data if kind == "Secret" else binary
    plain = {} if kind == "Secret" else {key: text.encode() for key, text in data.items()}
    return plain | {key: base64.b64decode(text) for key, text in encoded.items()}


def _owner(pod: Object) -> Owner:
    """As the kubelet: files to fsGroup, else to the user that all containers share; only root can give them away."""
    security = pod["spec"].get("securityContext") or {}
    group = security.get("fsGroup")
    everyone = pod["spec"]["containers"] + pod["spec"].get("initContainers", [])
    users = {{**security, **(each.get("securityContext") or {})}.get("runAsUser") for each in everyone}
    user = users.pop() if group is None and len(users) == 1 else None
    return Owner(user, group) if os.geteuid() == 0 else Owner()
