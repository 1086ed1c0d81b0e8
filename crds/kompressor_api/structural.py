"""From pydantic models to structural OpenAPI v3 schemas, as a CustomResourceDefinition holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from kompressor_api.fields import UNSTORED

__all__ = ["PRESERVE", "Schema", "SchemaError", "structural"]

Schema = dict[str, Any]

PRESERVE = "x-kubernetes-preserve-unknown-fields"

_KEPT = {"type", "description", "default", "enum", "format", "pattern", "minimum", "maximum", "exclusiveMinimum"}
_KEPT |= {"exclusiveMaximum", "multipleOf", "minLength", "maxLength", "minItems", "maxItems"}
_KEPT |= {"minProperties", "maxProperties", "required"}
_READ = {"title", "properties", "items", "additionalProperties", "propertyNames", "examples", "$defs"}
"""Understood, but not copied; a structural schema cannot bound the keys of a map."""

_FALLBACK = {"string": ("maxLength", 1024), "array": ("maxItems", 256)}
"""The maximum of a string or list that names none; CEL is priced by maxima, and an object in etcd has one anyway."""
_MAX_PROPERTIES = 64
_WIDE = 1 << 31


class SchemaError(ValueError):
    """A model that the API server would not take, or `kubectl explain` not explain."""


def structural(model: type[BaseModel], where: str, *, keep_unknown: bool) -> Schema:
    """The structural schema of `model`; `where` (such as `spec`) names it in errors. Raises SchemaError."""
    document = model.model_json_schema(by_alias=True)
    return _convert(document, document.get("$defs", {}), where, keep_unknown)


def _convert(node: Schema, definitions: Mapping[str, Schema], where: str, keep_unknown: bool) -> Schema:
    node = _resolve(node, definitions, where)
    if node.pop(UNSTORED, False):
        node["description"] = f"{node.get('description', '')} Default: {node.pop('default')}."
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
    kept = {k: v for k, v in {**string, **node}.items() if k in ("pattern", "maxLength", "description", "default", UNSTORED)}
    kept.setdefault(*_FALLBACK["string"])
    return {"x-kubernetes-int-or-string": True, **kept}


def _bound(result: Schema) -> None:
    """Gives every string and list a maximum (an enum is one), integers their width where they may need it, and OpenAPI 3.0's form to
    exclusive bounds."""
    if "enum" in result and result.get("type") == "string":
        result.pop("maxLength", None)
    elif result.get("type") in _FALLBACK:
        result.setdefault(*_FALLBACK[result["type"]])
    if result.get("type") == "integer" and result.get("maximum", _WIDE) >= _WIDE:
        result["format"] = "int64"
    for bound in ("Minimum", "Maximum"):
        if f"exclusive{bound}" in result:
            result[bound.lower()] = result[f"exclusive{bound}"]
            result[f"exclusive{bound}"] = True
