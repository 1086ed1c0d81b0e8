"""A stage for the operator: real etcd, API server, controllers, scheduler and node; only the worker is an actor.

The node's image `worker:1` has a `kompressor` that does what the job's first pass says in `ignore` (as `plan`: in `targets`): a shell
script. So a test decides how the worker behaves, and everything around it is real: exit codes, termination messages, signals, the
kubelet's own reasons.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from acts import GO_ON, HELD, SUCCEED, report
from operator_process import Operator
from plain_api import Api, ApiRefusal

from kompressor_api import names
from local_cluster import LocalCluster
from waiting import PATIENCE, eventually

if TYPE_CHECKING:
    from operator_nursery import Nursery

__all__ = ["GO_ON", "HELD", "IMAGE", "PATIENCE", "ROOT", "SUCCEED", "ApiRefusal", "Operator", "Stage", "eventually", "gone", "report"]

Manifest = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "kompressor"
SYSTEM = "kompressor-system"
ACTOR = Path(__file__).parent / "actor"
IMAGE = {"path": [str(ACTOR), str(Path(sys.executable).parent)], "keep": [str(ROOT)]}
BASES = {
    "compressionjobs": f"/apis/{names.GROUP}/{names.VERSION}",
    names.RECIPE_PLURAL: f"/apis/{names.GROUP}/{names.VERSION}",
    "jobs": "/apis/batch/v1",
    "leases": "/apis/coordination.k8s.io/v1",
    "roles": "/apis/rbac.authorization.k8s.io/v1",
    "rolebindings": "/apis/rbac.authorization.k8s.io/v1",
}


@dataclass
class Stage:
    root: Path
    namespace: str = ""
    nursery: Nursery | None = None
    cluster: LocalCluster = field(init=False)

    def __post_init__(self) -> None:
        self.cluster = LocalCluster(self.root / "cluster", nodes=1, images={"worker:1": IMAGE}, log=print)

    def install(self) -> None:
        """The chart's CRD, roles and the policy on who writes the status; the operator itself is started by the tests.

        Without the policy on names, so that misspelt ones reach the operator.
        """
        self.api = Api(self.cluster)
        self.cluster.kubectl("create", "namespace", SYSTEM)
        rendered = self.cluster.helm("template", "kompressor", str(CHART), "--namespace", SYSTEM, "--kube-version", "1.36.0")
        kinds = ("Deployment", "NetworkPolicy", "PodDisruptionBudget", "Pod")
        wanted = [o for o in yaml.safe_load_all(rendered) if o and o["kind"] not in kinds and "known-names" not in o["metadata"]["name"]]
        self.cluster.apply(*wanted)
        account = next(o["metadata"]["name"] for o in wanted if o["kind"] == "ServiceAccount")
        token = self.cluster.kubectl("create", "token", account, "--namespace", SYSTEM, "--duration", "8h").strip()
        self._write_kubeconfig(token)
        eventually(lambda: self._accepts())

    def enter_namespace(self) -> None:
        self.namespace = f"t-{uuid.uuid4().hex[:8]}"
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        self.api.call("POST", "/api/v1/namespaces", {"metadata": {"name": self.namespace, "labels": labels}})

    def leave_namespace(self) -> None:
        self.api.call("DELETE", f"/api/v1/namespaces/{self.namespace}")

    @contextmanager
    def node(self, name: str, *arguments: str) -> Iterator[None]:
        """One more node, gone again afterwards."""
        self.cluster.start_node(name, *arguments)
        try:
            yield
        finally:
            self.resume_node(name)
            self.cluster.stop_component(name)
            self.cluster.kubectl("delete", "node", name, "--ignore-not-found")

    def silence_node(self, name: str) -> None:
        """It does not answer any more; what runs on it goes on."""
        os.kill(self.cluster.processes[name].pid, signal.SIGSTOP)

    def resume_node(self, name: str) -> None:
        os.kill(self.cluster.processes[name].pid, signal.SIGCONT)

    # ---- the operator

    def operator(self, *, ready: bool = True, **settings: str) -> AbstractContextManager[Operator]:
        """One that is ready, unless told not to wait for that; ended with SIGTERM. From the nursery, where there is one: then its exit code
        is known to nobody."""
        if self.nursery is not None:
            return self.nursery.operator(self, ready=ready, **settings)
        return self.operator_process(ready=ready, **settings)

    @contextmanager
    def operator_process(self, *, ready: bool = True, **settings: str) -> Iterator[Operator]:
        """The same, started as a pod starts it."""
        log = self.root / f"operator-{uuid.uuid4().hex[:6]}.log"
        with log.open("wb") as file:
            process = subprocess.Popen([sys.executable, "-m", "kompressor_operator"], env=self.environ(**settings), stderr=file)
        running = Operator(process, log)
        try:
            eventually(running.ready if ready else running.port)
            yield running
        finally:
            if process.poll() is None:
                running.stop()
            print(log.read_text())

    def environ(self, **settings: str) -> dict[str, str]:
        """What an operator for this namespace is started with."""
        environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("crds", "operator")),
            "KUBECONFIG": str(self.root / "operator.kubeconfig"),
            "KOMPRESSOR_WORKER_IMAGE": "worker:1",
            "KOMPRESSOR_WORKER_GRACE_SECONDS": "5",
            "KOMPRESSOR_NAMESPACES": self.namespace,
            "KOMPRESSOR_HEALTH_HOST": "127.0.0.1",
            "KOMPRESSOR_HEALTH_PORT": "0",
            "KOMPRESSOR_LOG_LEVEL": os.environ.get("KOMPRESSOR_LOG_LEVEL", "INFO"),
        }
        return environ | {f"KOMPRESSOR_{name.upper()}": value for name, value in settings.items()}

    # ---- what is on the stage

    def path(self, plural: str, name: str = "", sub: str = "") -> str:
        base = BASES.get(plural, "/api/v1")
        return "/".join(part for part in (f"{base}/namespaces/{self.namespace}/{plural}", name, sub) if part)

    def get(self, plural: str, name: str) -> Manifest:
        return self.api.call("GET", self.path(plural, name))

    def list(self, plural: str, selector: str = "") -> list[Manifest]:
        query = f"?labelSelector={selector}" if selector else ""
        items: list[Manifest] = self.api.call("GET", self.path(plural) + query)["items"]
        return items

    def create(self, plural: str, body: Manifest, query: str = "") -> Manifest:
        return self.api.call("POST", self.path(plural) + query, body)

    def patch(self, plural: str, name: str, body: Manifest, sub: str = "") -> Manifest:
        return self.api.call("PATCH", self.path(plural, name, sub), body)

    def delete(self, plural: str, name: str, **options: Any) -> None:
        self.api.call("DELETE", self.path(plural, name), {"kind": "DeleteOptions", "apiVersion": "v1", **options})

    def play(self, *script: str, name: str = "play", beside: Manifest | None = None, **spec: Any) -> str:
        """Applies a CompressionJob whose worker does this, at once unless `preflight="Job"`; `beside` stands beside its spec.

        Returns its uid.
        """
        full = {
            "model": {"source": {"uri": "s3://models/one"}},
            "output": {"uri": "s3://models/two"},
            "passes": [{"rtn": {"scheme": "W8A8", "ignore": list(script)}}],
            "preflight": "Skip",
        } | spec
        body = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name}, "spec": full} | (beside or {})
        return str(self.create("compressionjobs", body)["metadata"]["uid"])

    def status(self, name: str = "play") -> Manifest:
        found: Manifest = self.get("compressionjobs", name).get("status", {})
        return found

    def conditions(self, name: str = "play") -> dict[str, str]:
        return {c["type"]: c["status"] for c in self.status(name).get("conditions", [])}

    def condition(self, name: str, kind: str) -> Manifest:
        """Empty if there is none."""
        return next((c for c in self.status(name).get("conditions", []) if c["type"] == kind), {})

    def reason(self, name: str = "play") -> str:
        return str(self.condition(name, "Ready").get("reason", ""))

    def message(self, name: str = "play") -> str:
        return next(c["message"] for c in self.status(name)["conditions"] if c["type"] == "Ready")

    def cue(self, cue: str, name: str = "play") -> None:
        """Lets a worker go on that waits for it with `held`."""
        self.patch("compressionjobs", name, {"status": {"progress": {"unit": cue}}}, sub="status")

    def until(self, reason: str, name: str = "play", seconds: float = PATIENCE) -> Manifest:
        """The status, once Ready has this reason."""
        try:
            eventually(lambda: self.reason(name) == reason, seconds)
        except AssertionError:
            raise AssertionError(f"{name}: not {reason} within {seconds} s, but {json.dumps(self.status(name), indent=1)}") from None
        return self.status(name)

    def events(self, name: str = "play") -> list[str]:
        """Reasons of the events about a CompressionJob, oldest first."""
        about = [e for e in self.list("events") if e["involvedObject"]["kind"] == names.KIND and e["involvedObject"]["name"] == name]
        return [e["reason"] for e in sorted(about, key=lambda e: int(e["metadata"]["resourceVersion"]))]

    def version(self, plural: str) -> str:
        """The collection's resource version: where a watch that sees everything from now on begins."""
        return str(self.api.call("GET", self.path(plural))["metadata"]["resourceVersion"])

    def changes(self, since: str) -> dict[str, list[str]]:
        """Reasons of Ready that every CompressionJob has gone through since that version, by name: a watch tells each write."""
        reasons: dict[str, list[str]] = {}
        before: dict[str, tuple[str, str]] = {}
        last = {(job["metadata"]["name"], job["metadata"]["resourceVersion"]) for job in self.list("compressionjobs")}
        for event in self.api.watch(self.path("compressionjobs") + f"?watch=1&resourceVersion={since}&timeoutSeconds=60"):
            meta, status = event["object"]["metadata"], event["object"].get("status", {})
            ready = next((c["reason"] for c in status.get("conditions", []) if c["type"] == "Ready"), "")
            if ready and before.get(meta["name"]) != (ready, status["phase"]):
                before[meta["name"]] = (ready, status["phase"])
                reasons.setdefault(meta["name"], []).append(ready)
            last.discard((meta["name"], meta["resourceVersion"]))
            if not last:
                return reasons
        raise AssertionError(f"the watch did not tell {sorted(last)}")

    def jobs(self, uid: str) -> list[Manifest]:
        return sorted(self.list("jobs", f"{names.LABEL_JOB_UID}={uid}"), key=lambda job: str(job["metadata"]["name"]))

    def pods(self, uid: str) -> list[Manifest]:
        return self.list("pods", f"{names.LABEL_JOB_UID}={uid}")

    def acting(self, uid: str, after: str = "") -> Manifest:
        """The pod of a job that goes on, once it heeds signals: the first process of a container ignores those that it does not handle.

        `after`: not the pod with this uid, but one that follows it.
        """
        return eventually(lambda: next((p for p in self.pods(uid) if p["metadata"]["uid"] != after and self._log(p) == "acting\n"), None))

    def children(self, uid: str) -> list[Manifest]:
        kinds = ("configmaps", "serviceaccounts", "roles", "rolebindings", "jobs", "pods")
        return [child for kind in kinds for child in self.list(kind, f"{names.LABEL_JOB_UID}={uid}")]

    def _log(self, pod: Manifest) -> str:
        meta = pod["metadata"]
        if pod["status"]["phase"] != "Running" or "deletionTimestamp" in meta:
            return ""
        return self.cluster.kubectl("logs", "-n", self.namespace, meta["name"])

    def _accepts(self) -> bool:
        try:
            self.cluster.kubectl("get", "compressionjobs", "-A")
            return True
        except Exception:
            return False

    def _write_kubeconfig(self, token: str) -> None:
        cluster = {"server": self.cluster.server, "certificate-authority": str(self.cluster.ca)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        }
        (self.root / "operator.kubeconfig").write_text(json.dumps(config))


def gone(stage: Stage, name: str) -> bool:
    """Is there no such CompressionJob any more?"""
    try:
        stage.get("compressionjobs", name)
    except ApiRefusal as refusal:
        return refusal.status == 404
    return False
