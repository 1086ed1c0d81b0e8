"""The chart on a real cluster: install, serve, upgrade, uninstall."""

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
ACTOR = ROOT / "tests" / "operator" / "actor"
CRD = "compressionjobs.kompressor.io"

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
        actor = {**image, "path": [str(ACTOR), str(Path(sys.executable).parent)], "env": {}}
        wanted.add_images({"kompressor/operator:0.1.0": image, "kompressor/worker:0.1.0": actor, "kompressor/planner:0.1.0": actor})
    yield wanted
    wanted.stop()


PLURALS = ("compressionjobs", "compressionrecipes", "clustercompressionrecipes")
GO_ON = "trap 'exit 75' TERM; while :; do sleep 0.1; done"
"""What the worker of these tests does, which is an actor: it works until it is told to stop."""

JOB: Manifest = {
    "apiVersion": "kompressor.io/v1alpha1",
    "kind": "CompressionJob",
    "metadata": {"name": "first", "namespace": "team-a"},
    "spec": {
        "model": {"source": {"uri": "s3://models/llama"}},
        "output": {"uri": "s3://models/llama-w4a16"},
        "passes": [{"rtn": {"scheme": "W4A16", "ignore": [GO_ON]}}],
        "preflight": "Skip",
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
    cluster.kubectl("delete", "crd", *(f"{plural}.kompressor.io" for plural in PLURALS), "--ignore-not-found")
    cluster.kubectl("delete", "namespace", "system", "team-a", "team-b")


def wait_until(true: Callable[[], Any], what: str, seconds: float = 240, tell: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s\n{tell()}"
        time.sleep(0.3)


def install(cluster: Cluster, *flags: str, chart: Path = CHART) -> str:
    return cluster.helm("upgrade", "--install", "one", chart, "-n", "system", "--wait", "--timeout", "240s", *flags)


def apply(cluster: Cluster, *objects: Manifest) -> None:
    """kubectl learns of a new kind by discovery, a moment after the CRD is there."""

    def taken() -> bool:
        try:
            cluster.apply(*objects)
        except CommandError as error:
            assert "no matches for kind" in error.stderr, error
            return False
        return True

    wait_until(taken, "discovery")


@pytest.mark.parametrize("mode", ["cluster-wide", "namespaced"])
def test_installed_operator_serves_with_the_rights_of_the_chart(cluster: Cluster, namespaces: None, mode: str) -> None:
    """Ready by its own probes; `helm test` passes; a job gets all its children, so no right is missing."""
    flags = ("--set=watch.namespaces={team-a}",) if mode == "namespaced" else ()
    (port,) = free_ports(1)  # the nodes' pods share this machine's ports
    notes = install(cluster, *flags, f"--set=healthPort={port}")
    assert ("serves the namespaces team-a" if flags else "serves all namespaces") in notes
    cluster.helm("test", "one", "-n", "system", "--timeout", "240s")
    apply(cluster, JOB)
    log = lambda: cluster.kubectl("logs", "--tail=20", "-n", "system", "deployment/one-kompressor")  # noqa: E731
    told = lambda: cluster.get("kcj", "first", "-n", "team-a")["status"]  # noqa: E731
    wait_until(lambda: told().get("jobName"), "the child Job, which is named once all children are there", tell=log)
    assert cluster.get("job", told()["jobName"], "-n", "team-a")
    for kind in ("configmaps", "serviceaccounts", "roles", "rolebindings"):
        owners = [o["metadata"].get("ownerReferences", [{}])[0].get("kind") for o in cluster.get(kind, "-n", "team-a")["items"]]
        assert "CompressionJob" in owners, kind
    assert told()["conditions"]
    assert "forbidden" not in cluster.kubectl("logs", "-n", "system", "deployment/one-kompressor").lower()
    if mode == "namespaced":
        apply(cluster, *({**JOB, "metadata": {"name": f"to-{space}", "namespace": space}} for space in ("team-b", "team-a")))
        wait_until(lambda: cluster.get("kcj", "to-team-a", "-n", "team-a")["status"].get("jobName"), "a job that came after it", tell=log)
        assert cluster.get("jobs", "-n", "team-b")["items"] == []


def test_upgrade_brings_the_new_crd_and_changes_of_replicas(cluster: Cluster, namespaces: None, tmp_path: Path) -> None:
    old = shutil.copytree(CHART, tmp_path / "kompressor")
    definition = yaml.safe_load((old / "files" / "compressionjobs.yaml").read_text())
    spec = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    del spec["ttlSecondsAfterFinished"]
    (old / "files" / "compressionjobs.yaml").write_text(yaml.safe_dump(definition))
    stopped = "--set=admissionPolicy.enabled=false"
    install(cluster, "--set=replicas=0", stopped, chart=old)
    apply(cluster, JOB)

    def refused() -> bool:
        """By its minimum, which an unknown name does not have."""
        change = '-p={"spec":{"ttlSecondsAfterFinished":-1}}'
        try:
            cluster.kubectl("patch", "kcj", "first", "-n", "team-a", "--type=merge", "--dry-run=server", change)
        except CommandError as error:
            return "spec.ttlSecondsAfterFinished" in error.stderr
        return False

    assert not refused()
    install(cluster, "--set=replicas=0", stopped)
    wait_until(refused, "the new CRD's minimum")
    for replicas, strategy in ((2, "RollingUpdate"), (1, "Recreate"), (2, "RollingUpdate")):
        cluster.helm("upgrade", "one", CHART, "-n", "system", f"--set=replicas={replicas}")
        assert cluster.get("deployment", "one-kompressor", "-n", "system")["spec"]["strategy"]["type"] == strategy


def test_uninstall_keeps_the_crd_and_the_jobs_unless_told(cluster: Cluster, namespaces: None) -> None:
    install(cluster, "--set=replicas=0")
    apply(cluster, JOB)
    cluster.helm("uninstall", "one", "-n", "system", "--wait")
    assert cluster.get("kcj", "first", "-n", "team-a")["spec"]["passes"][0]["rtn"]["scheme"] == "W4A16"
    install(cluster, "--set=replicas=0", "--set=crds.keep=false")  # takes the kept CRD over again
    cluster.helm("uninstall", "one", "-n", "system", "--wait")
    wait_until(lambda: not cluster.kubectl("get", "crd", CRD, "--ignore-not-found"), "the CRD to go")


def test_uninstall_cleans_up_before_the_crd_goes(cluster: Cluster, namespaces: None) -> None:
    """With deletionPolicy Delete a finalizer holds the job: nothing may hang, and who cannot clean up says why."""
    (port,) = free_ports(1)
    install(cluster, f"--set=healthPort={port}", "--set=crds.keep=false", "--set=watch.namespaces={team-a}")
    spec = {**JOB["spec"], "deletionPolicy": "Delete", "output": {"uri": "s3://models/mine-0"}}
    apply(cluster, {**JOB, "spec": spec})
    apply(cluster, {**JOB, "metadata": {"name": "theirs", "namespace": "team-b"}})  # which this release does not serve
    running = ("-n", "team-a", "-l", "kompressor.io/step=compress", "--field-selector=status.phase=Running")
    wait_until(lambda: cluster.get("pods", *running)["items"], "the worker")
    cluster.kubectl("scale", "deployment", "one-kompressor", "-n", "system", "--replicas=0")
    with pytest.raises(CommandError):
        cluster.helm("uninstall", "one", "-n", "system", "--wait")
    log = cluster.kubectl("logs", "-n", "system", "job/one-kompressor-drain")
    assert "1 CompressionJobs are still there (team-a/first): no operator cleans up" in log
    assert "scale deployment one-kompressor --replicas=1" in log
    assert cluster.get("crd", CRD)["metadata"].get("deletionTimestamp") is None, "and nothing is lost"
    cluster.kubectl("scale", "deployment", "one-kompressor", "-n", "system", "--replicas=1")
    cluster.helm("uninstall", "one", "-n", "system", "--wait")
    wait_until(lambda: not cluster.kubectl("get", "crd", CRD, "--ignore-not-found"), "the CRD to go")
    (cleanup,) = cluster.get("jobs", "-n", "team-a", "-l", "kompressor.io/step=cleanup")["items"]
    assert cleanup["status"]["succeeded"] == 1
    left = cluster.kubectl("get", "clusterroles,clusterrolebindings", "-l", "app.kubernetes.io/instance=one", "-o", "name")
    assert left == "", "the hook's own too"


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

    for user, verb in (("viewer", "get"), ("editor", "create"), ("editor", "get")):
        wait_until(lambda u=user, v=verb: may(u, v, "compressionjobs"), "aggregation")
    assert not may("viewer", "create", "compressionjobs")
    assert not may("editor", "patch", "compressionjobs/status")
    assert not may("editor", "set-conditions", "compressionjobs/status")
