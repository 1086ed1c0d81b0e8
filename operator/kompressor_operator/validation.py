"""Is the spec usable? The models of the API say so, plus what only a cluster cares about. Pure; messages say where, what and how else.

The API server keeps misspelt names (it would otherwise drop them silently), so they are refused here.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from kompressor_api import names
from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_operator.observed import Manifest
from kompressor_operator.pod_template import misshapen

PassParameters = Mapping[str, Sequence[str]]
"""Pass name -> names of its parameters; empty if the generated file is not there."""

SHOWN = 5
"""Problems listed in one message."""

Location = tuple[str | int, ...]
"""Where something stands in the resource: ("spec", "passes", 0, "rtn")."""

UNION_MEMBERS = frozenset({"int", "str", "float", "bool", "constrained-str"})
"""What pydantic adds to the place of a value that fits no member of a union."""


@dataclass(frozen=True)
class Problem:
    path: str
    text: str
    unknown: Location | None = None
    """If it is that we do not know this name: where it stands."""

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


@cache
def known_passes() -> PassParameters:
    """The generated table, part of the distribution; without it passes are checked by the worker alone."""
    table = resources.files("kompressor_api").joinpath("pass_parameters.json")
    return json.loads(table.read_text()) if table.is_file() else {}


def problems_of(spec: Manifest, passes: PassParameters, beside: Mapping[str, Any] | None = None) -> list[Problem]:
    """All that is wrong with the spec, and with what stands `beside` it."""
    found = [*_stray_problems(beside or {}), *_model_problems(spec), *_pass_problems(spec, passes), *_cluster_problems(spec)]
    return [*found, *_template_problems(spec)]


def merely_unknown(problems: Sequence[Problem]) -> tuple[Location, ...]:
    """Where the names stand that we do not know, if nothing else is wrong."""
    places = tuple(problem.unknown for problem in problems if problem.unknown is not None)
    return places if len(places) == len(problems) else ()


def told(problems: Sequence[Problem]) -> str:
    """In one message; empty if there are none."""
    if not problems:
        return ""
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    listed = "; ".join(str(problem) for problem in problems[:SHOWN])
    return f"{listed}{more}. The spec cannot be changed: correct the manifest, delete this CompressionJob and apply again."


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """The nearest neighbour of a misspelt name, or all names if none is near."""
    choices = sorted(known)
    folded = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(wrong.lower(), folded, n=1, cutoff=0.6)
    if near:
        return f"did you mean {folded[near[0]]}?"
    return f"known are {', '.join(choices)}" if choices else "nothing is known here"


def _stray_problems(beside: Mapping[str, Any]) -> Iterable[Problem]:
    for name, value in sorted(beside.items()):
        hint = "it belongs under spec" if name in field_names(()) else did_you_mean(name, [*names.TOP_LEVEL, *field_names(())])
        yield Problem(name, f"unknown field beside spec (value {_short(value)}); {hint}", unknown=(name,))


def _model_problems(spec: Manifest) -> list[Problem]:
    try:
        CompressionJobSpec.model_validate(spec)
    except ValidationError as error:
        found = [_problem(details) for details in error.errors(include_url=False)]
        return list({problem.path: problem for problem in found}.values())  # one a place: a union complains once a member
    return []


def _problem(details: Mapping[str, Any]) -> Problem:
    location: Location = details["loc"]
    if details["type"] not in ("extra_forbidden", "missing") and location and location[-1] in UNION_MEMBERS:
        location = location[:-1]
    path, value = dotted("spec", location), _short(details.get("input"))
    if details["type"] == "extra_forbidden":
        hint = did_you_mean(str(location[-1]), field_names(location[:-1]))
        return Problem(path, f"unknown field (value {value}); {hint}", unknown=("spec", *location))
    if details["type"] == "missing":
        return Problem(path, "is required")
    if details["type"] == "value_error":
        return Problem(path, str(details["msg"]).removeprefix("Value error, "))
    if details["type"] == "string_pattern_mismatch" and (field := _field_at(location)):
        return Problem(path, f"{value} is not valid; it is: {(field.description or '').rstrip('.')}")
    return Problem(path, f"{value} is not valid: {details['msg']}")


def _pass_problems(spec: Manifest, known: PassParameters) -> Iterable[Problem]:
    entries = spec.get("passes")
    for index, entry in enumerate(entries if isinstance(entries, list) and known else ()):
        for name, parameters in entry.items() if isinstance(entry, dict) else ():
            path = f"spec.passes[{index}].{name}"
            if name not in known:
                yield Problem(path, f"unknown pass; {did_you_mean(name, known)}", unknown=("spec", "passes", index, name))
                continue  # its parameters cannot be judged
            for key in sorted(set(parameters) - set(known[name])) if isinstance(parameters, dict) else ():
                text = f"unknown parameter (value {_short(parameters[key])}); {did_you_mean(key, known[name])}"
                yield Problem(f"{path}.{key}", text, unknown=("spec", "passes", index, name, key))


def _cluster_problems(spec: Manifest) -> Iterable[Problem]:
    """file:// is a path on a laptop; in a cluster it would be one inside a pod, and lost with it."""
    places = [("model", "source"), ("output",), *((section, "dataset") for section in ("calibration", "evaluation", "drift"))]
    for place in places:
        uri: Any = spec
        for name in (*place, "uri"):
            uri = uri.get(name) if isinstance(uri, dict) else None
        if isinstance(uri, str) and uri.startswith("file://"):
            yield Problem(
                f"spec.{'.'.join(place)}.uri", f"{uri} cannot be used in a cluster; use s3:// or pvc://, or run `kompressor run` locally"
            )


def _template_problems(spec: Manifest) -> Iterable[Problem]:
    """What the API server cannot judge, since it never sees it: the rest is its own to say, in a dry run."""
    worker = spec.get("worker")
    template = worker.get("podTemplate") if isinstance(worker, dict) else None
    if isinstance(template, dict) and (problem := misshapen(template)):
        path, _, text = problem.partition(": ")
        yield Problem(f"spec.worker.podTemplate.{path}", text)


def dotted(root: str, location: Sequence[str | int]) -> str:
    """("passes", 0, "rtn") -> spec.passes[0].rtn"""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return root + "".join(parts)


def field_names(location: Sequence[str | int]) -> list[str]:
    """What may stand at this place of the spec, on the wire."""
    field = _field_at(location)
    model = _model_of(field) if field else None if location else CompressionJobSpec
    return [f.alias or "" for f in model.model_fields.values()] if model else []


def _field_at(location: Sequence[str | int]) -> FieldInfo | None:
    """The field of the models at this place; None at the top, and inside of what is a plain map."""
    model: type[BaseModel] | None = CompressionJobSpec
    field: FieldInfo | None = None
    for part in location:
        if isinstance(part, str):
            field = next((f for f in model.model_fields.values() if f.alias == part), None) if model else None
            model = _model_of(field) if field else None
    return field


def _model_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model inside of `X`, `X | None`, `list[X]`, or of a plain dict that is checked as one."""
    found: list[Any] = [*field.metadata, field.annotation]
    while found:
        part = found.pop(0)
        part = getattr(part, "model", part) if not isinstance(part, type) else part
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
        found.extend([*getattr(part, "__metadata__", ()), *get_args(part)])
    return None


def _short(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
