"""The manifest that a worker is given: the same file on a laptop and in a cluster."""

from __future__ import annotations

import difflib
import json
import os
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from kompressor_api.names import API_VERSION, ENV_POD_UID, KIND
from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker.errors import UserError


@dataclass(frozen=True)
class Job:
    name: str
    namespace: str
    uid: str
    spec: CompressionJobSpec
    owner: str
    """Who claims the output: the pod's uid, or this process."""

    @property
    def identity(self) -> dict[str, Any]:
        """Which job made a result, and what it was asked to do; goes into kompressor.json."""
        spec = self.spec.model_dump(by_alias=True, exclude_none=True, include={"passes"})
        who = {"name": self.name, "namespace": self.namespace, "uid": self.uid}
        output = self.spec.output
        stored = {} if output.sparse_storage == "dense" else {"sparseStorage": output.sparse_storage}
        return {**who, "passes": spec["passes"], "format": output.format, **of_the_file(self.spec), **stored}


def of_the_file(spec: CompressionJobSpec) -> dict[str, Any]:
    """What is asked of the name and size of the files, if anything is."""
    return spec.output.model_dump(by_alias=True, exclude_none=True, include={"name", "max_file_bytes"})


def load_job(path: Path, environ: Mapping[str, str]) -> Job:
    """Reads and validates a manifest, YAML or JSON. Raises UserError that names the field, the value and the nearest right name."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a CompressionJob manifest") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not text ({error}); give the path of a CompressionJob manifest") from error
    manifest = parse(path, text)
    if manifest.get("kind") != KIND or manifest.get("apiVersion") != API_VERSION:
        raise UserError(f"{path}: is {manifest.get('apiVersion')} {manifest.get('kind')}; expected apiVersion: {API_VERSION}, kind: {KIND}")
    metadata = manifest.get("metadata") or {}
    if not isinstance(metadata, dict) or not all(isinstance(metadata.get(k, ""), str) for k in ("name", "namespace", "uid")):
        raise UserError(f"{path}: metadata must be a mapping whose name is a string (got {metadata!r})")
    unknown = sorted(set(manifest) - {"apiVersion", "kind", "metadata", "spec", "status"})
    if unknown:
        raise UserError(f"{path}: {unknown[0]!r} is not a field of {KIND}; fields of the job go under spec:")
    owner = environ.get(ENV_POD_UID) or f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return Job(
        name=metadata.get("name", path.stem),
        namespace=metadata.get("namespace", ""),
        uid=metadata.get("uid", ""),
        spec=validate_spec(manifest.get("spec"), str(path)),
        owner=owner,
    )


def parse(path: Path, text: str) -> dict[str, Any]:
    if path.suffix == ".json":
        try:
            loaded = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: is not JSON: {error}; correct it, or name the file .yaml if it is YAML") from error
    else:
        import yaml

        try:
            documents = [d for d in yaml.safe_load_all(text) if d]
        except yaml.YAMLError as error:
            raise UserError(f"{path}: is not YAML: {error}") from error
        jobs = [d for d in documents if isinstance(d, dict) and d.get("kind") == KIND]
        if len(jobs) != 1:
            raise UserError(f"{path}: holds {len(jobs)} CompressionJobs; exactly one can be run")
        loaded = jobs[0]
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: is not a manifest")
    return loaded


def validate_spec(spec: Any, where: str) -> CompressionJobSpec:
    """The spec as its pydantic model; every error of it in one message."""
    try:
        valid = CompressionJobSpec.model_validate(spec if spec is not None else {})
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_explain(e) for e in error.errors())) from error
    if valid.recipe_ref is not None:
        raise UserError(f"{where}: spec.recipeRef: a recipe ({valid.recipe_ref.name}) needs a cluster; write its passes into spec.passes")
    return valid


def _explain(error: Any) -> str:
    path = "spec." + ".".join(str(p) for p in error["loc"]) if error["loc"] else "spec"
    if error["type"] == "extra_forbidden":
        known = _known(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        return f"{path}: is not a field; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")
    value = "" if isinstance(error["input"], dict) else f" (got {error['input']!r})"
    return f"{path}: {error['msg'].removeprefix('Value error, ')}{value}"


def _known(location: tuple[str | int, ...]) -> list[str]:
    """The field names of the model at a location of the spec."""
    model: type[BaseModel] = CompressionJobSpec
    for step in location:
        for name, f in model.model_fields.items():
            inside = [f.annotation, *get_args(f.annotation)]  # X, X | None, list[X]
            below = next((t for t in inside if isinstance(t, type) and issubclass(t, BaseModel)), None)
            if step in (name, f.alias) and below is not None:
                model = below
                break
    return [f.alias or name for name, f in model.model_fields.items()]
