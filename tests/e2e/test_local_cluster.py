"""The testbed itself: what the other end-to-end tests take for granted about the cluster and the S3 server."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from botocore.exceptions import ClientError

import binaries
import local_cluster
from control_plane import COMPONENTS
from local_cluster import CommandError, LocalCluster
from s3 import S3Server

pytestmark = pytest.mark.cluster
TOOLS = Path(local_cluster.__file__).parent
T = TypeVar("T")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A control plane without nodes, always our own: CLUSTER=current has nodes."""
    try:
        binaries.provide()
    except binaries.BinaryError as error:
        pytest.skip(f"no control plane: {error}")
    with LocalCluster(tmp_path_factory.mktemp("bare"), log=print) as cluster:
        yield cluster


def eventually(look: Callable[[], T], seconds: float = 20) -> T:
    """The first truthy answer."""
    deadline = time.monotonic() + seconds
    while not (answer := look()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)
    return answer


def ask(cluster: LocalCluster, path: str, token: str) -> int:
    """HTTP status of a GET with nothing but a bearer token, as a pod would."""
    request = urllib.request.Request(cluster.server + path, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, context=ssl.create_default_context(cafile=str(cluster.ca))) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def processes_of(root: Path) -> list[str]:
    """Command lines on this machine that name something in `root`, our own left out."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if f"{root}/" in command and int(folder.name) != os.getpid():
            found.append(command)
    return found


def job(name: str) -> dict[str, Any]:
    container = {"name": "main", "image": "nowhere/nothing:1", "command": ["true"]}
    template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": {"template": template}}


@pytest.mark.skipif("KUBEBUILDER_ASSETS" in os.environ, reason="the versions are the user's")
def test_every_part_says_the_pinned_version(bare: LocalCluster) -> None:
    version = json.loads(bare.kubectl("version", "-o", "json"))
    pinned = binaries.module_version("k8s.io/kubernetes")
    assert version["serverVersion"]["gitVersion"] == version["clientVersion"]["gitVersion"] == pinned
    assert [version["serverVersion"][part] for part in ("major", "minor")] == pinned.lstrip("v").split(".")[:2]
    assert binaries.module_version("helm.sh/helm/v3") in bare.helm("version")
    assert json.loads(bare.helm("list", "-o", "json")) == []  # Helm parses the server's version before it does anything
    assert all(bare.processes[name].alive for name in COMPONENTS)


def test_a_job_without_nodes_makes_a_pod_that_waits(bare: LocalCluster) -> None:
    bare.apply(job("waits"))
    pod = eventually(lambda: bare.get("pods", "-l", "job-name=waits")["items"])[0]
    events = eventually(lambda: bare.get("events", "--field-selector=reason=FailedScheduling")["items"])
    assert pod["status"]["phase"] == "Pending"
    assert "no nodes available" in events[0]["message"]
    assert events[0]["involvedObject"]["name"] == pod["metadata"]["name"]
    # Tests of node loss count on this.
    evictions = [t["tolerationSeconds"] for t in pod["spec"]["tolerations"] if t["effect"] == "NoExecute"]
    assert evictions == [5, 5]

    bare.kubectl("delete", "job", "waits")
    assert eventually(lambda: not bare.get("pods", "-l", "job-name=waits")["items"]), "garbage collection"


def test_rbac_refuses_until_it_is_told_otherwise(bare: LocalCluster) -> None:
    bare.kubectl("create", "serviceaccount", "nobody")
    token = bare.kubectl("create", "token", "nobody").strip()
    secrets = "/api/v1/namespaces/default/secrets"
    assert ask(bare, secrets, token) == 403
    assert ask(bare, secrets, token[:-8] + "AAAAAAAA") == 401
    assert ask(bare, secrets, "") in (401, 403)

    bare.kubectl("create", "role", "reader", "--verb=list", "--resource=secrets")
    bare.kubectl("create", "rolebinding", "reader", "--role=reader", "--serviceaccount=default:nobody")
    assert eventually(lambda: ask(bare, secrets, token) == 200)
    assert ask(bare, "/api/v1/namespaces/kube-system/secrets", token) == 403


def test_pod_security_holds(bare: LocalCluster) -> None:
    bare.kubectl("create", "namespace", "strict")
    bare.kubectl("label", "namespace", "strict", "pod-security.kubernetes.io/enforce=restricted")
    eventually(lambda: bare.kubectl("get", "serviceaccount", "-n", "strict", "--ignore-not-found", "default"))
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "loose", "namespace": "strict"}}
    with pytest.raises(CommandError, match='violates PodSecurity "restricted'):
        bare.apply(pod | {"spec": {"containers": [{"name": "main", "image": "x"}]}})


def test_the_api_server_comes_back_with_everything(bare: LocalCluster) -> None:
    bare.kubectl("create", "configmap", "kept", "--from-literal=a=b")
    bare.stop_component("kube-apiserver")
    with pytest.raises(CommandError):
        bare.kubectl("get", "configmap", "kept")
    bare.start_component("kube-apiserver")
    assert bare.get("configmap", "kept")["data"] == {"a": "b"}


def test_stop_leaves_no_process_behind(tmp_path: Path, bare: LocalCluster) -> None:
    cluster = LocalCluster(tmp_path)
    began = time.monotonic()
    cluster.start()
    started = time.monotonic()
    assert len(processes_of(tmp_path)) >= len(COMPONENTS)
    watch = subprocess.Popen(
        [cluster.bin / "kubectl", "get", "pods", "--watch"],
        env=os.environ | cluster.environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(1)  # an open watch is what keeps an API server from ending
    stopping = time.monotonic()
    cluster.stop()
    took = time.monotonic() - stopping
    watch.wait(10)
    assert processes_of(tmp_path) == []
    assert len(processes_of(bare.root)) >= len(COMPONENTS), "the other cluster is untouched"
    print(f"started in {started - began:.1f} s, stopped in {took:.1f} s")
    assert took < 15


def test_a_killed_parent_takes_its_cluster_along(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time; from local_cluster import LocalCluster; "
        "LocalCluster(pathlib.Path(sys.argv[1])).start(); print('ready', flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(TOOLS)})
    with parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"ready\n"
        assert len(processes_of(tmp_path)) >= len(COMPONENTS)
        parent.send_signal(signal.SIGKILL)
    assert eventually(lambda: not processes_of(tmp_path), 5)


def test_up_stays_and_down_ends_it(tmp_path: Path) -> None:
    # The cache is where the state of a kept cluster lives; the binaries come from the real one.
    program = tmp_path / "bin"
    local_cluster_binaries = binaries.paths()
    program.mkdir()
    for name, path in local_cluster_binaries.items():
        (program / name).symlink_to(path)
    environ = os.environ | {"KOMPRESSOR_CACHE": str(tmp_path / "cache"), "KUBEBUILDER_ASSETS": str(program)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TOOLS / "local_cluster.py"), *arguments]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)

    assert run("status").returncode == 1
    try:
        up = run("up", "--nodes", "0")
        assert up.returncode == 0, up.stderr
        assert run("status").returncode == 0, "it outlives the command that started it"
        again = run("up", "--nodes", "0")
        assert again.returncode == 1 and "a cluster runs there" in again.stderr
        shell = subprocess.run(["sh", "-c", 'eval "$1"; kubectl get --raw /readyz', "-", run("env").stdout], capture_output=True)
        assert shell.stdout == b"ok", shell.stderr
    finally:
        down = run("down")
    assert down.returncode == 0, down.stderr
    assert processes_of(tmp_path / "cache") == []
    assert run("status").returncode == 1


def test_an_unknown_kind_of_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER", "kind")
    with pytest.raises(local_cluster.ClusterError, match="CLUSTER=kind: unknown; choose current or local"):
        local_cluster.provide()


def test_the_current_cluster_is_used_and_left_alone(bare: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTER", "current")
    monkeypatch.setenv("KUBECONFIG", str(bare.kubeconfig))
    with local_cluster.provide(nodes=3) as current:
        assert not isinstance(current, LocalCluster)
        assert current.get("nodes")["items"] == []
    assert bare.ready()
    monkeypatch.setenv("KUBECONFIG", str(bare.root / "absent"))
    with pytest.raises(local_cluster.ClusterError, match="absent does not exist"):
        local_cluster.provide()


def test_s3_conditional_puts_and_ranged_gets(s3: S3Server) -> None:
    client = s3.client()
    bucket = f"testbed-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket)
    first = client.put_object(Bucket=bucket, Key="a/b", Body=b"0123456789", IfNoneMatch="*")["ETag"]

    with pytest.raises(ClientError) as refused:
        client.put_object(Bucket=bucket, Key="a/b", Body=b"other", IfNoneMatch="*")
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412

    second = client.put_object(Bucket=bucket, Key="a/b", Body=b"abcdefghij", IfMatch=first)["ETag"]
    assert second != first
    with pytest.raises(ClientError) as stale:
        client.put_object(Bucket=bucket, Key="a/b", Body=b"late", IfMatch=first)
    assert stale.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412

    part = client.get_object(Bucket=bucket, Key="a/b", Range="bytes=2-4")
    assert part["ResponseMetadata"]["HTTPStatusCode"] == 206
    assert part["Body"].read() == b"cde"
    client.delete_object(Bucket=bucket, Key="a/b")
    client.delete_bucket(Bucket=bucket)


@pytest.mark.skipif("KOMPRESSOR_TEST_S3" in os.environ, reason="the server is the user's")
def test_s3_over_tls_and_with_the_wrong_key(tmp_path: Path) -> None:
    with S3Server(tmp_path, tls=True) as server:
        assert server.ca is not None and server.endpoint.startswith("https://")
        assert server.client().list_buckets()["Buckets"] == []
        server.secret_key += "x"
        with pytest.raises(ClientError) as refused:
            server.client().list_buckets()
        assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
    assert processes_of(tmp_path) == []
