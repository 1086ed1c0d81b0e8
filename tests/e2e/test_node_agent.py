"""The node agent against a real control plane: what the API server shows of a pod is what a kubelet would have written."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from node_pods import IMAGE, WAIT, Object, ended, log, main, pod, status, waiting

from agent.environment import ConfigError, environment, expand
from agent.logs import LogQuery, read
from local_cluster import CommandError, LocalCluster
from waiting import eventually

pytestmark = pytest.mark.cluster


def test_a_job_finds_everything_at_its_place(node: LocalCluster) -> None:
    meta = {"namespace": "agent", "name": "things"}
    node.apply(
        {"apiVersion": "v1", "kind": "Secret", "metadata": meta, "stringData": {"A": "secret-a", "B": "secret-b"}},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"k": "config-k", "other": "config-o"}},
    )
    script = """
import json, os, pathlib, socket, sys
for line in ("first", "second"): print(line, flush=True)
at = pathlib.Path
token = at("/var/run/secrets/kubernetes.io/serviceaccount")
seen = {"env": dict(os.environ), "args": sys.argv[1:], "cwd": os.getcwd(), "host": socket.gethostname(), "pid": os.getpid(),
        "secret": at("/etc/things/renamed").read_text(), "sub": at("/one/file").read_text(), "init": at("/scratch/init").read_text(),
        "namespace": (token / "namespace").read_text(), "token": len((token / "token").read_text()) > 100,
        "labels": at("/podinfo/labels").read_text(), "mode": oct(at("/etc/things/renamed").stat().st_mode & 0o777)}
for place in ("/etc/things/new", "/one/file"):
    try: at(place).write_text("x"); seen[place] = "written"
    except OSError as error: seen[place] = error.strerror
at("/dev/termination-log").write_text(json.dumps(seen))
"""
    env = [
        {"name": "PLAIN", "value": "p"},
        {"name": "JOINED", "value": "$(PLAIN)-$(PRE_A)-$(NOBODY)-$$(PLAIN)"},
        {"name": "KEY", "valueFrom": {"configMapKeyRef": {"name": "things", "key": "k"}}},
        {"name": "GONE", "valueFrom": {"secretKeyRef": {"name": "absent", "key": "k", "optional": True}}},
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "LABEL", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "MEMORY", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}},
    ]
    volumes: list[Object] = [
        {"name": "scratch", "emptyDir": {}},
        {"name": "secret", "secret": {"secretName": "things", "defaultMode": 0o440, "items": [{"key": "A", "path": "renamed"}]}},
        {"name": "config", "configMap": {"name": "things"}},
        {"name": "info", "downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
    ]
    container = {
        "name": "main", "image": IMAGE, "command": ["python", "-c", script], "args": ["$(KEY)"], "workingDir": "/work dir", "env": env,
        "envFrom": [{"prefix": "PRE_", "secretRef": {"name": "things"}}], "resources": {"limits": {"memory": "300Mi"}},
        "volumeMounts": [
            {"name": "scratch", "mountPath": "/scratch"}, {"name": "secret", "mountPath": "/etc/things"},
            {"name": "config", "mountPath": "/one/file", "subPath": "k", "readOnly": True}, {"name": "info", "mountPath": "/podinfo"},
        ],
    }  # fmt: skip
    init: Object = {"name": "init", "image": IMAGE, "command": ["sh", "-c", "printf made > /scratch/init"]}
    init["volumeMounts"] = [{"name": "scratch", "mountPath": "/scratch"}]
    spec = {"restartPolicy": "Never", "initContainers": [init], "containers": [container], "volumes": volumes}
    template = {"metadata": {"labels": {"app": "all"}}, "spec": spec}
    node.apply(
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": {"template": template, "podReplacementPolicy": "Failed"}}
    )
    node.kubectl("wait", "-n", "agent", "--for=condition=Complete", "job/things", WAIT)

    found = node.get("pods", "-n", "agent", "-l", "job-name=things")["items"][0]
    state = main(found["status"])["state"]["terminated"]
    assert (found["status"]["phase"], state["exitCode"], state["reason"]) == ("Succeeded", 0, "Completed")
    seen = json.loads(state["message"])
    values = {"PLAIN": "p", "JOINED": "p-secret-a-$(NOBODY)-$(PLAIN)", "KEY": "config-k", "PRE_B": "secret-b", "NODE": "node-1"}
    values |= {"LABEL": "all", "IP": found["status"]["podIP"], "MEMORY": "300", "FROM_IMAGE": "yes", "KUBERNETES_SERVICE_HOST": "127.0.0.1"}
    assert {name: seen["env"].get(name) for name in values} == values
    assert "GONE" not in seen["env"] and "VIRTUAL_ENV" not in seen["env"]
    assert (seen["args"], seen["cwd"], seen["host"]) == (["config-k"], "/work dir", found["metadata"]["name"])
    assert (seen["secret"], seen["mode"], seen["sub"], seen["init"]) == ("secret-a", "0o440", "config-k", "made")
    assert (seen["namespace"], seen["token"], seen["pid"]) == ("agent", True, 1)
    assert 'app="all"' in seen["labels"] and seen["/one/file"] == "Read-only file system"
    assert log(node, found["metadata"]["name"]) == "first\nsecond\n"
    assert log(node, found["metadata"]["name"], "--tail=1", "--timestamps").endswith("Z second\n")
    assert not any(Path(path).exists() for path in ("/etc/things", "/one", "/scratch", "/podinfo", "/work dir")), (
        "the machine is left alone"
    )


def test_over_the_memory_limit_is_oom_killed(node: LocalCluster) -> None:
    hog = "import time\nhold = []\nfor _ in range(300): hold.append(bytearray(1 << 20))\ntime.sleep(30)"
    node.apply(pod("hog", hog, program="python", resources={"limits": {"memory": "100Mi"}}))
    phase, state = ended(node, "hog")
    assert (phase, state["exitCode"], state["reason"]) == ("Failed", 137, "OOMKilled")


def test_a_missing_secret_is_waited_for(node: LocalCluster) -> None:
    env = [{"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "late", "key": "k"}}}]
    node.apply(pod("waits", "echo got $KEY", env=env))
    assert waiting(node, "waits", "CreateContainerConfigError") == 'secret "late" not found'
    node.kubectl("create", "secret", "generic", "late", "-n", "agent", "--from-literal=other=1")
    eventually(lambda: waiting(node, "waits", "CreateContainerConfigError") == "couldn't find key k in Secret agent/late")
    node.kubectl("patch", "secret", "late", "-n", "agent", "-p", '{"stringData":{"k":"it"}}')
    assert ended(node, "waits")[0] == "Succeeded"
    assert log(node, "waits") == "got it\n"


def test_a_missing_config_map_volume_keeps_the_pod_creating(node: LocalCluster) -> None:
    volumes = [{"name": "late", "configMap": {"name": "late-config"}}]
    mounts = [{"name": "late", "mountPath": "/late"}]
    node.apply(pod("mounts", "cat /late/k", spec={"volumes": volumes}, volumeMounts=mounts))
    chosen = "--field-selector=involvedObject.name=mounts,reason=FailedMount"
    event = eventually(lambda: node.get("events", "-n", "agent", chosen)["items"])[0]
    assert event["message"] == 'MountVolume.SetUp failed for volume "late" : configmap "late-config" not found'
    assert waiting(node, "mounts", "ContainerCreating") == ""
    node.kubectl("create", "configmap", "late-config", "-n", "agent", "--from-literal=k=v")
    assert ended(node, "mounts")[0] == "Succeeded"


def test_an_unknown_image_backs_off_until_it_is_there(node: LocalCluster) -> None:
    node.apply(pod("pulls", "echo $FROM", image="nowhere/late:1"))
    message = waiting(node, "pulls", "ImagePullBackOff")
    assert message.startswith('Back-off pulling image "nowhere/late:1": ErrImagePull: ') and "not found" in message
    reasons = {event["reason"] for event in node.get("events", "-n", "agent", "--field-selector=involvedObject.name=pulls")["items"]}
    assert {"Failed", "BackOff"} <= reasons
    node.add_images({"nowhere/late:1": {"path": ["/usr/bin"], "env": {"FROM": "the table"}}})
    assert ended(node, "pulls")[0] == "Succeeded"
    assert log(node, "pulls") == "the table\n"


def test_deletion_is_sigterm_then_a_recorded_end(node: LocalCluster) -> None:
    script = "trap 'echo asked > /dev/termination-log; exit 75' TERM; echo up; while :; do sleep 0.05; done"
    node.apply(pod("leaves", script))
    stubborn = pod("stubborn", "trap '' TERM; echo up; while :; do sleep 0.05; done", spec={"terminationGracePeriodSeconds": 2})
    node.apply(stubborn)
    for name in ("leaves", "stubborn"):
        # A finalizer keeps the object, so that its last status can be read, as the Job controller's does.
        node.kubectl("patch", "pod", name, "-n", "agent", "--type=merge", "-p", '{"metadata":{"finalizers":["test.example/kept"]}}')
        eventually(lambda name=name: "up" in log(node, name) if main(status(node, name))["state"].get("running") else "")  # type: ignore[misc]
        node.kubectl("delete", "pod", name, "-n", "agent", "--wait=false")
    phase, state = ended(node, "leaves")
    assert (phase, state["exitCode"], state["reason"], state["message"]) == ("Failed", 75, "Error", "asked\n")
    phase, state = ended(node, "stubborn")
    assert (phase, state["exitCode"], state["reason"]) == ("Failed", 137, "Error")
    for name in ("leaves", "stubborn"):
        node.kubectl("patch", "pod", name, "-n", "agent", "--type=merge", "-p", '{"metadata":{"finalizers":null}}')
    eventually(lambda: not node.kubectl("get", "pod", "leaves", "stubborn", "-n", "agent", "--ignore-not-found"))


def test_a_pod_reads_itself_with_its_own_token_as_another_user(node: LocalCluster) -> None:
    node.kubectl("create", "serviceaccount", "reader", "-n", "agent")
    node.kubectl("create", "role", "reader", "-n", "agent", "--verb=get", "--resource=pods", "--resource-name=reads")
    node.kubectl("create", "rolebinding", "reader", "-n", "agent", "--role=reader", "--serviceaccount=agent:reader")
    script = """
import os, kubernetes
kubernetes.config.load_incluster_config()
api = kubernetes.client.CoreV1Api()
print(os.getuid(), os.getgroups(), api.read_namespaced_pod(os.environ["HOSTNAME"], "agent").metadata.name)
try: api.list_namespaced_secret("agent")
except kubernetes.client.ApiException as error: print(error.status)
open("/data/x", "w").close()
print(oct(os.stat("/data/x").st_gid), os.access("/etc", os.W_OK))
"""
    security = {"runAsUser": 4321, "runAsNonRoot": True, "fsGroup": 77, "supplementalGroups": [88]}
    spec = {"serviceAccountName": "reader", "securityContext": security, "volumes": [{"name": "data", "emptyDir": {}}]}
    own = {"readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    mounts = [{"name": "data", "mountPath": "/data"}]
    node.apply(pod("reads", script, program="python", spec=spec, securityContext=own, volumeMounts=mounts))
    phase, state = ended(node, "reads")
    assert log(node, "reads") == f"4321 [77, 88] reads\n403\n{oct(77)} False\n", state
    assert phase == "Succeeded"


def test_crashes_back_off_and_their_logs_are_kept(node: LocalCluster) -> None:
    script = "echo run >> /state/runs; wc -l < /state/runs; exit 3"
    spec = {"restartPolicy": "Always", "volumes": [{"name": "state", "emptyDir": {}}]}
    mounts = [{"name": "state", "mountPath": "/state"}]
    node.apply(pod("crashes", script, spec=spec, volumeMounts=mounts, terminationMessagePolicy="FallbackToLogsOnError"))
    assert waiting(node, "crashes", "CrashLoopBackOff").startswith("back-off ")
    eventually(lambda: main(status(node, "crashes"))["restartCount"] >= 2)
    seen = eventually(lambda: (s := main(status(node, "crashes"))) and s["state"].get("waiting") and s)
    last = seen["lastState"]["terminated"]
    assert (last["exitCode"], last["reason"], last["message"]) == (3, "Error", f"{seen['restartCount'] + 1}\n")
    assert log(node, "crashes", "--previous") == f"{seen['restartCount']}\n"
    node.kubectl("delete", "pod", "crashes", "-n", "agent", "--wait=false")


def test_probes_decide_ready_and_alive(node: LocalCluster) -> None:
    script = """
import http.server, os, pathlib, signal
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path != "/": pathlib.Path("/tmp" + self.path).touch()
        self.send_response(503 if pathlib.Path("/tmp/unready").exists() else 200); self.end_headers()
signal.signal(signal.SIGTERM, lambda *_: os._exit(9))
http.server.HTTPServer((os.environ["IP"], 18080), Handler).serve_forever()
"""
    quick = {"periodSeconds": 1, "failureThreshold": 1}
    container = {
        "env": [{"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
        "ports": [{"name": "web", "containerPort": 18080}],
        "startupProbe": {"tcpSocket": {"port": "web"}, "periodSeconds": 1, "failureThreshold": 20},
        "readinessProbe": {"httpGet": {"path": "/", "port": "web"}, **quick},
        "livenessProbe": {"exec": {"command": ["sh", "-c", "echo looked; ! [ -e /tmp/sick ]"]}, **quick},
    }
    node.apply(pod("probed", script, program="python", spec={"restartPolicy": "Always"}, **container))

    def becomes(ready: str) -> None:
        node.kubectl("wait", "-n", "agent", f"--for=condition=Ready={ready}", "pod/probed", WAIT)

    becomes("true")
    web = f"http://{status(node, 'probed')['podIP']}:18080"
    for change in ("unready", "sick"):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{web}/{change}")
        becomes("false")
    # A fresh container has a fresh file system: both files are gone.
    becomes("true")
    seen = main(status(node, "probed"))
    assert (seen["restartCount"], seen["lastState"]["terminated"]["exitCode"]) == (1, 9)
    node.kubectl("delete", "pod", "probed", "-n", "agent")


def test_a_command_that_is_not_there_and_a_deadline(node: LocalCluster) -> None:
    node.apply(pod("nothing", "", program="no-such-program"))
    phase, state = ended(node, "nothing")
    assert (phase, state["exitCode"], state["reason"]) == ("Failed", 128, "StartError")
    assert 'exec: "no-such-program": executable file not found in $PATH' in state["message"]
    node.apply(pod("slow", "exec sleep 60", spec={"activeDeadlineSeconds": 1, "terminationGracePeriodSeconds": 1}))
    assert ended(node, "slow")[0] == "Failed"
    assert status(node, "slow")["reason"] == "DeadlineExceeded"


def test_logs_are_followed_to_the_end(node: LocalCluster) -> None:
    node.apply(pod("speaks", "for i in 1 2 3; do echo $i; sleep 0.5; done; printf rest"))
    eventually(lambda: main(status(node, "speaks"))["state"].get("running"))
    assert log(node, "speaks", "-f") == "1\n2\n3\nrest\n"
    assert log(node, "speaks", "--limit-bytes=3") == "1\n2"
    with pytest.raises(CommandError, match="not found"):
        log(node, "speaks", "--previous")


def test_what_needs_no_cluster(tmp_path: Path) -> None:
    assert expand("$(A) $$(A) $(B) $A $$", {"A": "x"}) == "x $(A) $(B) $A $"
    container = {"env": [{"name": "X", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "k"}}}]}
    someone = {"metadata": {"name": "p", "namespace": "ns", "uid": "u"}, "spec": {}}
    with pytest.raises(ConfigError, match="couldn't find key k in ConfigMap ns/c"):
        environment(someone, container, {}, {}, lambda kind, name: {"data": {}})
    file = tmp_path / "log"
    file.write_text("".join(f"2026-01-02T03:04:0{n}.5Z stdout {'P' if n == 1 else 'F'} {n}\n" for n in range(4)))
    whole = LogQuery.parse({}, 0.0)
    assert b"".join(read(file, whole, lambda: False)) == b"0\n12\n3\n"
    late = LogQuery.parse({"sinceTime": "2026-01-02T03:04:02Z", "tailLines": "3", "timestamps": "true"}, 0.0)
    assert b"".join(read(file, late, lambda: False)) == b"2026-01-02T03:04:02.5Z 2\n2026-01-02T03:04:03.5Z 3\n"
