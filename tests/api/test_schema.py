"""The generated CRD: structural, described, bounded, small, up to date; and what the generator refuses to generate."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, Field

from generate_crds import generate, passes_of_worker, stale
from kompressor_api import names
from kompressor_api.fields import UNSTORED
from kompressor_api.names import MUTABLE
from kompressor_api.schema import SIZE_LIMIT, SchemaError, applied_bytes, crd, structural
from kompressor_api.v1alpha1 import CompressionJobSpec, Model, Progress, Result, StatusCondition

ROOT = Path(__file__).resolve().parents[2]
DEFINITION: dict[str, Any] = yaml.safe_load((ROOT / "crds" / "compressionjobs.yaml").read_text())
(VERSION,) = DEFINITION["spec"]["versions"]
FIELDS = VERSION["schema"]["openAPIV3Schema"]["properties"]


def nodes(node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema below and including `node`, with its path."""
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for key, suffix in (("items", "[]"), ("additionalProperties", ".*")):
        if isinstance(node.get(key), dict):
            yield from nodes(node[key], path + suffix)


RECIPES: list[dict[str, Any]] = [
    yaml.safe_load((ROOT / "crds" / f"{name}.yaml").read_text()) for name in ("compressionrecipes", "clustercompressionrecipes")
]
OF_RECIPES = [d["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"] for d in RECIPES]
ALL = [*nodes(FIELDS["spec"], "spec"), *nodes(FIELDS["status"], "status"), *nodes(OF_RECIPES[0], "spec of a recipe")]


def test_every_field_is_described() -> None:
    bare = [path for path, node in ALL if not node.get("description") and not path.endswith(("[]", ".*"))]
    assert bare == []


def test_every_string_list_and_map_has_a_maximum() -> None:
    def bounded(node: dict[str, Any]) -> bool:
        if node.get("x-kubernetes-int-or-string") or node.get("type") == "string":
            return "maxLength" in node or "enum" in node
        if node.get("type") == "array":
            return "maxItems" in node
        return "additionalProperties" not in node or "maxProperties" in node

    assert [path for path, node in ALL if not bounded(node)] == []


def test_every_object_of_the_spec_keeps_unknown_names() -> None:
    objects = [(path, node) for path, node in ALL if path.startswith("spec") and "properties" in node]
    assert len(objects) > 10
    assert [path for path, node in objects if node.get("x-kubernetes-preserve-unknown-fields") is not True] == []


def test_so_does_what_stands_beside_it() -> None:
    root = VERSION["schema"]["openAPIV3Schema"]
    assert root["x-kubernetes-preserve-unknown-fields"] is True
    assert set(root["properties"]) == set(names.TOP_LEVEL)


def test_only_structural_keywords_are_left() -> None:
    foreign = {"$ref", "$defs", "title", "anyOf", "allOf", "const", "uniqueItems", "examples", "propertyNames"}
    found = [path for path, node in ALL if foreign & set(node)]
    assert found == []
    assert all("type" in node or node.get("x-kubernetes-int-or-string") for _, node in ALL)


def test_integers_are_wide() -> None:
    """Those that may need it: for clients that make 32 bits of what has no format."""
    integers = [(path, node) for path, node in ALL if node.get("type") == "integer"]
    assert [path for path, node in integers if node.get("format") != "int64" and not node.get("maximum", 1 << 31) < 1 << 31] == []
    assert {node.get("format") for _, node in integers} <= {None, "int64"}


def test_size_leaves_room_for_fifty_passes() -> None:
    """One of them in twenty as large as ten of the others; half of the room is for whatever else comes."""
    passes = FIELDS["spec"]["properties"]["passes"]["items"]["properties"]
    average = applied_bytes(passes) // len(passes)
    assert applied_bytes(DEFINITION) + (50 - len(passes)) * average < SIZE_LIMIT // 2


def test_what_is_said_elsewhere_is_to_be_found_there() -> None:
    """Where a description says where else it stands, the field of the same name there says it itself."""
    pointers = 0
    for known in (ALL, [*nodes(OF_RECIPES[0], "spec")]):
        texts = {path.replace("[]", ""): node.get("description", "") for path, node in known}
        for path, text in texts.items():
            if pointed := re.fullmatch(r"As in (\S+)\.", text):
                name = path.rpartition(".")[2]
                places = (f"{pointed[1]}.{name}", f"spec.{pointed[1]}.{name}", f"spec.passes.{pointed[1]}.{name}")
                (there,) = [texts[place] for place in places if place in texts]
                assert not there.startswith("As in "), path
                pointers += 1
    assert pointers > 50
    assert not any(text.startswith("As in ") for path, text in texts.items() if path.startswith("spec.calibration"))


def test_size_is_what_kubectl_stores() -> None:
    """Go's encoder: no spaces, and three characters that it escapes."""
    stored = r'{"rule":"a \u0026\u0026 b \u003c c","of":[1,true,"ä"]}'
    assert applied_bytes({"rule": "a && b < c", "of": [1, True, "ä"]}) == len(stored.encode())


def test_status_speaks_kstatus() -> None:
    status = FIELDS["status"]
    assert status["default"] == {"observedGeneration": -1}
    conditions = status["properties"]["conditions"]
    assert conditions["x-kubernetes-list-type"] == "map"
    assert conditions["x-kubernetes-list-map-keys"] == ["type"]
    fields = {name: set(status["properties"][name]["properties"]) for name in ("progress", "result")}
    assert fields == {"progress": set(Progress.model_fields), "result": set(Result.model_fields)}
    assert set(conditions["items"]["properties"]) == set(StatusCondition.model_fields)


def test_one_immutability_rule_for_every_field_that_may_not_change() -> None:
    ruled = [r["fieldPath"] for r in FIELDS["spec"]["x-kubernetes-validations"] if "oldSelf" in r["rule"]]
    everything = {field.alias for field in CompressionJobSpec.model_fields.values()}
    assert set(MUTABLE) < everything
    assert sorted(ruled) == sorted(f".{name}" for name in everything - set(MUTABLE))


def test_columns() -> None:
    columns = {c["name"]: c for c in VERSION["additionalPrinterColumns"]}
    assert [name for name, c in columns.items() if "priority" not in c] == ["Ready", "Status", "Progress", "Ratio", "Age"]
    assert all("conditions[-1]" not in c["jsonPath"] for c in columns.values())
    assert DEFINITION["spec"]["names"]["shortNames"] == ["kcj"], "cj is CronJob's"
    assert "all" not in DEFINITION["spec"]["names"]["categories"]


def test_both_recipes_are_one_schema_in_two_scopes() -> None:
    assert OF_RECIPES[0] == OF_RECIPES[1]
    assert [(d["spec"]["scope"], d["spec"]["names"]["shortNames"]) for d in RECIPES] == [("Namespaced", ["kcr"]), ("Cluster", ["kccr"])]
    job = FIELDS["spec"]["properties"]
    of_recipe = OF_RECIPES[0]["properties"]
    assert of_recipe["passes"]["items"] == job["passes"]["items"] and "passes" in OF_RECIPES[0]["required"]
    assert of_recipe["calibration"]["properties"] == job["calibration"]["properties"]
    assert of_recipe["gates"]["items"] == job["evaluation"]["properties"]["gates"]["items"]
    assert of_recipe["gates"]["x-kubernetes-validations"] == job["evaluation"]["properties"]["gates"]["x-kubernetes-validations"]


# -- the generator


def test_generated_files_are_up_to_date() -> None:
    assert stale(generate(passes_of_worker()), ROOT) == ""


def test_generation_is_deterministic_and_without_torch() -> None:
    program = "import generate_crds as g, sys, hashlib; text = str(g.generate(g.passes_of_worker()));"
    program += "assert 'torch' not in sys.modules; print(hashlib.sha256(text.encode()).hexdigest())"
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT / "tools", env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]


def test_stale_files_are_shown_as_a_diff(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old\nsame\n")
    assert stale({"a": "new\nsame\n"}, tmp_path).splitlines()[2:] == ["@@ -1,2 +1,2 @@", "-old", "+new", " same"]
    assert stale({"a": "old\nsame\n"}, tmp_path) == ""
    assert "+new" in stale({"missing": "new\n"}, tmp_path)


def of_the_release_before() -> dict[str, Any]:
    """Its CRD's schema of the spec."""
    with tarfile.open(ROOT / "tests/e2e/previous/kompressor-0.1.0.tgz") as chart:
        file = chart.extractfile("kompressor/files/compressionjobs.yaml")
        assert file is not None
        (version,) = yaml.safe_load(file)["spec"]["versions"]
    spec: dict[str, Any] = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return spec


def unheard_of(now: dict[str, Any], then: dict[str, Any], path: str) -> Iterator[str]:
    """Fields that the API server writes into objects which an older operator may meet. What is in a field that only a user can have written
    is theirs."""
    for name, child in now.get("properties", {}).items():
        if name in then.get("properties", {}):
            yield from unheard_of(child, then["properties"][name], f"{path}.{name}")
        elif "default" in child:
            yield f"{path}.{name}"
    for inside in ("items", "additionalProperties"):
        if isinstance(now.get(inside), dict):
            yield from unheard_of(now[inside], then.get(inside, {}), f"{path}[]")


def test_no_default_is_a_name_that_the_release_before_does_not_know() -> None:
    assert list(unheard_of(FIELDS["spec"], of_the_release_before(), "spec")) == []
    with_one = json.loads(json.dumps(FIELDS["spec"]))
    with_one["properties"]["output"]["properties"]["sparseStorage"]["default"] = "dense"
    assert list(unheard_of(with_one, of_the_release_before(), "spec")) == ["spec.output.sparseStorage"]


class Wide(Model):
    """A pass with every kind of parameter."""

    rate: float = Field(gt=0, le=1, description="A number.")
    mode: Literal["a", "bcd"] = Field(default="a", description="A choice.")
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, description="A list.")
    names: dict[str, str] = Field(default_factory=dict, description="A map.")
    either: int | str = Field(default=1, description="A choice of two types.")
    free: dict[str, Any] = Field(default_factory=dict, description="Anything.")
    late: int | str = Field(default="5%", description="Younger than a release.", json_schema_extra={UNSTORED: True})


def test_every_kind_of_parameter() -> None:
    schema = structural(Wide, "spec.passes[].wide", keep_unknown=True)
    fields = schema["properties"]
    described = {name: {k: v for k, v in field.items() if k != "description"} for name, field in fields.items()}
    assert described == {
        "rate": {"type": "number", "minimum": 0, "exclusiveMinimum": True, "maximum": 1},
        "mode": {"type": "string", "enum": ["a", "bcd"], "default": "a"},
        "layers": {"type": "array", "maxItems": 256, "items": {"type": "integer", "format": "int64", "minimum": 0}},
        "names": {"type": "object", "maxProperties": 64, "additionalProperties": {"type": "string", "maxLength": 1024}},
        "either": {"x-kubernetes-int-or-string": True, "maxLength": 1024, "default": 1},
        "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        "late": {"x-kubernetes-int-or-string": True, "maxLength": 1024},
    }
    assert fields["late"]["description"] == "Younger than a release. Default: 5%."
    entry = crd({"wide": Wide})["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["passes"]
    assert entry["items"]["maxProperties"] == entry["items"]["minProperties"] == 1
    assert entry["items"]["properties"]["wide"]["description"] == "A pass with every kind of parameter."


class Mute(BaseModel):
    silent: int


class Torn(BaseModel):
    either: int | bool = Field(description="A choice that no CRD can make.")


class Bare(Model):
    scheme: str = Field(description="A class without a docstring.")


@pytest.mark.parametrize(
    ("model", "where"), [(Mute, "spec.passes[].x.silent: has no description"), (Torn, "spec.passes[].x.either: a choice of 2")]
)
def test_what_cannot_be_explained_is_refused(model: type[BaseModel], where: str) -> None:
    with pytest.raises(SchemaError) as refused:
        structural(model, "spec.passes[].x", keep_unknown=True)
    assert where in str(refused.value)


def test_a_pass_without_a_docstring_is_refused() -> None:
    with pytest.raises(SchemaError, match=r"spec\.passes\[\]\.bare: Bare has no docstring"):
        crd({"bare": Bare})
