"""What the chart renders, and which values it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster_access import Cluster, CommandError
from kompressor_operator.settings import Settings

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "kompressor"
KUBE = ("--kube-version", "1.36.0")

Manifest = dict[str, Any]


@pytest.fixture
def render(cluster: Cluster) -> Callable[..., list[Manifest]]:
    def template(*flags: str, namespace: str = "system") -> list[Manifest]:
        text = cluster.helm("template", "one", CHART, "--namespace", namespace, *KUBE, *flags)
        return [one for one in yaml.safe_load_all(text) if one]

    return template


def of_kind(objects: list[Manifest], *kinds: str) -> list[Manifest]:
    return [one for one in objects if one["kind"] in kinds]


def sets(**values: Any) -> tuple[str, ...]:
    """`--set-json` flags; a double underscore stands for a dot."""
    return tuple(f"--set-json={name.replace('__', '.')}={json.dumps(value)}" for name, value in values.items())


def test_lint(cluster: Cluster) -> None:
    cluster.helm("lint", CHART, "--strict", *KUBE)
    cluster.helm("lint", CHART, "--strict", *KUBE, *sets(watch__namespaces=["a", "b"], replicas=2))


def test_schema_knows_exactly_the_values() -> None:
    """A value that the schema lacks could not be set; one that values.yaml lacks would be a secret."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(value: Any, node: Manifest, path: str) -> None:
        if "properties" not in node:
            return
        assert node["additionalProperties"] is False, path
        if path.endswith("resources"):  # a container's own, of which values.yaml shows some
            return
        assert set(node["properties"]) - {"global"} == set(value), path
        for name, child in value.items():
            compare(child, node["properties"][name], f"{path}.{name}")

    compare(values, schema, "values")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"replica": 2}, "additional properties 'replica' not allowed"),
        ({"replicas": "two"}, "at '/replicas'"),
        ({"image__pullPolicy": "Sometimes"}, "at '/image/pullPolicy'"),
        ({"image__digest": "latest"}, "at '/image/digest'"),
        ({"watch__namespaces": "default"}, "at '/watch/namespaces'"),
        ({"watch__namespaces": ["Default"]}, "at '/watch/namespaces/0'"),
        ({"worker__env": {"A": 1}}, "at '/worker/env/A'"),
        ({"worker__images": {}}, "additional properties 'images' not allowed"),
        ({"worker__resources": {"limits": {"memory": "24GB"}}}, "at '/worker/resources/limits/memory'"),
        ({"worker__scratchSize": "20K"}, "at '/worker/scratchSize'"),
        ({"resources": {"requests": {"cpu": "some"}}}, "at '/resources/requests/cpu'"),
        ({"nameOverride": "My_Name"}, "at '/nameOverride'"),
        ({"fullnameOverride": "x" * 53}, "at '/fullnameOverride'"),
        ({"podLabels": {"app.kubernetes.io/name": "x"}}, "at '/podLabels/app.kubernetes.io~1name'"),
        ({"imagePullSecrets": [{"name": "x"}]}, "at '/imagePullSecrets/0'"),
        ({"extraEnv": [{"value": "x"}]}, "at '/extraEnv/0'"),
        ({"replicas": 6}, "at '/replicas'"),
        ({"crds__keep": "yes"}, "at '/crds/keep'"),
        ({"logLevel": "LOUD"}, "at '/logLevel'"),
        ({"worker__gpuResource": "gpu"}, "at '/worker/gpuResource'"),
        ({"worker__sharedMemory": "8G!"}, "at '/worker/sharedMemory'"),
        ({"planner__image": {"digest": "latest"}}, "at '/planner/image/digest'"),
        *(
            ({"metrics__serviceMonitor": {"interval": i}}, "at '/metrics/serviceMonitor/interval'")
            for i in ("often", "30s1m", "1m1m", "30", "")
        ),
        ({"metrics__port": 1}, "additional properties 'port' not allowed"),
        ({"admissionPolicy__allowed": {"outputPrefixes": ["s3://models"]}}, "at '/admissionPolicy/allowed/outputPrefixes/0'"),
        ({"admissionPolicy__allowed": {"outputEndpoints": ["https://s3.example.com"]}}, "at '/admissionPolicy/allowed/outputEndpoints/0'"),
        ({"networkPolicy__workers": {"enabled": True}}, "networkPolicy.workers.namespaces"),
        ({"networkPolicy__apiServerPorts": []}, "at '/networkPolicy/apiServerPorts'"),
    ],
)
def test_wrong_values_are_refused(render: Callable[..., list[Manifest]], values: Manifest, text: str) -> None:
    with pytest.raises(CommandError) as refused:
        render(*sets(**values))
    assert text in refused.value.stderr


ODD: dict[str, Manifest] = {
    "as it is": {},
    "everything off": {
        "crds__enabled": False,
        "rbac": {"create": False, "aggregate": False},
        "serviceAccount": {"create": False, "name": "mine"},
        "admissionPolicy__enabled": False,
        "networkPolicy__enabled": False,
        "podDisruptionBudget__enabled": False,
        "replicas": 0,
        "resources": {},
    },
    "everything on": {
        "replicas": 3,
        "crds__keep": False,
        "watch__namespaces": ["default", "kube-public"],
        "fullnameOverride": "x" * 52,
        "nameOverride": "y" * 63,
        "image": {"digest": f"sha256:{'0' * 64}", "pullPolicy": "Always"},
        "imagePullSecrets": ["a", "b"],
        "worker__imagePullSecrets": ["c"],
        "worker__env": {"A": 'quotes " and $(VARIABLES) and {{ braces }}'},
        "worker__resources": {"limits": {"nvidia.com/gpu": 1, "memory": "24Gi"}},
        "worker__gpuResource": "nvidia.com/gpu",
        "worker__sharedMemory": "8Gi",
        "networkPolicy__workers": {"enabled": True, "egressPorts": [443, 9000]},
        "admissionPolicy__allowed": {"outputPrefixes": ["s3://'a\"/"], "outputEndpoints": ["", "http://x:1/"], "images": ["a/", "b:"]},
        "metrics__dashboard": {"enabled": True, "labels": {"a/b": "1"}},
        "extraEnv": [{"name": "KOMPRESSOR_CONCURRENCY", "valueFrom": {"configMapKeyRef": {"name": "a", "key": "b", "optional": True}}}],
        "serviceAccount__annotations": {"a/b": "true"},
        "podAnnotations": {"a/b": "1"},
        "podLabels": {"team": "1"},
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "system-cluster-critical",
        "resources": {"limits": {"cpu": 0.5, "memory": "1Gi"}},
    },
}


@pytest.mark.parametrize("case", ODD)
def test_the_api_server_takes_what_odd_values_render(cluster: Cluster, render: Callable[..., list[Manifest]], case: str) -> None:
    for one in render(*sets(**ODD[case]), namespace="default"):
        if one["kind"] == "Pod":
            one["spec"]["serviceAccountName"] = "default"  # its own is not there in a dry run
        flags = ("--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict")
        cluster.kubectl("apply", *flags, "-f", "-", stdin=json.dumps(one))


def test_one_replica_never_blocks_a_drain(render: Callable[..., list[Manifest]]) -> None:
    (deployment,) = of_kind(render(), "Deployment")
    assert deployment["spec"]["strategy"]["type"] == "Recreate"
    assert of_kind(render(), "PodDisruptionBudget") == []
    two = render("--set=replicas=2")
    assert of_kind(two, "PodDisruptionBudget")[0]["spec"]["maxUnavailable"] == 1
    assert "strategy" not in of_kind(two, "Deployment")[0]["spec"]


def test_settings_reach_the_operator(render: Callable[..., list[Manifest]]) -> None:
    flags = sets(
        worker__env={"HTTPS_PROXY": "http://proxy"},
        worker__resources={"limits": {"memory": "8Gi"}},
        worker__imagePullSecrets=["a", "b"],
        worker__scratchSize="20Gi",
        healthPort=8090,
        worker__image={"repository": "mine/worker", "digest": f"sha256:{'0' * 64}", "pullPolicy": "Always"},
        watch__namespaces=["team-a", "team-b"],
        extraEnv=[{"name": "KOMPRESSOR_CONCURRENCY", "value": "4"}],
    )
    (deployment,) = of_kind(render(*flags), "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    environ = {e["name"]: e["value"] for e in container["env"]}
    settings = Settings.from_env(environ)
    assert settings.worker_image == f"mine/worker@sha256:{'0' * 64}"
    assert settings.worker_image_pull_policy == "Always"
    assert settings.worker_image_pull_secrets == ("a", "b")
    assert settings.worker_env == {"HTTPS_PROXY": "http://proxy"}
    assert settings.worker_resources == {"limits": {"memory": "8Gi"}}
    assert (settings.worker_scratch_size, settings.worker_grace_seconds) == ("20Gi", 60)
    assert settings.health_port == container["ports"][0]["containerPort"] == 8090
    assert (settings.namespaces, settings.concurrency) == (("team-a", "team-b"), 4)
    known = {f"KOMPRESSOR_{name.upper()}" for name in Settings.__dataclass_fields__}
    assert set(environ) <= known | {"LOGNAME"}, "a name that the operator does not read"


def test_cluster_wide_and_namespaced_rights(render: Callable[..., list[Manifest]]) -> None:
    wide = of_kind(render("--set=rbac.aggregate=false"), "ClusterRole", "ClusterRoleBinding")
    assert [one["kind"] for one in wide] == ["ClusterRole", "ClusterRoleBinding"]
    narrow = render(*sets(watch__namespaces=["a", "b"], rbac__aggregate=False))
    assert of_kind(narrow, "ClusterRole", "ClusterRoleBinding") == []
    roles = {one["metadata"].get("namespace"): one["rules"] for one in of_kind(narrow, "Role") if "test" not in one["metadata"]["name"]}
    of_the_cluster = [rule for rule in wide[0]["rules"] if rule["resources"] == ["clustercompressionrecipes"]]
    assert of_the_cluster[0]["verbs"] == ["get"], "what no namespace holds is read by an operator of the whole cluster alone"
    assert roles["a"] == roles["b"] == [rule for rule in wide[0]["rules"] if rule not in of_the_cluster]


def test_least_privilege(render: Callable[..., list[Manifest]]) -> None:
    rules = [rule for one in of_kind(render(), "ClusterRole", "Role") for rule in one["rules"]]
    resources = {resource for rule in rules for resource in rule["resources"]}
    verbs = {verb for rule in rules for verb in rule["verbs"]}
    assert not resources & {"*", "secrets", "pods/exec", "nodes", "clusterroles", "serviceaccounts/token"}
    assert not verbs & {"*", "escalate", "bind", "impersonate"}
    deletes = {resource for rule in rules if "delete" in rule["verbs"] for resource in rule["resources"]}
    by_users = {"compressionjobs", "compressionrecipes"}
    assert deletes == by_users | {"jobs"}, "what else the operator makes has an owner"
    assert [one["metadata"]["name"] for one in of_kind(render(), "Role")] == ["one-kompressor-test"], "helm's test"


def test_pods_pass_restricted_pod_security(cluster: Cluster, render: Callable[..., list[Manifest]]) -> None:
    cluster.kubectl("create", "namespace", "restricted")
    cluster.kubectl("label", "namespace", "restricted", "pod-security.kubernetes.io/enforce=restricted")
    cluster.kubectl("create", "serviceaccount", "one", "-n", "restricted")
    objects = render(namespace="restricted")
    template = of_kind(objects, "Deployment")[0]["spec"]["template"]
    operator = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "operator", "namespace": "restricted"}, "spec": template["spec"]}
    test = of_kind(objects, "Pod")[0]
    (drain,) = of_kind(render("--set=crds.keep=false", namespace="restricted"), "Job")
    before = {**operator, "metadata": {"name": "drain", "namespace": "restricted"}, "spec": drain["spec"]["template"]["spec"]}
    for pod in (operator, test, before):
        pod["spec"]["serviceAccountName"] = "one"
        cluster.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(pod))
        (container,) = pod["spec"]["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["command"], "an image's own entry is never relied on"
    assert {v["mountPath"] for v in operator["spec"]["containers"][0]["volumeMounts"]} == {"/tmp"}


def test_crds_in_the_chart_are_the_crds(render: Callable[..., list[Manifest]]) -> None:
    originals = {
        one["metadata"]["name"]: one["spec"] for one in map(yaml.safe_load, (p.read_text() for p in (ROOT / "crds").glob("*.yaml")))
    }
    rendered = of_kind(render(), "CustomResourceDefinition")
    assert {one["metadata"]["name"]: one["spec"] for one in rendered} == originals and len(originals) == 3
    assert all(one["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"} for one in rendered)
    assert of_kind(render(), "Job") == []
    removable = of_kind(render("--set=crds.keep=false"), "CustomResourceDefinition")
    assert len(of_kind(render("--set=crds.keep=false"), "Job")) == 1, "the hook that deletes all jobs first"
    assert len(removable) == 3 and not any("annotations" in one["metadata"] for one in removable)
    assert of_kind(render("--set=crds.enabled=false"), "CustomResourceDefinition") == []


def test_policies_cover_what_the_release_serves(render: Callable[..., list[Manifest]]) -> None:
    kinds = ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
    assert len(of_kind(render(), *kinds)) == 6
    assert len(of_kind(render("--set=admissionPolicy.protectStatus=false"), *kinds)) == 4
    assert of_kind(render("--set=admissionPolicy.enabled=false"), *kinds) == []
    for binding in of_kind(render(*sets(watch__namespaces=["a"])), "ValidatingAdmissionPolicyBinding"):
        (expression,) = binding["spec"]["matchResources"]["namespaceSelector"]["matchExpressions"]
        assert expression == {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["a"]}
