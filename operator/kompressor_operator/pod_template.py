"""spec.worker.podTemplate: part of a PodTemplateSpec, laid over the operator's own by Kubernetes' merge keys. Pure.

Objects merge by name and lists by the key that the API declares for them (`patchMergeKey`); all other lists are replaced as a whole, and
null takes a field away. The API server judges what comes of it, in a dry run, so that only what would go unnoticed is refused here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["CONTAINER_KEYS", "POD_KEYS", "merge", "misshapen", "overlay_of"]

POD_KEYS: Mapping[str, str] = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "imagePullSecrets": "name",
    "resourceClaims": "name",
    "schedulingGates": "name",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
}
"""Lists of a PodSpec and the field that tells their entries apart."""
CONTAINER_KEYS: Mapping[str, str] = {
    "env": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ports": "containerPort",
}
"""The same of a container. What its `resources` claims is replaced as a whole."""
CONTAINERS = ("containers", "initContainers")

Object = dict[str, Any]
Keys = Mapping[str, str]
NO_KEYS: Keys = {}


def overlay_of(spec: Mapping[str, Any]) -> Object:
    """podTemplate of a CompressionJob's spec; empty if there is none."""
    return (spec.get("worker") or {}).get("podTemplate") or {}


def merge(base: Object, overlay: Object) -> Object:
    """The PodTemplateSpec `overlay` over `base`; neither is changed."""
    spec = _object(base.get("spec") or {}, overlay.get("spec") or {}, POD_KEYS)
    return _object(base, {name: value for name, value in overlay.items() if name != "spec"}) | {"spec": spec}


def misshapen(overlay: Mapping[str, Any]) -> str:
    """What of a podTemplate would be ignored or cannot be merged, with its path; empty if nothing is."""
    return next(iter(_problems(overlay)), "")


def _object(base: Object, overlay: Object, keys: Keys = NO_KEYS) -> Object:
    merged = dict(base)
    for name, value in overlay.items():
        present = merged.get(name)
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, dict):
            merged[name] = _object(present if isinstance(present, dict) else {}, value)
        elif name in keys and isinstance(value, list):
            merged[name] = _list(present or [], value, name, keys[name])
        else:
            merged[name] = value
    return merged


def _list(base: list[Object], overlay: list[Object], name: str, key: str) -> list[Object]:
    """Entries of the same key are merged in their place, the others come behind."""
    merged, inside = list(base), CONTAINER_KEYS if name in CONTAINERS else {}
    for entry in overlay:
        at = next((i for i, known in enumerate(merged) if known.get(key) == entry.get(key)), None)
        if at is None:
            merged.append(_object({}, entry, inside))
        else:
            merged[at] = _object(_kept(merged[at], entry, name, key), entry, inside)
    return merged


def _kept(known: Object, entry: Object, name: str, key: str) -> Object:
    """Volumes, claims and variables have one source each: another one takes its place instead of standing beside it (`retainKeys`)."""
    if name == "env" and len(entry) > 1:
        return {}
    if name in ("volumes", "resourceClaims") and len(entry) > 1:
        return {field: value for field, value in known.items() if field in entry}
    return known


def _problems(overlay: Mapping[str, Any]) -> Iterable[str]:
    for name in sorted(set(overlay) - {"metadata", "spec"}):
        yield f"{name}: unknown field; a pod template has metadata and spec"
    for name in ("metadata", "spec"):
        if not isinstance(overlay.get(name) or {}, dict):
            yield f"{name}: is not an object"
            return
    for name, value in sorted((overlay.get("metadata") or {}).items()):
        if name not in ("labels", "annotations"):
            yield f"metadata.{name}: cannot be set; a pod of a Job takes labels and annotations"
        elif not isinstance(value, dict):
            yield f"metadata.{name}: is not an object"
    yield from _list_problems(overlay.get("spec") or {}, POD_KEYS, "spec")


def _list_problems(section: Object, keys: Keys, path: str) -> Iterable[str]:
    for name, key in keys.items():
        if name not in section:
            continue
        entries = section[name]
        if not isinstance(entries, list):
            yield f"{path}.{name}: is not a list"
            return
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict) or key not in entry:
                yield f"{path}.{name}[{index}]: has no {key}, by which it would be merged"
                return
            if name in CONTAINERS:
                yield from _list_problems(entry, CONTAINER_KEYS, f"{path}.{name}[{index}]")
