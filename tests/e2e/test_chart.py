"""The chart: what it renders, which values it takes, and its life on a real cluster: install, serve, upgrade, uninstall."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from binaries import BinaryError
from cluster_access import Cluster, CommandError
from local_cluster import LocalCluster, provide
from processes import free_ports

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "kompressor"
CRD = "compressionjobs.kompressor.io"
KUBE = ("--kube-version", "1.36.0")

Manifest = dict[str, Any]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One of its own: these tests take the CRD away, which other tests rely on."""
    wanted = provide(nodes=1, root=tmp_path_factory.mktemp("cluster"))
    try:
        wanted.start()
    except BinaryError as error:
        pytest.skip(f"no control plane: {error}")
    if isinstance(wanted, LocalCluster):
        code = {"PYTHONPATH": f"{ROOT / 'crds'}:{ROOT / 'operator'}"}
        image = {"path": [str(Path(sys.executable).parent)], "keep": [str(ROOT)], "env": code, "user": 65532, "group": 65532}
        wanted.add_images({"kompressor/operator:0.1.0": image})
    yield wanted
    wanted.stop()


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


# -- rendering


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
        ({"crds__keep": "yes"}, "at '/crds/keep'"),
        ({"logLevel": "LOUD"}, "at '/logLevel'"),
        ({"networkPolicy__apiServerPorts": []}, "at '/networkPolicy/apiServerPorts'"),
    ],
)
def test_wrong_values_are_refused(render: Callable[..., list[Manifest]], values: Manifest, text: str) -> None:
    with pytest.raises(CommandError) as refused:
        render(*sets(**values))
    assert text in refused.value.stderr


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
    from kompressor_operator.settings import Settings

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
    assert roles["a"] == roles["b"] == wide[0]["rules"]


def test_least_privilege(render: Callable[..., list[Manifest]]) -> None:
    rules = [rule for one in of_kind(render(), "ClusterRole", "Role") for rule in one["rules"]]
    resources = {resource for rule in rules for resource in rule["resources"]}
    verbs = {verb for rule in rules for verb in rule["verbs"]}
    assert not resources & {"*", "secrets", "pods/exec", "nodes", "clusterroles", "serviceaccounts/token"}
    assert not verbs & {"*", "escalate", "bind", "impersonate"}
    deletes = {resource for rule in rules if "delete" in rule["verbs"] for resource in rule["resources"]}
    assert deletes == {"jobs", "compressionjobs"}, "jobs by the operator, compressionjobs by users who may edit"


def test_pods_pass_restricted_pod_security(cluster: Cluster, render: Callable[..., list[Manifest]]) -> None:
    cluster.kubectl("create", "namespace", "restricted")
    cluster.kubectl("label", "namespace", "restricted", "pod-security.kubernetes.io/enforce=restricted")
    cluster.kubectl("create", "serviceaccount", "one", "-n", "restricted")
    objects = render(namespace="restricted")
    template = of_kind(objects, "Deployment")[0]["spec"]["template"]
    operator = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "operator", "namespace": "restricted"}, "spec": template["spec"]}
    test = of_kind(objects, "Pod")[0]
    for pod in (operator, test):
        pod["spec"]["serviceAccountName"] = "one"
        cluster.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(pod))
        (container,) = pod["spec"]["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["command"], "an image's own entry is never relied on"
    assert {v["mountPath"] for v in operator["spec"]["containers"][0]["volumeMounts"]} == {"/tmp"}


def test_crd_in_the_chart_is_the_crd(render: Callable[..., list[Manifest]]) -> None:
    original = yaml.safe_load((ROOT / "crds" / "compressionjobs.yaml").read_text())
    (rendered,) = of_kind(render(), "CustomResourceDefinition")
    assert rendered["spec"] == original["spec"]
    assert rendered["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    (removable,) = of_kind(render("--set=crds.keep=false"), "CustomResourceDefinition")
    assert "annotations" not in removable["metadata"]
    assert of_kind(render("--set=crds.enabled=false"), "CustomResourceDefinition") == []


def test_policies_cover_what_the_release_serves(render: Callable[..., list[Manifest]]) -> None:
    kinds = ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
    assert len(of_kind(render(), *kinds)) == 4
    assert len(of_kind(render("--set=admissionPolicy.protectStatus=false"), *kinds)) == 2
    assert of_kind(render("--set=admissionPolicy.enabled=false"), *kinds) == []
    for binding in of_kind(render(*sets(watch__namespaces=["a"])), "ValidatingAdmissionPolicyBinding"):
        (expression,) = binding["spec"]["matchResources"]["namespaceSelector"]["matchExpressions"]
        assert expression == {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["a"]}


# -- on the cluster


JOB: Manifest = {
    "apiVersion": "kompressor.io/v1alpha1",
    "kind": "CompressionJob",
    "metadata": {"name": "first", "namespace": "team-a"},
    "spec": {
        "model": {"source": {"uri": "s3://models/llama"}},
        "output": {"uri": "s3://models/llama-w4a16"},
        "passes": [{"rtn": {"scheme": "W4A16"}}],
    },
}


@pytest.fixture
def namespaces(cluster: Cluster) -> Iterator[None]:
    """`system` for the release, `team-a` and `team-b` for jobs; no release, no CRD before and after."""
    for name in ("system", "team-a", "team-b"):
        cluster.kubectl("create", "namespace", name)
    yield
    for release in json.loads(cluster.helm("list", "-n", "system", "-o", "json")):
        cluster.helm("uninstall", release["name"], "-n", "system", "--wait")
    cluster.kubectl("delete", "crd", CRD, "--ignore-not-found")
    cluster.kubectl("delete", "namespace", "system", "team-a", "team-b")


def wait_until(true: Callable[[], Any], what: str, seconds: float = 60, tell: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s\n{tell()}"
        time.sleep(0.3)


def install(cluster: Cluster, *flags: str, chart: Path = CHART) -> str:
    return cluster.helm("upgrade", "--install", "one", chart, "-n", "system", "--wait", "--timeout", "90s", *flags)


@pytest.mark.parametrize("mode", ["cluster-wide", "namespaced"])
def test_installed_operator_serves_with_the_rights_of_the_chart(cluster: Cluster, namespaces: None, mode: str) -> None:
    """Ready by its own probes; `helm test` passes; a job gets all its children, so no right is missing."""
    flags = sets(watch__namespaces=["team-a"]) if mode == "namespaced" else ()
    (port,) = free_ports(1)  # the nodes' pods share this machine's ports
    notes = install(cluster, *flags, f"--set=healthPort={port}")
    assert ("serves the namespaces team-a" if flags else "serves all namespaces") in notes
    cluster.helm("test", "one", "-n", "system", "--timeout", "90s")
    cluster.apply(JOB)
    log = lambda: cluster.kubectl("logs", "--tail=20", "-n", "system", "deployment/one-kompressor")  # noqa: E731
    wait_until(lambda: cluster.get("jobs", "-n", "team-a")["items"], "the child Job", tell=log)
    for kind in ("configmaps", "serviceaccounts", "roles", "rolebindings"):
        owners = [o["metadata"].get("ownerReferences", [{}])[0].get("kind") for o in cluster.get(kind, "-n", "team-a")["items"]]
        assert "CompressionJob" in owners, kind
    wait_until(lambda: cluster.get("kcj", "first", "-n", "team-a")["status"].get("conditions"), "conditions")
    assert "forbidden" not in cluster.kubectl("logs", "-n", "system", "deployment/one-kompressor").lower()
    if mode == "namespaced":
        other = JOB | {"metadata": {"name": "other", "namespace": "team-b"}}
        cluster.apply(other)
        time.sleep(2)
        assert cluster.get("jobs", "-n", "team-b")["items"] == []


def test_upgrade_brings_the_new_crd_and_changes_of_replicas(cluster: Cluster, namespaces: None, tmp_path: Path) -> None:
    old = shutil.copytree(CHART, tmp_path / "kompressor")
    definition = yaml.safe_load((old / "files" / "compressionjobs.yaml").read_text())
    spec = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    del spec["ttlSecondsAfterFinished"]
    (old / "files" / "compressionjobs.yaml").write_text(yaml.safe_dump(definition))
    stopped = "--set=admissionPolicy.enabled=false"
    install(cluster, "--set=replicas=0", stopped, chart=old)
    cluster.apply(JOB)
    install(cluster, "--set=replicas=0", stopped)
    cluster.kubectl("patch", "kcj", "first", "-n", "team-a", "--type=merge", '-p={"spec":{"ttlSecondsAfterFinished":5}}')
    assert cluster.get("kcj", "first", "-n", "team-a")["spec"]["ttlSecondsAfterFinished"] == 5
    for replicas, strategy in ((2, "RollingUpdate"), (1, "Recreate"), (2, "RollingUpdate")):
        cluster.helm("upgrade", "one", CHART, "-n", "system", f"--set=replicas={replicas}")
        assert cluster.get("deployment", "one-kompressor", "-n", "system")["spec"]["strategy"]["type"] == strategy


def test_uninstall_keeps_the_crd_and_the_jobs_unless_told(cluster: Cluster, namespaces: None) -> None:
    install(cluster, "--set=replicas=0")
    cluster.apply(JOB)
    cluster.helm("uninstall", "one", "-n", "system", "--wait")
    assert cluster.get("kcj", "first", "-n", "team-a")["spec"]["passes"][0]["rtn"]["scheme"] == "W4A16"
    install(cluster, "--set=replicas=0", "--set=crds.keep=false")  # takes the kept CRD over again
    cluster.helm("uninstall", "one", "-n", "system", "--wait")
    wait_until(lambda: not cluster.kubectl("get", "crd", CRD, "--ignore-not-found"), "the CRD to go")


def test_crd_applied_by_hand_first(cluster: Cluster, namespaces: None) -> None:
    cluster.kubectl("apply", "-f", ROOT / "crds")
    with pytest.raises(CommandError, match="invalid ownership metadata"):
        install(cluster, "--set=replicas=0")
    install(cluster, "--set=replicas=0", "--set=crds.enabled=false")
    cluster.helm("uninstall", "one", "-n", "system", "--wait")
    install(cluster, "--set=replicas=0", "--take-ownership")


def test_users_see_and_edit_jobs_by_their_usual_roles(cluster: Cluster, namespaces: None) -> None:
    install(cluster, "--set=replicas=0")
    for user, role in (("viewer", "view"), ("editor", "edit")):
        cluster.kubectl("create", "rolebinding", user, f"--clusterrole={role}", f"--user={user}", "-n", "team-a")

    def may(user: str, verb: str, resource: str) -> bool:
        name, _, subresource = resource.partition("/")
        asked = ("auth", "can-i", verb, name, f"--subresource={subresource}", "-n", "team-a", f"--as={user}")
        try:
            return cluster.kubectl(*asked).strip() == "yes"
        except CommandError:
            return False

    wait_until(lambda: may("viewer", "get", "compressionjobs"), "aggregation")
    assert may("editor", "create", "compressionjobs")
    assert may("editor", "get", "compressionjobs")
    assert not may("viewer", "create", "compressionjobs")
    assert not may("editor", "patch", "compressionjobs/status")
    assert not may("editor", "set-conditions", "compressionjobs/status")
