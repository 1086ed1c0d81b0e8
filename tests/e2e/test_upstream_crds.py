"""What is shipped for Prometheus, Flux and Argo CD, applied to a real API server with the CRDs that those projects publish.

Strictly: a field that a CRD does not know is an error, where Helm and most clients let it be dropped.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_chart_monitoring import ON, Render
from test_chart_values import Manifest, of_kind, render, sets  # noqa: F401  (a fixture)

from binaries import BinaryError
from cluster_access import Cluster, CommandError
from kompressor_api import names
from test_docs import commands
from upstream_crds import CRDS, upstream_crd
from waiting import PATIENCE, eventually

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "upstream"
HEALTH_CHECK = ROOT / "gitops" / "flux" / "health-check.yaml"
HEALTH_KEY = f"resource.customizations.health.{names.GROUP}_{names.KIND}"
"""Argo CD's docs/operator-manual/health.md: the type of customization, the group, an underscore, the kind."""


@pytest.fixture(scope="module")
def crds(cluster: Cluster) -> Iterator[Cluster]:
    """Those that the cluster has already are left as they are, and there."""
    try:
        files = [upstream_crd(plural) for plural in CRDS]
    except BinaryError as error:
        pytest.skip(f"no CRDs: {error}")
    wanted = {yaml.safe_load(file.read_text())["metadata"]["name"]: file for file in files}
    made = wanted.keys() - {one["metadata"]["name"] for one in cluster.get("crds")["items"]}
    for name in made:
        cluster.kubectl("apply", "--server-side", "-f", wanted[name])
    # kubectl does not wait for what has no conditions yet
    eventually(lambda: all("conditions" in cluster.get("crd", name).get("status", {}) for name in wanted))
    cluster.kubectl("wait", "--for=condition=Established", f"--timeout={PATIENCE:.0f}s", *(f"crd/{name}" for name in wanted))
    cluster.kubectl("create", "namespace", NAMESPACE)
    yield cluster
    cluster.kubectl("delete", "namespace", NAMESPACE)
    if made:
        cluster.kubectl("delete", "crd", *made)


def taken(cluster: Cluster, body: Manifest) -> Manifest:
    """The object as it is stored."""
    ours = body | {"metadata": body["metadata"] | {"namespace": NAMESPACE}}
    cluster.kubectl("apply", "--server-side", "--validate=strict", "--field-manager=kompressor", "-f", "-", stdin=json.dumps(ours))
    stored: Manifest = cluster.get(body["kind"].lower(), body["metadata"]["name"], "-n", NAMESPACE)
    return stored


def lost(given: Any, stored: Any, at: str = "") -> list[str]:
    """Where the stored object has not what it was given; it may have more, by the CRD's defaults."""
    if isinstance(given, dict) and isinstance(stored, dict):
        return [path for name, value in given.items() for path in lost(value, stored.get(name), f"{at}.{name}")]
    if isinstance(given, list) and isinstance(stored, list) and len(given) == len(stored):
        return [path for number, pair in enumerate(zip(given, stored, strict=True)) for path in lost(*pair, f"{at}[{number}]")]
    return [] if given == stored else [f"{at}: {given!r} became {stored!r}"]


def monitoring(render: Render, *flags: str) -> list[Manifest]:  # noqa: F811
    found = of_kind(render(*ON, *flags), "ServiceMonitor", "PrometheusRule")
    assert len(found) == 2
    return found


def shipped(render: Render, kind: str) -> Manifest:  # noqa: F811
    if kind == "Kustomization":
        found: Manifest = yaml.safe_load(HEALTH_CHECK.read_text())
        return found
    return next(one for one in monitoring(render) if one["kind"] == kind)


def test_prometheus_operators_crds_take_what_the_chart_renders(crds: Cluster, render: Render) -> None:  # noqa: F811
    labels = {"release": "mine", "number": "1"}
    given = sets(metrics__serviceMonitor={"enabled": True, "interval": "1m30s", "labels": labels}, metrics__rules__labels=labels)
    for body in (*monitoring(render), *monitoring(render, *given, "--set=replicas=2", "--set=fullnameOverride=other")):
        stored = taken(crds, body)
        assert lost(body["spec"], stored["spec"]) == [] and lost(body["metadata"]["labels"], stored["metadata"]["labels"]) == []


def test_fluxs_crd_takes_the_health_check(crds: Cluster) -> None:
    body = yaml.safe_load(HEALTH_CHECK.read_text())
    assert lost(body["spec"], taken(crds, body)["spec"]) == []


@pytest.mark.parametrize(
    ("kind", "path", "wrong"),
    [
        ("ServiceMonitor", ("endpoints", 0, "interval"), "intervall"),
        ("ServiceMonitor", ("namespaceSelector", "matchNames"), "matchName"),
        ("PrometheusRule", ("groups", 0, "rules", 0, "annotations"), "annotation"),
        ("Kustomization", ("healthCheckExprs", 0, "failed"), "fails"),
        ("Kustomization", ("healthCheckExprs",), "healthCheckExpressions"),
    ],
)
def test_a_misspelt_field_is_refused(
    kind: str,
    path: tuple[str | int, ...],
    wrong: str,
    crds: Cluster,
    render: Render,  # noqa: F811
) -> None:
    """Or the tests above would say nothing."""
    body = copy.deepcopy(shipped(render, kind))
    at = body["spec"]
    for step in path[:-1]:
        at = at[step]
    at[wrong] = at.pop(path[-1])
    with pytest.raises(CommandError, match=rf"{wrong}\b.*(not declared in schema|unknown field)|unknown field.*{wrong}\b"):
        taken(crds, body)


def test_what_is_lost_is_found() -> None:
    given = {"a": [{"b": 1}, {"c": 2}], "d": {"e": 3}}
    assert lost(given, given | {"more": 1}) == []
    assert lost(given, {"a": [{"b": 1}, {}], "d": {"e": 4}}) == [".a[1].c: 2 became None", ".d.e: 3 became 4"]
    assert lost(given, {"a": [{"b": 1}]}) == [".a: [{'b': 1}, {'c': 2}] became [{'b': 1}]", ".d: {'e': 3} became None"]


def test_argo_cds_configmap_gets_the_script_and_keeps_the_rest(crds: Cluster) -> None:
    """The page's own command, twice; only in a namespace of the test's. Server-side apply would take over what kubectl had applied before
    it, and then remove what it does not know: all the rest of Argo CD's configuration."""
    (line,) = [line for line in commands(ROOT / "docs" / "gitops.md") if "argocd-cm" in line]
    assert line.count("-n argocd ") == 2
    before = {"url": "https://argo.example", "resource.customizations.health.other.io_Thing": "return {}"}
    labels = {"app.kubernetes.io/part-of": "argocd"}  # without which Argo CD does not read it
    meta = {"name": "argocd-cm", "namespace": NAMESPACE, "labels": labels}
    crds.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": before})
    for _ in range(2):
        command = line.replace("-n argocd ", f"-n {NAMESPACE} ")
        subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=ROOT, env=os.environ | crds.environ, check=True)
        stored = crds.get("configmap", "argocd-cm", "-n", NAMESPACE)
        assert stored["data"] == before | {HEALTH_KEY: (ROOT / "gitops" / "argocd" / "health.lua").read_text()}
        assert stored["metadata"]["labels"] == labels
