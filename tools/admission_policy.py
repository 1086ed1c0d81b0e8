"""CEL for the chart's admission policies, from the CRD's schema: which names are known in `spec`, and who writes what in
`status`.

The CRD keeps unknown names (`x-kubernetes-preserve-unknown-fields`), so that nothing is silently dropped; the policy reads
the object as it was sent and refuses them for every client: strict or not, server-side apply, Helm, Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["WORKER_WRITES", "known_names", "status_writers"]

Schema = dict[str, Any]

WORKER_WRITES = ("progress", "result")
"""What a worker may change in the status of its job; the rest is the operator's."""


def known_names(spec: Schema) -> Schema:
    """`variables` and `validations` of a policy that refuses every name that `spec` does not have."""
    variables, validations = [], []
    for number, (path, known, unknown) in enumerate(_closed_objects(spec, "spec", "object.spec")):
        variable = f"unknown{number}"
        names = ", ".join(known)
        variables.append({"name": variable, "expression": unknown})
        validations.append(
            {
                "expression": f"variables.{variable} == ''",
                "message": f"{path}: unknown name; known are {names}",
                "messageExpression": f"'{path}: no such name: ' + variables.{variable} + '; known are {names}; correct it or leave it out'",
                "reason": "Invalid",
            }
        )
    return {"variables": variables, "validations": validations}


def status_writers(status: Schema) -> Schema:
    """`validations` for whoever is not the operator: all but WORKER_WRITES stays, and only the job's own pod writes those."""
    guarded = [name for name in status["properties"] if name not in WORKER_WRITES]
    pod = "request.userInfo.extra['authentication.kubernetes.io/pod-name'][0]"
    return {
        "validations": [
            {
                "expression": f"{_list(guarded)}.all(f, object.?status[?f] == oldObject.?status[?f])",
                "message": f"only the operator writes status.{', status.'.join(guarded)}; "
                f"a worker writes {' and '.join(f'status.{name}' for name in WORKER_WRITES)}",
                "reason": "Forbidden",
            },
            {
                "expression": "!('authentication.kubernetes.io/pod-name' in request.userInfo.?extra.orValue({})) || "
                f"(has(oldObject.status.jobName) && {pod}.startsWith(oldObject.status.jobName + '-') && "
                "request.userInfo.username.startsWith('system:serviceaccount:' + request.namespace + ':'))",
                "message": "this token belongs to a pod that is not of this CompressionJob's current attempt",
                "reason": "Forbidden",
            },
        ]
    }


def _closed_objects(node: Schema, path: str, value: str, depth: int = 0) -> Iterator[tuple[str, list[str], str]]:
    """Path, known names, and CEL for a string of unknown ones (empty if there is none), of each object with properties.

    `value` is CEL for the object that `path` names; maps with free keys (nodeSelector) are not closed.
    """
    if "properties" not in node:
        return
    yield path, list(node["properties"]), _joined(f"{value}.filter(k, !(k in {_list(node['properties'])}))")
    for name, child in node["properties"].items():
        if child.get("type") == "array":
            item = f"i{depth}"
            for below, known, unknown in _closed_objects(child["items"], f"{path}.{name}[]", item, depth + 1):
                each = f"{_at(value, name, '[]')}.map({item}, {unknown})"
                yield below, known, _joined(f"{each}.filter(s, s != '')")
        else:
            yield from _closed_objects(child, f"{path}.{name}", _at(value, name, "{}"), depth)


def _at(value: str, name: str, otherwise: str) -> str:
    """CEL for the field `name` of `value`; absence becomes `otherwise`."""
    return f"{value}[?'{name}'].orValue({otherwise})"


def _joined(names: str) -> str:
    return f"{names}.join(', ')"


def _list(names: Any) -> str:
    return "[" + ", ".join(f"'{name}'" for name in names) + "]"
