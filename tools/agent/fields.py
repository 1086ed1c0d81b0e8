"""The downward API: what a pod may read about itself."""

import re
from typing import Any

from agent.quantity import divided

_KEYED = re.compile(r"^metadata\.(labels|annotations)\['([^']+)'\]$")


def pod_field(pod: dict[str, Any], path: str) -> str:
    """The value of a fieldRef. `pod` carries the addresses in its status. ValueError for an unknown path."""
    meta, spec, status = pod["metadata"], pod["spec"], pod.get("status", {})
    keyed = _KEYED.match(path)
    if keyed:
        return str(meta.get(keyed[1], {}).get(keyed[2], ""))
    plain = {
        "metadata.name": meta["name"],
        "metadata.namespace": meta["namespace"],
        "metadata.uid": meta["uid"],
        "metadata.labels": _lines(meta.get("labels") or {}),
        "metadata.annotations": _lines(meta.get("annotations") or {}),
        "spec.nodeName": spec.get("nodeName", ""),
        "spec.serviceAccountName": spec.get("serviceAccountName", ""),
        "status.podIP": status.get("podIP", ""),
        "status.podIPs": ",".join(item["ip"] for item in status.get("podIPs") or []),
        "status.hostIP": status.get("hostIP", ""),
        "status.hostIPs": ",".join(item["ip"] for item in status.get("hostIPs") or []),
    }
    if path not in plain:
        raise ValueError(f"field label not supported: {path}")
    return str(plain[path])


def resource_field(pod: dict[str, Any], container: dict[str, Any], ref: dict[str, Any], allocatable: dict[str, str]) -> str:
    """The value of a resourceFieldRef; a limit that is not set is what the node can give."""
    name = ref.get("containerName")
    if name:
        everyone = pod["spec"]["containers"] + pod["spec"].get("initContainers", [])
        found = [other for other in everyone if other["name"] == name]
        if not found:
            raise ValueError(f"container {name} not found")
        container = found[0]
    kind, _, resource = ref["resource"].partition(".")
    resources = container.get("resources") or {}
    value = (resources.get(kind) or {}).get(resource)
    if value is None:
        value = allocatable.get(resource, "0") if kind == "limits" else "0"
    return divided(value, ref.get("divisor") or "1")


def _lines(pairs: dict[str, str]) -> str:
    """key="value", sorted, the value escaped as Go's %q does for what labels and annotations hold."""
    escaped = {k: v.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t") for k, v in pairs.items()}
    return "\n".join(f'{key}="{escaped[key]}"' for key in sorted(escaped))
