"""From the pydantic models to the CustomResourceDefinitions: structural OpenAPI v3 schemas with CEL rules.

The root and every object under `spec` keep unknown names (`x-kubernetes-preserve-unknown-fields` beside typed properties): a
misspelt name that the API server prunes would silently mean the default, one that it keeps can be refused, by the
admission policy of the chart and by the operator.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from pydantic import BaseModel

from kompressor_api import names
from kompressor_api.datasets import LIMITS, RUNTIME_METRICS, CalibrationSpec
from kompressor_api.names import MUTABLE
from kompressor_api.recipe import RecipeSpec
from kompressor_api.said_once import Said, say_once
from kompressor_api.structural import PRESERVE, Schema, SchemaError, structural
from kompressor_api.target import TARGET_RULES
from kompressor_api.v1alpha1 import CompressionJobSpec, CompressionJobStatus

__all__ = ["SIZE_LIMIT", "SchemaError", "applied_bytes", "crd", "pass_schemas", "recipe_crds", "structural"]

SIZE_LIMIT = 262_144
"""Bytes; client-side `kubectl apply` stores the whole object in an annotation of at most this size."""

RULES = "x-kubernetes-validations"
HOMES = ("model", "calibration")
"""Sections that say everything themselves; others point to them."""

_IN_CLUSTER = {
    "rule": "!self.uri.startsWith('file://')",
    "message": "file:// is one machine's disk; in a cluster use s3:// or pvc://",
    "fieldPath": ".uri",
}
_ONE_NAME = {
    "rule": "!self.uri.split('/').exists(p, p == '..')",
    "message": "'..' gives one place two names; write the place that it leads to",
    "fieldPath": ".uri",
}
_WRITABLE = {
    "rule": "!self.uri.startsWith('hf://')",
    "message": "a hub is read-only here; use s3:// or pvc://",
    "fieldPath": ".uri",
}
_OF_GGUF = {
    "rule": "(has(self.format) && self.format == 'gguf') || (!has(self.name) && !has(self.maxFileBytes))",
    "message": "name and maxFileBytes are of GGUF; set format: gguf",
}
_COLUMNS = "[has(self.field), has(self.messages), has(self.tokens)].filter(c, c).size()"
_COLUMN_RULES = (
    {"rule": f"{_COLUMNS} < 2", "message": "field, messages and tokens exclude each other; keep the one to be read"},
    {
        "rule": f"!has(self.format) || self.format != 'text' || {_COLUMNS} == 0",
        "message": "plain text has no columns; leave field, messages and tokens out, or correct format",
    },
)
_NO_IDLE_PROCESSES = {
    "rule": f"has(self.recipeRef) || !has(self.worker) || (has(self.passes) && self.passes.exists(p, has(p.{names.TRAINING_PASS}))) || "
    "((!has(self.worker.parallelism) || self.worker.parallelism == 1) && "
    "(!has(self.worker.processesPerPod) || self.worker.processesPerPod == 1))",
    "message": f"parallelism and processesPerPod need the pass {names.TRAINING_PASS}, which alone trains in many processes; leave them out",
    "fieldPath": ".worker",
}


def applied_bytes(value: object) -> int:
    """Of the annotation in which client-side `kubectl apply` keeps an object: JSON without spaces, in which Go escapes <, > and &."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return len(text.encode()) + 5 * sum(map(text.count, "<>&"))


def pass_schemas(passes: Mapping[str, type[BaseModel]]) -> dict[str, Schema]:
    """Name of each pass to the structural schema of its parameters, in the order of their names. What calibration or a pass before says
    of a field of the same name is pointed to: the same in jobs and recipes, which both have these."""
    said: Said = {}
    say_once(structural(CalibrationSpec, "spec.calibration", keep_unknown=True), "calibration", said)
    schemas = {}
    for name in sorted(passes):
        where = f"spec.passes[].{name}"
        schemas[name] = structural(passes[name], where, keep_unknown=True)
        if not schemas[name].get("description"):
            raise SchemaError(f"{where}: {passes[name].__name__} has no docstring; `kubectl explain` shows its first lines")
        say_once(schemas[name], name, said)
    return schemas


def crd(passes: Mapping[str, type[BaseModel]]) -> Schema:
    """The CustomResourceDefinition of CompressionJob, with the parameters of `passes` inside. Raises SchemaError."""
    spec = structural(CompressionJobSpec, "spec", keep_unknown=True)
    said: Said = {}
    for section in HOMES:
        say_once(spec["properties"][section], section, said, keep=True)
    for section in (name for name in spec["properties"] if name not in (*HOMES, "passes")):
        say_once(spec["properties"][section], section, said)
    _add_passes(spec, passes)
    _add_rules(spec)
    if names.TRAINING_PASS in passes:
        spec[RULES].append(_NO_IDLE_PROCESSES)
    status = structural(CompressionJobStatus, "status", keep_unknown=False)
    say_once(status, "status", {})
    status["properties"]["conditions"] |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    # an empty status looks finished to kstatus; -1 equals no generation, so it looks unfinished until we have spoken
    status["default"] = {"observedGeneration": -1}
    return _definition(names.KIND, names.PLURAL, names.SHORT_NAME, "Namespaced", _version(spec, status))


def recipe_crds(passes: Mapping[str, type[BaseModel]]) -> tuple[Schema, Schema]:
    """CompressionRecipe and ClusterCompressionRecipe: one schema, two scopes. Raises SchemaError."""
    spec = structural(RecipeSpec, "spec", keep_unknown=True)
    _add_passes(spec, passes)
    spec["properties"]["calibration"]["properties"]["dataset"][RULES] = [_IN_CLUSTER, _ONE_NAME, *_COLUMN_RULES]
    _add_gate_rules(spec["properties"]["gates"])
    return (
        _definition(names.RECIPE_KIND, names.RECIPE_PLURAL, names.RECIPE_SHORT_NAME, "Namespaced", _recipe_version(spec)),
        _definition(
            names.CLUSTER_RECIPE_KIND, names.CLUSTER_RECIPE_PLURAL, names.CLUSTER_RECIPE_SHORT_NAME, "Cluster", _recipe_version(spec)
        ),
    )


def _definition(kind: str, plural: str, short: str, scope: str, version: Schema) -> Schema:
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP,
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
                "shortNames": [short],
                "categories": ["kompressor"],
            },
            "scope": scope,
            "versions": [version],
        },
    }


def _add_passes(spec: Schema, passes: Mapping[str, type[BaseModel]]) -> None:
    entry = spec["properties"]["passes"]["items"]
    del entry["additionalProperties"]
    entry |= {"properties": pass_schemas(passes), PRESERVE: True}


def _recipe_version(spec: Schema) -> Schema:
    root = {
        "type": "object",
        PRESERVE: True,
        "description": "Passes, calibration and gates for jobs that name it. A job reads it once, when it starts.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"Version of this API: {names.API_VERSION}."},
            "kind": {"type": "string", "description": "Kind of this resource."},
            "metadata": {"type": "object"},
            "spec": {**spec, "description": "What jobs take from it. A change reaches jobs that start later, none that has started."},
        },
    }
    age = {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}
    return {
        "name": names.VERSION,
        "served": True,
        "storage": True,
        "additionalPrinterColumns": [age],
        "schema": {"openAPIV3Schema": root},
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

    def column(name: str, path: str, kind: str = "string", priority: int = 0) -> Schema:
        return {"name": name, "type": kind, "jsonPath": path, **({"priority": priority} if priority else {})}

    return [
        column("Ready", f"{ready}.status"),
        column("Status", f"{ready}.reason"),
        column("Progress", ".status.progress.percent", "integer"),
        column("Ratio", ".status.result.ratio"),
        column("Age", ".metadata.creationTimestamp", "date"),
        column("Source", ".spec.model.source.uri", priority=1),
        column("Output", ".spec.output.uri", priority=1),
        column("Attempt", ".status.attempt", "integer", priority=1),
        column("Message", f"{ready}.message", priority=1),
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
            "message": f"cannot change once the job exists; create another (only {_mutable()} may change)",
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
    spec[RULES].append(
        {
            "rule": "[has(self.passes), has(self.recipeRef), has(self.target)].exists_one(given, given)",
            "message": "give either passes, recipeRef or target, exactly one of them",
            "fieldPath": ".passes",
        }
    )
    _add_target_rules(spec)
    spec["properties"]["model"]["properties"]["source"][RULES] = [_IN_CLUSTER, _ONE_NAME]
    spec["properties"]["output"][RULES] = [_IN_CLUSTER, _WRITABLE, _ONE_NAME, _OF_GGUF]
    _add_data_rules(spec)


def _add_target_rules(spec: Schema) -> None:
    spec["properties"]["target"][RULES] = [{"rule": rule, "message": message} for rule, message in TARGET_RULES]
    elsewhere = "(has(self.target.device) || has(self.target.memory) || self.target.?engine.orValue('') == 'llama.cpp')"
    spec[RULES] += [
        {
            "rule": f"!has(self.target) || {elsewhere} == (self.output.format == 'gguf')",
            "message": "llama.cpp (any device) serves output.format gguf, vllm compressed-tensors",
            "fieldPath": ".target",
        },
        {
            "rule": "!has(self.target) || has(self.evaluation)",
            "message": "target.maxPerplexityIncrease is measured on evaluation, which is missing; add held-out data",
            "fieldPath": ".target",
        },
        {
            "rule": "!has(self.target) || !has(self.evaluation) || !has(self.evaluation.gates) || "
            "!self.evaluation.gates.exists(g, g.metric == 'perplexity')",
            "message": "evaluation has a gate on perplexity beside target.maxPerplexityIncrease; say it once, in the target",
            "fieldPath": ".target",
        },
    ]


def _add_data_rules(spec: Schema) -> None:
    """Calibration, evaluation and drift: where their data may be, one column each, and the limit that belongs to a gate's metric."""
    for section in ("calibration", "evaluation", "drift"):
        spec["properties"][section]["properties"]["dataset"][RULES] = [_IN_CLUSTER, _ONE_NAME, *_COLUMN_RULES]
    evaluation = spec["properties"]["evaluation"]
    _add_gate_rules(evaluation["properties"]["gates"])
    evaluation[RULES] = [
        {
            "rule": f"has(self.runtime) || !has(self.gates) || !self.gates.exists(g, g.metric == '{metric}')",
            "message": f"a gate on {metric} needs evaluation.runtime, which measures it",
        }
        for metric in RUNTIME_METRICS
    ]
    evaluation["properties"]["runtime"]["properties"]["batch"][RULES] = [
        {"rule": "self.all(a, self.exists_one(b, a == b))", "message": "names a batch size twice; name each once"}
    ]
    spec[RULES].append(
        {
            "rule": "!has(self.drift) || has(self.calibration) || has(self.recipeRef)",
            "message": "is measured from calibration, which is missing; add it",
            "fieldPath": ".drift",
        }
    )


def _add_gate_rules(gates: Schema) -> None:
    gates[RULES] = [
        {"rule": "self.all(g, self.exists_one(h, h.metric == g.metric))", "message": "a metric has one gate; keep the stricter one"}
    ]
    gates["items"][RULES] = [
        {
            "rule": f"self.metric != '{metric}' || (has(self.{right}) && "
            + " && ".join(f"!has(self.{wrong})" for wrong in LIMITS.values() if wrong != right)
            + ")",
            "message": f"a gate on {metric} has {right} and no other limit",
        }
        for metric, right in LIMITS.items()
    ]


def _server(location: str) -> str:
    """As `canonical_endpoint` of the models, which alone also know default ports."""
    return f"(has({location}.endpoint) ? {location}.endpoint.lowerAscii().split('/').filter(p, p != '') : [])"


def _canonical(uri: str) -> str:
    """As `canonical_uri` of the models: no trailing, doubled or dotted segments."""
    return f"{uri}.split('/').filter(p, p != '' && p != '.')"


def _folder(uri: str) -> str:
    """With one slash at its end. Odd spellings inside are left to the models: joining the segments is refused for its cost."""
    return f"({uri}.endsWith('/') ? {uri} : {uri} + '/')"
