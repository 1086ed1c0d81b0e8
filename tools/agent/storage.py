"""Volumes that are folders of this machine: hostPath, and claims bound to a hostPath or local volume."""

from pathlib import Path

from agent.client import Client, Object
from agent.lookups import read


class StorageError(Exception):
    """The volume cannot be set up (yet), in the kubelet's words."""


def host_path(source: Object) -> Path:
    """The folder or file, made where its type says so. StorageError where it is not what its type says."""
    path, kind = Path(source["path"]), source.get("type") or ""
    if kind == "FileOrCreate":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    elif kind in ("", "DirectoryOrCreate") and not path.exists():
        path.mkdir(parents=True)
    wrong = {
        "Directory": not path.is_dir(), "DirectoryOrCreate": not path.is_dir(),
        "File": not path.is_file(), "FileOrCreate": not path.is_file(),
        "Socket": not path.is_socket(), "CharDevice": not path.is_char_device(), "BlockDevice": not path.is_block_device(),
    }  # fmt: skip
    if wrong.get(kind):
        name = kind.removesuffix("OrCreate").lower()
        raise StorageError(f"hostPath type check failed: {path} is not a {name}")
    return path


def claim(client: Client, namespace: str, name: str, claims: Path) -> Path:
    """The folder behind a claim: its volume's, or one under `claims` for a claim that no volume answers."""
    found = read(client, f"/api/v1/namespaces/{namespace}/persistentvolumeclaims/{name}")
    if found is None:
        raise StorageError(f'persistentvolumeclaim "{name}" not found')
    volume_name = found["spec"].get("volumeName")
    if not volume_name:
        folder = claims / namespace / name
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777)
        return folder
    volume = read(client, f"/api/v1/persistentvolumes/{volume_name}")
    if volume is None:
        raise StorageError(f'persistentvolume "{volume_name}" not found')
    spec = volume["spec"]
    if "hostPath" in spec:
        return host_path(spec["hostPath"])
    if "local" in spec:
        return host_path({"path": spec["local"]["path"], "type": "Directory"})
    raise StorageError(f"persistentvolume {volume_name}: only hostPath and local volumes are served by the node agent")
