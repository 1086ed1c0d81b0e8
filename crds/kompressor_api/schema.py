"""From the pydantic models to the CustomResourceDefinition: a structural OpenAPI v3 schema with CEL rules.

The root and every object under `spec` keep unknown names (`x-kubernetes-preserve-unknown-fields` beside typed properties): a
misspelt name that the API server prunes would silently mean the default, one that it keeps can be refused, by the
admission policy of the chart and by the operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from kompressor_api import names
from kompressor_api.v1alpha1 import CompressionJobSpec, CompressionJobStatus

__all__ = ["MUTABLE", "SIZE_LIMIT", "SchemaError", "crd", "pass_schemas", "structural"]

Schema = dict[str, Any]

SIZE_LIMIT = 262_144
"""Bytes; client-side `kubectl apply` stores the whole object in an annotation of at most this size."""

MUTABLE = ("suspend", "retry", "ttlSecondsAfterFinished")
"""The fields of a spec that may change while the job lives."""

PRESERVE = "x-kubernetes-preserve-unknown-fields"
RULES = "x-kubernetes-validations"

_KEPT = {"type", "description", "default", "enum", "format", "pattern", "minimum", "maximum", "exclusiveMinimum"}
_KEPT |= {"exclusiveMaximum", "multipleOf", "minLength", "maxLength", "minItems", "maxItems"}
_KEPT |= {"minProperties", "maxProperties", "required"}
_READ = {"title", "properties", "items", "additionalProperties", "propertyNames", "examples", "$defs"}
"""Understood, but not copied; a structural schema cannot bound the keys of a map."""

_FALLBACK = {"string": ("maxLength", 1024), "array": ("maxItems", 256)}
"""The maximum of a string or list that names none; CEL is priced by maxima, and an object in etcd has one anyway."""
_MAX_PROPERTIES = 64


class SchemaError(ValueError):
    """A model that the API server would not take, or `kubectl explain` not explain."""


def structural(model: type[BaseModel], where: str, *, keep_unknown: bool) -> Schema:
    """The structural schema of `model`; `where` (such as `spec`) names it in errors. Raises SchemaError."""
    document = model.model_json_schema(by_alias=True)
    return _convert(document, document.get("$defs", {}), where, keep_unknown)


def pass_schemas(passes: Mapping[str, type[BaseModel]]) -> dict[str, Schema]:
    """Name of each pass to the structural schema of its parameters, in the order of their names."""
    schemas = {}
    for name in sorted(passes):
        where = f"spec.passes[].{name}"
        schemas[name] = structural(passes[name], where, keep_unknown=True)
        if not schemas[name].get("description"):
            raise SchemaError(f"{where}: {passes[name].__name__} has no docstring; `kubectl explain` shows its first lines")
    return schemas


def crd(passes: Mapping[str, type[BaseModel]]) -> Schema:
    """The CustomResourceDefinition, with the parameters of `passes` inside. Raises SchemaError."""
    spec = structural(CompressionJobSpec, "spec", keep_unknown=True)
    entry = spec["properties"]["passes"]["items"]
    del entry["additionalProperties"]
    entry |= {"properties": pass_schemas(passes), PRESERVE: True}
    _add_rules(spec)
    status = structural(CompressionJobStatus, "status", keep_unknown=False)
    status["properties"]["conditions"] |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    # an empty status looks finished to kstatus; -1 equals no generation, so it looks unfinished until we have spoken
    status["default"] = {"observedGeneration": -1}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names.PLURAL}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP,
            "names": {
                "kind": names.KIND,
                "listKind": f"{names.KIND}List",
                "plural": names.PLURAL,
                "singular": names.KIND.lower(),
                "shortNames": [names.SHORT_NAME],
                "categories": ["kompressor"],
            },
            "scope": "Namespaced",
            "versions": [_version(spec, status)],
        },
    }


def _version(spec: Schema, status: Schema) -> Schema:
    root = {
        "type": "object",
        PRESERVE: True,  # `suspend: true` beside `spec:` is a misspelt name too
        "description": "Compresses one model: reads it from spec.model, applies spec.passes, writes spec.output.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"Version of this API: {names.API_VERSION}."},
            "kind": {"type": "string", "description": f"Kind of this resource: {names.KIND}."},
            "metadata": {"type": "object"},
            "spec": {
                **spec,
                "description": "What to compress, how, and where to. Immutable but for " + _mutable() + ".",
            },
            "status": {**status, "description": "What is true now. Conditions follow kstatus; phase is for people."},
        },
    }
    return {
        "name": names.VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": _columns(),
        "schema": {"openAPIV3Schema": root},
    }


def _columns() -> list[Schema]:
    ready = '.status.conditions[?(@.type=="Ready")]'

    def column(name: str, path: str, description: str, kind: str = "string", priority: int = 0) -> Schema:
        return {"name": name, "type": kind, "jsonPath": path, "description": description, "priority": priority}

    return [
        column("Ready", f"{ready}.status", "True when the result is published."),
        column("Status", f"{ready}.reason", "Why Ready is what it is."),
        column("Progress", ".status.progress.percent", "Share of the source's bytes that are done.", "integer"),
        column("Ratio", ".status.result.ratio", "Size of the source over size of the result."),
        column("Age", ".metadata.creationTimestamp", "Time since the job was created.", "date"),
        column("Source", ".spec.model.source.uri", "Where the model is read from.", priority=1),
        column("Output", ".spec.output.uri", "Where the result is written.", priority=1),
        column("Attempt", ".status.attempt", "The current attempt; a child Job each.", "integer", priority=1),
        column("Message", f"{ready}.message", "What happened, and what to do about it.", priority=1),
    ]


def _mutable() -> str:
    return f"{', '.join(MUTABLE[:-1])} and {MUTABLE[-1]}"


def _add_rules(spec: Schema) -> None:
    """CEL for what a schema cannot say. One rule a field for immutability: it catches add, remove and change."""
    spec[RULES] = [
        {
            "rule": f"self.{name} == oldSelf.{name}"
            if name in spec["required"]
            else f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || self.{name} == oldSelf.{name})",
            "message": f"cannot change once the job exists; create another CompressionJob (only {_mutable()} may change)",
            "reason": "FieldValueForbidden",
            "fieldPath": f".{name}",
        }
        for name in spec["properties"]
        if name not in MUTABLE
    ]
    source, output = "self.model.source.uri", "self.output.uri"
    other_endpoint = f"{_server('self.model.source')} != {_server('self.output')}"
    for rule, message, path in (
        (f"{_canonical(source)} != {_canonical(output)}", "is the source itself; choose another prefix", ".output.uri"),
        (f"!{output}.startsWith({_folder(source)})", "lies inside the source; choose a prefix beside it", ".output.uri"),
        (f"!{source}.startsWith({_folder(output)})", "lies inside the output; choose another output.uri", ".model.source.uri"),
    ):
        spec[RULES].append({"rule": f"{other_endpoint} || {rule}", "message": message, "fieldPath": path})
    in_cluster = {
        "rule": "!self.uri.startsWith('file://')",
        "message": "file:// is one machine's disk; in a cluster use s3:// or pvc://",
        "fieldPath": ".uri",
    }
    writable = {
        "rule": "!self.uri.startsWith('hf://')",
        "message": "a hub is read-only here; use s3:// or pvc://",
        "fieldPath": ".uri",
    }
    one_name = {
        "rule": "!self.uri.split('/').exists(p, p == '..')",
        "message": "'..' gives one place two names; write the place that it leads to",
        "fieldPath": ".uri",
    }
    spec["properties"]["model"]["properties"]["source"][RULES] = [in_cluster, one_name]
    spec["properties"]["output"][RULES] = [in_cluster, writable, one_name]
    _add_data_rules(spec, [in_cluster, one_name])


def _add_data_rules(spec: Schema, of_sources: list[Schema]) -> None:
    """Calibration, evaluation and drift: where their data may be, one column each, and the limit that belongs to a gate's metric."""
    columns = "(has(self.field) ? 1 : 0) + (has(self.messages) ? 1 : 0) + (has(self.tokens) ? 1 : 0)"
    one_column = {"rule": f"{columns} <= 1", "message": "field, messages and tokens exclude each other; keep the one to be read"}
    plain = {
        "rule": f"!has(self.format) || self.format != 'text' || {columns} == 0",
        "message": "plain text has no columns; leave field, messages and tokens out, or correct format",
    }
    for section in ("calibration", "evaluation", "drift"):
        spec["properties"][section]["properties"]["dataset"][RULES] = [*of_sources, one_column, plain]
    gates = spec["properties"]["evaluation"]["properties"]["gates"]
    gates[RULES] = [
        {"rule": "self.all(g, self.exists_one(h, h.metric == g.metric))", "message": "a metric has one gate; keep the stricter one"}
    ]
    gates["items"][RULES] = [
        {
            "rule": f"self.metric != '{metric}' || (has(self.{right}) && !has(self.{wrong}))",
            "message": f"a gate on {metric} has {right} and not {wrong}",
        }
        for metric, right, wrong in (("perplexity", "maxIncrease", "maxKL"), ("kl", "maxKL", "maxIncrease"))
    ]
    spec[RULES].append(
        {
            "rule": "!has(self.drift) || has(self.calibration)",
            "message": "is measured from calibration, which is missing; add it",
            "fieldPath": ".drift",
        }
    )


def _server(location: str) -> str:
    """As `canonical_endpoint` of the models, which alone also know default ports."""
    return f"(has({location}.endpoint) ? {location}.endpoint.lowerAscii().split('/').filter(p, p != '') : [])"


def _canonical(uri: str) -> str:
    """As `canonical_uri` of the models: no trailing, doubled or dotted segments."""
    return f"{uri}.split('/').filter(p, p != '' && p != '.')"


def _folder(uri: str) -> str:
    """With one slash at its end. Odd spellings inside are left to the models: joining the segments is refused for its cost."""
    return f"({uri}.endsWith('/') ? {uri} : {uri} + '/')"


def _convert(node: Schema, definitions: Mapping[str, Schema], where: str, keep_unknown: bool) -> Schema:
    node = _resolve(node, definitions, where)
    if node.get("x-kubernetes-int-or-string"):
        return node
    unknown = set(node) - _KEPT - _READ
    if unknown:
        raise SchemaError(f"{where}: {', '.join(sorted(unknown))} has no place in a structural schema; state it otherwise")
    result = {key: value for key, value in node.items() if key in _KEPT and value is not None}
    _bound(result)
    if node.get("type") == "array":
        if "items" not in node:
            raise SchemaError(f"{where}: a list must say of what; type it list[...]")
        result["items"] = _convert(node["items"], definitions, f"{where}[]", keep_unknown)
        result["items"].pop("description", None)  # `kubectl explain` would show it in place of the list's own
    elif node.get("type") == "object":
        _convert_object(node, result, definitions, where, keep_unknown)
    elif "type" not in node:
        if not keep_unknown:
            raise SchemaError(f"{where}: has no type; the API server would prune it")
        result[PRESERVE] = True
    return result


def _convert_object(node: Schema, result: Schema, definitions: Mapping[str, Schema], where: str, keep_unknown: bool) -> None:
    extra = node.get("additionalProperties")
    if "properties" in node:
        result["properties"] = {
            name: _property(name, child, node, definitions, f"{where}.{name}", keep_unknown) for name, child in node["properties"].items()
        }
        if keep_unknown:
            result[PRESERVE] = True
    elif isinstance(extra, dict):
        result["additionalProperties"] = _convert(extra, definitions, f"{where}.*", keep_unknown)
        result.setdefault("maxProperties", _MAX_PROPERTIES)
    else:
        result[PRESERVE] = True


def _property(name: str, child: Schema, parent: Schema, definitions: Mapping[str, Schema], where: str, keep_unknown: bool) -> Schema:
    result = _convert(child, definitions, where, keep_unknown)
    if not result.get("description"):
        raise SchemaError(f"{where}: has no description; `kubectl explain` shows it, so give its Field one")
    absent_by_default = "default" in child or name in parent.get("required", ())
    if not absent_by_default and any("default" in p for p in result.get("properties", {}).values()):
        result["default"] = {}  # the API server fills in the defaults below it
    return result


def _resolve(node: Schema, definitions: Mapping[str, Schema], where: str) -> Schema:
    """`node` without $ref, allOf, const, `| None` and their default null; its own keys go before what it refers to."""
    node = dict(node)
    if "$ref" in node:
        target = definitions[node.pop("$ref").rpartition("/")[2]]
        return _resolve({**target, **node}, definitions, where)
    if len(node.get("allOf", ())) == 1:
        (only,) = node.pop("allOf")
        return _resolve({**only, **node}, definitions, where)
    if "anyOf" in node:
        choices = [c for c in node.pop("anyOf") if c.get("type") != "null"]
        if sorted(c.get("type", "") for c in choices) == ["integer", "string"]:
            return _int_or_string(choices, node)
        if len(choices) != 1:
            raise SchemaError(f"{where}: a choice of {len(choices)} types is not structural; use one, or int | str")
        return _resolve({**choices[0], **node}, definitions, where)
    if "const" in node:
        node["enum"] = [node.pop("const")]
    if "default" in node and node["default"] in (None, [], {}):
        del node["default"]
    node.pop("uniqueItems", None)
    return node


def _int_or_string(choices: list[Schema], node: Schema) -> Schema:
    string = next(c for c in choices if c["type"] == "string")
    kept = {k: v for k, v in {**string, **node}.items() if k in ("pattern", "maxLength", "description", "default")}
    kept.setdefault(*_FALLBACK["string"])
    return {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True, **kept}


def _bound(result: Schema) -> None:
    """Gives every string and list a maximum, integers their width, and OpenAPI 3.0's form to exclusive bounds."""
    if "enum" in result and result.get("type") == "string":
        result["maxLength"] = max(len(value) for value in result["enum"])
    elif result.get("type") in _FALLBACK:
        result.setdefault(*_FALLBACK[result["type"]])
    if result.get("type") == "integer":
        result["format"] = "int64"
    for bound in ("Minimum", "Maximum"):
        if f"exclusive{bound}" in result:
            result[bound.lower()] = result[f"exclusive{bound}"]
            result[f"exclusive{bound}"] = True
