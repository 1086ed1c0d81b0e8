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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

import binaries
import local_cluster
from control_plane import COMPONENTS
from local_cluster import CommandError, LocalCluster, StartError
from s3 import S3Server
from waiting import PATIENCE, eventually

pytestmark = pytest.mark.cluster
TOOLS = Path(local_cluster.__file__).parent


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A control plane without nodes, always our own: CLUSTER=current has nodes."""
    try:
        binaries.provide()
    except binaries.BinaryError as error:
        pytest.skip(f"no control plane: {error}")
    with LocalCluster(tmp_path_factory.mktemp("bare"), log=print) as cluster:
        yield cluster


def ask(cluster: LocalCluster, path: str, token: str) -> int:
    """HTTP status of a GET with nothing but a bearer token, as a pod would."""
    request = urllib.request.Request(cluster.server + path, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, context=ssl.create_default_context(cafile=str(cluster.ca))) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def processes_with(text: str) -> list[str]:
    """Command lines on this machine that hold `text`, our own left out."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in command and int(folder.name) != os.getpid():
            found.append(command)
    return found


def job(name: str, *command: str, image: str = "nowhere/nothing:1") -> dict[str, Any]:
    container = {"name": "main", "image": image, "command": command or ["true"]}
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
    cluster = LocalCluster(tmp_path, nodes=1, images={"here:1": {}})
    began = time.monotonic()
    cluster.start()
    started = time.monotonic()
    endless = ["sleep", f"98765.{os.getpid()}"]
    cluster.apply(job("endless", *endless, image="here:1"))
    eventually(lambda: processes_with(" ".join(endless)))
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
    watch.wait(PATIENCE)
    assert processes_with(f"{tmp_path}/") == processes_with(" ".join(endless)) == []
    assert len(processes_with(f"{bare.root}/")) >= len(COMPONENTS), "the other cluster is untouched"
    print(f"started in {started - began:.1f} s, stopped in {took:.1f} s")
    assert took < 45, "the API server by itself would wait for the watch, a minute long"


def test_a_killed_parent_takes_cluster_and_pods_along(tmp_path: Path) -> None:
    endless = ["sleep", f"98766.{os.getpid()}"]
    script = (
        "import json, pathlib, sys, time; from local_cluster import LocalCluster\n"
        "cluster = LocalCluster(pathlib.Path(sys.argv[1]), nodes=1, images={'here:1': {}}).start()\n"
        "cluster.apply(json.loads(sys.argv[2])); print('ready', flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path, json.dumps(job("endless", *endless, image="here:1"))],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(TOOLS)},
    )
    with parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"ready\n"
        eventually(lambda: [found for found in processes_with(" ".join(endless)) if found.startswith("sleep")])
        assert len(processes_with(f"{tmp_path}/")) > len(COMPONENTS)
        parent.send_signal(signal.SIGKILL)
    assert eventually(lambda: not processes_with(f"{tmp_path}/") + processes_with(" ".join(endless)))


def test_a_node_runs_a_job_and_sees_only_its_own_secrets(bare: LocalCluster) -> None:
    """The path that every end-to-end test takes: apply, schedule, run as a process, `kubectl logs`. The node goes again."""
    bare.add_images({"here:1": {"path": [str(Path(sys.executable).parent)]}})
    program = "import ssl, sys; print('python', sys.version_info.major); print(open('/run/mine/word').read())"
    for name in ("mine", "other"):
        bare.kubectl("create", "secret", "generic", name, "--from-literal=word=sesame")
    wanted = job("runs", "python3", "-c", program, image="here:1")
    pod = wanted["spec"]["template"]["spec"]
    pod["volumes"] = [{"name": "mine", "secret": {"secretName": "mine"}}]
    pod["containers"][0]["volumeMounts"] = [{"name": "mine", "mountPath": "/run/mine"}]
    bare.apply(wanted)
    bare.start_node("node-1")
    try:
        bare.kubectl("wait", "--for=condition=Complete", "job/runs", f"--timeout={PATIENCE:.0f}s")
        assert bare.kubectl("logs", "job/runs") == "python 3\nsesame\n"
        as_node = ["--kubeconfig", str(bare.root / "nodes" / "node-1" / "kubeconfig")]
        with pytest.raises(CommandError, match="no relationship found between node 'node-1' and this object"):
            bare.kubectl(*as_node, "get", "secret", "other")
        with pytest.raises(CommandError, match="cannot list resource"):
            bare.kubectl(*as_node, "get", "secrets")
    finally:
        bare.stop_component("node-1")
        bare.kubectl("delete", "job/runs", "node/node-1", "secret/mine", "secret/other", "--ignore-not-found")


def test_up_stays_and_down_ends_it(tmp_path: Path) -> None:
    # The cache is where the state of a kept cluster lives; the binaries come from the real one.
    program = tmp_path / "bin"
    program.mkdir()
    for name, path in binaries.paths().items():
        (program / name).symlink_to(path)
    environ = os.environ | {"KOMPRESSOR_CACHE": str(tmp_path / "cache"), "KUBEBUILDER_ASSETS": str(program)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TOOLS / "local_cluster.py"), *arguments]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=PATIENCE)

    assert run("status").returncode == 1
    try:
        up = run("up")
        assert up.returncode == 0, up.stderr
        assert run("status").returncode == 0, "it outlives the command that started it"
        again = run("up")
        assert again.returncode == 1 and "a cluster runs there" in again.stderr
        shell = subprocess.run(["sh", "-c", 'eval "$1"; kubectl get --raw /readyz', "-", run("env").stdout], capture_output=True)
        assert shell.stdout == b"ok", shell.stderr
    finally:
        down = run("down")
    assert down.returncode == 0, down.stderr
    assert processes_with(f"{tmp_path}/cache/") == []
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
    assert processes_with(f"{tmp_path}/") == []


def test_s3_of_the_user_is_used_and_left_alone(tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOMPRESSOR_TEST_S3", s3.endpoint)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    with pytest.raises(StartError, match="AWS_ACCESS_KEY_ID not set; export the credentials too"):
        S3Server(tmp_path).start()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    with S3Server(tmp_path) as users:
        assert users.process is None and users.endpoint == s3.endpoint
        users.client().list_buckets()
    s3.client().list_buckets()
