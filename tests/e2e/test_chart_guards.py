"""What the chart lets users name, judged by the real API server; and what workers may reach."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_chart_values import Manifest, of_kind, render, sets  # noqa: F401  (a fixture)

from cluster_access import Cluster, CommandError
from kompressor_api import names
from kompressor_operator.manifests import labels
from kompressor_operator.observed import CompressionJob

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "kompressor"
SPACE = "guarded"
ALLOWED = {
    "outputPrefixes": ["s3://models/team-a/", "pvc://results/"],
    "outputEndpoints": ["https://s3.example.com/", ""],
    "images": ["registry.example.com/ml/", "kompressor/worker:", "vllm/vllm-openai:v0.11.0"],
}
OUTPUT = "s3://models/team-a/llama"
OURS = "kompressor/worker:0.1.0"
OTHERS = "docker.example.com/miner:latest"


@pytest.fixture(scope="module")
def guarded(cluster: Cluster) -> Iterator[Cluster]:
    """The chart without an operator: what is judged here is judged before any."""
    flags = ("--set=replicas=0", *sets(admissionPolicy__allowed=ALLOWED))
    cluster.helm("install", "guards", CHART, "-n", SPACE, "--create-namespace", *flags)
    deadline = time.monotonic() + 120
    while "is not allowed" not in refusal(cluster, job({"uri": "s3://elsewhere/x"})):  # policies take effect a moment later
        assert time.monotonic() < deadline, "the policy never takes effect"
        time.sleep(0.5)
    yield cluster
    cluster.helm("uninstall", "guards", "-n", SPACE, "--wait")
    cluster.kubectl("delete", "crd", *(f"{plural}.{names.GROUP}" for plural in PLURALS))
    cluster.kubectl("delete", "namespace", SPACE)


PLURALS = (names.PLURAL, names.RECIPE_PLURAL, names.CLUSTER_RECIPE_PLURAL)


def job(output: Manifest | None = None, **worker: Any) -> Manifest:
    spec: Manifest = {"model": {"source": {"uri": "s3://elsewhere/source"}}, "passes": [{"rtn": {"scheme": "W4A16"}}]}
    spec |= {"output": output or {"uri": OUTPUT}} | ({"worker": worker} if worker else {})
    return {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": "one", "namespace": SPACE}, "spec": spec}


def refusal(cluster: Cluster, body: Manifest) -> str:
    """What the API server says against it; empty if it takes it."""
    try:
        cluster.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(body))
    except CommandError as error:
        return error.stderr
    return ""


def pod(**spec: Any) -> Manifest:
    return {"podTemplate": {"spec": spec}}


ENDPOINT = [{"name": "AWS_ENDPOINT_URL_S3", "value": "https://evil.example"}]
CLAIMS = [{"name": names.ENV_CLAIM_DIRECTORY, "value": "/elsewhere"}]
GOOD: dict[str, Manifest] = {
    "below a prefix": job(),
    "the prefix itself": job({"uri": "s3://models/team-a"}),
    "a claim": job({"uri": "pvc://results/llama", "endpoint": "https://nowhere.example.com"}),
    "its server": job({"uri": OUTPUT, "endpoint": "https://S3.example.com"}),
    "its server, with a path": job({"uri": OUTPUT, "endpoint": "https://s3.example.com/gateway/"}),
    "below a registry": job(image="registry.example.com/ml/worker@sha256:" + "0" * 64),
    "any tag": job(image=OURS),
    "this very image": job(image="vllm/vllm-openai:v0.11.0"),
    "a template without images": job(**pod(containers=[{"name": "worker", "env": [{"name": "A", "value": "1"}]}], volumes=[{"name": "x"}])),
    "a template with an allowed image": job(**pod(initContainers=[{"name": "before", "image": OURS}])),
}
BAD: dict[str, tuple[Manifest, str]] = {
    "another bucket": (job({"uri": "s3://other/team-a/x"}), "results go below s3://models/team-a/, pvc://results/"),
    "a prefix that only begins alike": (job({"uri": "s3://models/team-ab"}), "s3://models/team-ab is not allowed"),
    "out of the prefix again": (job({"uri": "pvc://results/%2e%2E/x"}), "is not allowed"),
    "another server": (job({"uri": OUTPUT, "endpoint": "https://s3.example.com.evil.example"}), "results go to https://s3.example.com/"),
    "another user at a server": (job({"uri": OUTPUT, "endpoint": "https://s3.example.com@evil.example"}), "is not allowed"),
    "another image": (job(image=OTHERS), f"image {OTHERS} is not allowed; images are of registry.example.com/ml/"),
    "an image that only begins alike": (job(image="vllm/vllm-openai:v0.11.0-evil"), "is not allowed"),
    "the worker's, by a template": (job(**pod(containers=[{"name": "worker", "image": OTHERS}])), OTHERS),
    "one beside it": (job(**pod(containers=[{"name": "worker", "image": OURS}, {"name": "x", "image": OTHERS}])), OTHERS),
    "one before it": (job(**pod(initContainers=[{"name": "x", "image": OTHERS}])), OTHERS),
    "a server by a variable": (job(**pod(containers=[{"name": "worker", "env": ENDPOINT}])), "name the server in spec.output.endpoint"),
    "a claim of its own": (job(**pod(volumes=[{"name": "claim-0", "emptyDir": {}}])), "give yours another name"),
    "claims elsewhere": (job(**pod(containers=[{"name": "worker", "env": CLAIMS}])), "KOMPRESSOR_CLAIM_DIRECTORY is not for a job to set"),
    "one as a volume": (job(**pod(volumes=[{"name": "x", "image": {"reference": OTHERS}}])), OTHERS),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_is_allowed_is_taken(guarded: Cluster, case: str) -> None:
    assert refusal(guarded, GOOD[case]) == ""


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_allowed_is_refused_with_the_remedy(guarded: Cluster, case: str) -> None:
    body, says = BAD[case]
    told = refusal(guarded, body)
    assert says in told and "Forbidden" in told, told


def test_the_type_checker_finds_nothing(guarded: Cluster) -> None:
    """It sees mistakes in expressions that no job has met yet."""

    def checked() -> list[Manifest]:
        found: list[Manifest] = guarded.get("validatingadmissionpolicies", "-l", "app.kubernetes.io/instance=guards")["items"]
        return found if all("typeChecking" in one.get("status", {}) for one in found) else []

    deadline = time.monotonic() + 120
    while not (policies := checked()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert [one["status"]["typeChecking"] for one in policies] == [{}] * 4


def test_a_job_from_before_the_policy_can_still_be_suspended_and_deleted(guarded: Cluster) -> None:
    binding = f"{SPACE}-guards-kompressor-allowed"
    body = guarded.get("validatingadmissionpolicybinding", binding)
    guarded.kubectl("delete", "validatingadmissionpolicybinding", binding)
    deadline = time.monotonic() + 120
    while refusal(guarded, job(image=OTHERS)):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    guarded.apply(job(image=OTHERS))
    kept = {name: body["metadata"][name] for name in ("name", "labels", "annotations")}
    guarded.apply({**body, "metadata": kept})
    while not refusal(guarded, {**job(image=OTHERS), "metadata": {"name": "two", "namespace": SPACE}}):
        assert time.monotonic() < deadline + 120
        time.sleep(0.5)
    guarded.kubectl("patch", "kcj", "one", "-n", SPACE, "--type=merge", '-p={"spec":{"suspend":true}}')
    guarded.kubectl("annotate", "kcj", "one", "-n", SPACE, "a=b")
    guarded.kubectl("delete", "kcj", "one", "-n", SPACE)


def test_policies_of_places_only_where_there_are_some(render: Callable[..., list[Manifest]]) -> None:  # noqa: F811
    def count(*flags: str) -> int:
        return len([one for one in of_kind(render(*flags), "ValidatingAdmissionPolicy") if one["metadata"]["name"].endswith("-allowed")])

    assert count() == 0 and count(*sets(admissionPolicy__allowed=ALLOWED, admissionPolicy__enabled=False)) == 0
    for name in ALLOWED:
        assert count(*sets(admissionPolicy__allowed={name: ALLOWED[name]})) == 1


def test_workers_reach_stores_and_nobody_reaches_them(render: Callable[..., list[Manifest]]) -> None:  # noqa: F811
    """By labels that the operator gives every pod of a job."""

    def policies(**values: Any) -> dict[str, Manifest]:
        found = [one for one in of_kind(render(*sets(**values)), "NetworkPolicy") if one["metadata"]["name"].endswith("-workers")]
        return {one["metadata"]["namespace"]: one["spec"] for one in found}

    assert policies() == {} and policies(watch__namespaces=["a"]) == {}
    made = policies(networkPolicy__workers={"enabled": True, "egressPorts": [9000]}, watch__namespaces=["a", "b"])
    assert set(made) == {"a", "b"}
    assert set(policies(networkPolicy__workers={"enabled": True, "namespaces": ["c"]}, watch__namespaces=["a"])) == {"c"}
    marks = labels(CompressionJob.parse(job() | {"metadata": {"name": "one", "namespace": "a", "uid": "u"}}))
    assert made["a"]["podSelector"]["matchLabels"].items() <= marks.items()
    groups = {
        one["metadata"]["namespace"]: one["spec"]
        for one in of_kind(render(*sets(networkPolicy__workers={"enabled": True}, watch__namespaces=["a", "b"])), "NetworkPolicy")
        if one["metadata"]["name"].endswith("-groups")
    }
    pods = {**made["a"]["podSelector"], "matchExpressions": [{"key": names.LABEL_GROUP, "operator": "Exists"}]}
    assert set(groups) == {"a", "b"} and groups["a"]["podSelector"] == pods
    assert groups["a"]["ingress"] == [{"from": [{"podSelector": pods}]}], "one another, and nobody else"
    assert groups["a"]["egress"] == [{"to": [{"podSelector": pods}]}]
    assert made["a"]["ingress"] == [] and made["a"]["policyTypes"] == ["Ingress", "Egress"]
    ports = [port["port"] for rule in made["a"]["egress"] for port in rule["ports"]]
    assert ports == [53, 53, 443, 6443, 9000] and not any("to" in rule for rule in made["a"]["egress"])
