"""Names of pods in a headless Service, which the node agent keeps in place of DNS."""

from __future__ import annotations

import pytest
from node_pods import IMAGE, WAIT, log

from local_cluster import LocalCluster

pytestmark = pytest.mark.cluster


def test_pods_of_a_headless_service_find_one_another(node: LocalCluster) -> None:
    """Across nodes, from an Indexed Job's own host names, also one that comes again under its name with another address."""
    meta = {"namespace": "agent", "name": "group"}
    service = {"clusterIP": "None", "selector": {"app": "group"}, "publishNotReadyAddresses": True}
    script = """
import os, pathlib, socket, time
own, other = os.environ["JOB_COMPLETION_INDEX"], "10"[int(os.environ["JOB_COMPLETION_INDEX"])]
def await_name(name):
    while True:
        try: return socket.getaddrinfo(name, 1)[0][4][0]
        except socket.gaierror: time.sleep(0.05)
first = await_name(f"group-{other}.group")
longest = await_name(f"group-{other}.group.agent.svc.cluster.local")
if own == "0":
    listener = socket.create_server((os.environ["IP"], 29500))
    listener.accept()[0].send(b"!")
    while await_name("group-1.group") == first: time.sleep(0.05)
    listener.accept()[0].send(b"!")
else:
    while True:
        try: socket.create_connection((await_name("group-0.group"), 29500)).recv(1); break
        except OSError: time.sleep(0.05)
    mark = pathlib.Path("/marks/came")
    if not mark.exists():
        mark.touch()
        raise SystemExit(3)
print(own, socket.gethostname(), first == longest, flush=True)
"""
    env = [{"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]
    container = {"name": "main", "image": IMAGE, "command": ["python", "-c", script], "env": env}
    container["volumeMounts"] = [{"name": "marks", "mountPath": "/marks"}]
    spread = {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "DoNotSchedule"}
    spread["labelSelector"] = {"matchLabels": {"app": "group"}}
    spec = {"restartPolicy": "Never", "subdomain": "group", "containers": [container], "topologySpreadConstraints": [spread]}
    spec["volumes"] = [{"name": "marks", "hostPath": {"path": str(node.root / "marks"), "type": "DirectoryOrCreate"}}]
    job = {"parallelism": 2, "completions": 2, "completionMode": "Indexed", "backoffLimit": 1}
    job["template"] = {"metadata": {"labels": {"app": "group"}}, "spec": spec}
    node.start_node("node-2")
    try:
        node.apply(
            {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": service},
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": job},
        )
        node.kubectl("wait", "-n", "agent", "--for=condition=Complete", "job/group", WAIT)
        pods = node.get("pods", "-n", "agent", "-l", "job-name=group")["items"]
        assert {one["spec"]["nodeName"] for one in pods} == {"node-1", "node-2"} and len(pods) == 3
        logs = {log(node, one["metadata"]["name"]) for one in pods if one["status"]["phase"] == "Succeeded"}
        assert logs == {"0 group-0 True\n", "1 group-1 True\n"}
    finally:
        node.stop_component("node-2")
        node.kubectl("delete", "node", "node-2")
