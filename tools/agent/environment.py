"""A container's environment and arguments, from its spec: pure but for the lookups handed in."""

import base64
import re
from collections.abc import Callable, Mapping
from typing import Any

from agent.fields import pod_field, resource_field

Object = dict[str, Any]
# kind ("Secret" or "ConfigMap") and name -> the object, None where there is none
Lookup = Callable[[str, str], Object | None]

_REFERENCE = re.compile(r"\$\$|\$\(([^()]*)\)")


class ConfigError(Exception):
    """The container cannot be configured yet: shown as CreateContainerConfigError, with the kubelet's words."""


def expand(text: str, variables: Mapping[str, str]) -> str:
    """`$(NAME)` replaced where NAME is known and left alone where not; `$$` is a plain `$`."""

    def replace(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return variables.get(match[1], match[0])

    return _REFERENCE.sub(replace, text)


def environment(pod: Object, container: Object, base: Mapping[str, str], allocatable: dict[str, str], lookup: Lookup) -> dict[str, str]:
    """`base`, then envFrom, then env in order, each able to refer to what went before, but not to the image's variables.

    Raises ConfigError with the kubelet's message for a missing secret, config map or key that is not optional.
    """
    result: dict[str, str] = {}
    for source in container.get("envFrom") or []:
        kind = "Secret" if "secretRef" in source else "ConfigMap"
        ref = source.get("secretRef") or source["configMapRef"]
        found = lookup(kind, ref["name"])
        if found is None:
            if ref.get("optional"):
                continue
            raise ConfigError(f'{kind.lower()} "{ref["name"]}" not found')
        prefix = source.get("prefix", "")
        result |= {prefix + key: value for key, value in content(kind, found).items()}
    for item in container.get("env") or []:
        if "valueFrom" in item:
            value = _from_source(pod, container, item["valueFrom"], allocatable, lookup)
            if value is None:
                continue
        else:
            value = expand(item.get("value", ""), {**base, **result} if "$(" in item.get("value", "") else {})
        result[item["name"]] = value
    return {**base, **result}


def content(kind: str, found: Object) -> dict[str, str]:
    """The text entries of a Secret or ConfigMap, decoded."""
    data = found.get("data") or {}
    if kind == "Secret":
        return {key: base64.b64decode(value).decode(errors="surrogateescape") for key, value in data.items()}
    return dict(data)


def _from_source(pod: Object, container: Object, source: Object, allocatable: dict[str, str], lookup: Lookup) -> str | None:
    try:
        if "fieldRef" in source:
            return pod_field(pod, source["fieldRef"]["fieldPath"])
        if "resourceFieldRef" in source:
            return resource_field(pod, container, source["resourceFieldRef"], allocatable)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for name, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
        if name in source:
            return _key(pod["metadata"]["namespace"], kind, source[name], lookup)
    raise ConfigError(f"env source {', '.join(source)} is not served by the node agent; use a value or a reference")


def _key(namespace: str, kind: str, ref: Object, lookup: Lookup) -> str | None:
    found = lookup(kind, ref["name"])
    if found is None:
        if ref.get("optional"):
            return None
        raise ConfigError(f'{kind.lower()} "{ref["name"]}" not found')
    entries = content(kind, found)
    if ref["key"] not in entries:
        if ref.get("optional"):
            return None
        raise ConfigError(f"couldn't find key {ref['key']} in {kind} {namespace}/{ref['name']}")
    return entries[ref["key"]]
