"""Is the spec usable? The models of the API say so, plus what only a cluster cares about. Pure; messages say where, what and how else.

The API server keeps misspelt names inside a pass (it would otherwise drop them silently), so they are refused here.
"""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_operator.observed import Manifest

PassParameters = Mapping[str, Sequence[str]]
"""Pass name -> names of its parameters; empty if the generated file is not there."""

SHOWN = 5
"""Problems listed in one message."""


@dataclass(frozen=True)
class Problem:
    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


@cache
def known_passes() -> PassParameters:
    """The generated table, part of the distribution; without it passes are checked by the worker alone."""
    table = resources.files("kompressor_api").joinpath("pass_parameters.json")
    return json.loads(table.read_text()) if table.is_file() else {}


def invalid(spec: Manifest, passes: PassParameters) -> str:
    """All that is wrong with the spec, in one message; empty if nothing is."""
    problems = [*_model_problems(spec), *_pass_problems(spec, passes), *_cluster_problems(spec)]
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


def _model_problems(spec: Manifest) -> list[Problem]:
    try:
        CompressionJobSpec.model_validate(spec)
    except ValidationError as error:
        return [_problem(spec, details) for details in error.errors(include_url=False)]
    return []


def _problem(spec: Manifest, details: Mapping[str, Any]) -> Problem:
    location: tuple[str | int, ...] = details["loc"]
    path, value = dotted("spec", location), _short(details.get("input"))
    if details["type"] == "extra_forbidden":
        names = field_names(location[:-1])
        return Problem(path, f"unknown field (value {value}); {did_you_mean(str(location[-1]), names)}")
    if details["type"] == "missing":
        return Problem(path, "is required")
    text = str(details["msg"]).removeprefix("Value error, ")
    return Problem(path, text if details["type"] == "value_error" else f"{value} is not valid: {text}")


def _pass_problems(spec: Manifest, known: PassParameters) -> Iterable[Problem]:
    entries = spec.get("passes")
    for index, entry in enumerate(entries if isinstance(entries, list) and known else ()):
        for name, parameters in entry.items() if isinstance(entry, dict) else ():
            path = f"spec.passes[{index}].{name}"
            if name not in known:
                yield Problem(path, f"unknown pass; {did_you_mean(name, known)}")
                continue  # its parameters cannot be judged
            for key in sorted(set(parameters) - set(known[name])) if isinstance(parameters, dict) else ():
                hint = did_you_mean(key, known[name])
                yield Problem(f"{path}.{key}", f"unknown parameter (value {_short(parameters[key])}); {hint}")


def _cluster_problems(spec: Manifest) -> Iterable[Problem]:
    """file:// is a path on a laptop; in a cluster it would be one inside a pod, and lost with it."""
    model, output = spec.get("model"), spec.get("output")
    source = model.get("source") if isinstance(model, dict) else None
    for path, location in (("spec.model.source.uri", source), ("spec.output.uri", output)):
        uri = location.get("uri") if isinstance(location, dict) else None
        if isinstance(uri, str) and uri.startswith("file://"):
            yield Problem(path, f"{uri} cannot be used in a cluster; use s3:// or pvc://, or run `kompressor run` locally")


def dotted(root: str, location: Sequence[str | int]) -> str:
    """("passes", 0, "rtn") -> spec.passes[0].rtn"""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return root + "".join(parts)


def field_names(location: Sequence[str | int]) -> list[str]:
    """What may stand at this place of the spec, on the wire."""
    model: type[BaseModel] | None = CompressionJobSpec
    for part in location:
        model = _model_of(next((f.annotation for f in _fields(model) if f.alias == part), None))
    return [f.alias or "" for f in _fields(model)]


def _fields(model: type[BaseModel] | None) -> Iterable[Any]:
    return model.model_fields.values() if model else ()


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The model inside `X` or `X | None`."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next((m for a in get_args(annotation) if (m := _model_of(a))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _short(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
