"""`helm upgrade` from the previous version with jobs at work, and back again; its chart and operator are in previous/.

The operator of then runs from its own code, below its own image name; workers are actors that go on until the test says so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_chart import ACTOR, CHART, Manifest, apply, cluster, install, namespaces, wait_until  # noqa: F401  (fixtures)

from cluster_access import Cluster
from kompressor_api import names
from local_cluster import LocalCluster
from processes import free_ports

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
PREVIOUS = Path(__file__).parent / "previous"
OLD_IMAGE, NEW_IMAGE = "kompressor/worker:0.1.0", "kompressor/worker:next"

HELD = (
    "S=/var/run/secrets/kubernetes.io/serviceaccount; trap 'exit 75' TERM; until curl -s --cacert $S/ca.crt "
    '-H "Authorization: Bearer $(cat $S/token)" https://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT'
    f'/apis/{names.API_VERSION}/namespaces/$POD_NAMESPACE/{names.PLURAL}/$PLAY | grep -q \'"unit": *"go"\'; do sleep 0.2; done'
)
DONE = """echo '{"reason": "Completed", "message": "4.0x smaller", "exitCode": 0}' > /dev/termination-log; exit 0"""
LESS_MEMORY = f"""[ -n "${names.ENV_MEMORY_PLAN}" ] || exit 71; {DONE}"""


def job(name: str, *script: str, **spec: Any) -> Manifest:
    places: Manifest = {"model": {"source": {"uri": "s3://models/source"}}, "output": {"uri": f"s3://models/{name}"}}
    full = places | {"passes": [{"rtn": {"scheme": "W4A16", "ignore": list(script)}}]} | spec
    return {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name, "namespace": "team-a"}, "spec": full}


JOBS = (job("running", HELD, DONE), job("retrying", HELD, LESS_MEMORY), job("stopped", HELD, DONE, suspend=True), job("done", DONE))


class Seen:
    """Namespace team-a, as an administrator sees it."""

    def __init__(self, cluster: Cluster) -> None:  # noqa: F811
        self.cluster = cluster

    def reason(self, name: str) -> str:
        status = self.cluster.get("kcj", name, "-n", "team-a").get("status", {})
        return next((c["reason"] for c in status.get("conditions", []) if c["type"] == "Ready"), "")

    def jobs(self) -> dict[str, str]:
        """Name of each child Job that compresses -> its uid."""
        found = self.cluster.get("jobs", "-n", "team-a")["items"]
        return {j["metadata"]["name"]: j["metadata"]["uid"] for j in found if j["metadata"]["labels"].get(names.LABEL_STEP) != "preflight"}

    def steps(self) -> set[str]:
        """Of the child Jobs, as labels say; the operator of then does not write them."""
        found = self.cluster.get("jobs", "-n", "team-a")["items"]
        return {j["metadata"]["labels"].get(names.LABEL_STEP, "") for j in found}

    def pods(self) -> dict[str, int]:
        """Name -> restarts of each pod at work."""
        found = self.cluster.get("pods", "-n", "team-a", "--field-selector=status.phase=Running")["items"]
        return {p["metadata"]["name"]: p["status"]["containerStatuses"][0]["restartCount"] for p in found}

    def image(self, job: str) -> str:
        found: str = self.cluster.get("job", job, "-n", "team-a")["spec"]["template"]["spec"]["containers"][0]["image"]
        return found

    def cue(self, *jobs: str) -> None:
        for name in jobs:
            patch = json.dumps({"status": {"progress": {"unit": "go"}}})
            self.cluster.kubectl("patch", "kcj", name, "-n", "team-a", "--subresource=status", "--type=merge", f"-p={patch}")

    def until(self, name: str, *reasons: str) -> None:
        told = lambda: json.dumps(self.cluster.get("kcj", name, "-n", "team-a").get("status"), indent=1)  # noqa: E731
        wait_until(lambda: self.reason(name) in reasons, f"{name}: {reasons}", tell=told)


def images(wanted: Cluster) -> None:
    if not isinstance(wanted, LocalCluster):
        pytest.skip("the operator of then is not in a registry")
    path = [str(Path(sys.executable).parent)]
    user = {"keep": [str(ROOT)], "user": 65532, "group": 65532}
    actor = {**user, "path": [str(ACTOR), *path]}
    then = {**user, "path": path, "env": {"PYTHONPATH": str(PREVIOUS / "operator-0.1.0.zip")}}
    wanted.add_images({"kompressor/operator:previous": then, NEW_IMAGE: actor})


@pytest.fixture
def upgraded(cluster: Cluster, namespaces: None) -> Callable[..., str]:  # noqa: F811
    images(cluster)
    (port,) = free_ports(1)

    def to(chart: Path, *flags: str) -> str:
        return install(cluster, f"--set=healthPort={port}", *flags, chart=chart)

    return to


def test_jobs_at_work_do_not_notice_an_upgrade(cluster: Cluster, upgraded: Callable[..., str]) -> None:  # noqa: F811
    seen, old = Seen(cluster), PREVIOUS / "kompressor-0.1.0.tgz"
    upgraded(old, "--set=image.tag=previous")
    apply(cluster, *JOBS)
    for name, reason in (("running", "Compressing"), ("retrying", "Compressing"), ("stopped", "Suspended"), ("done", "Completed")):
        seen.until(name, reason)
    wait_until(lambda: len(seen.pods()) == 2, "both workers")
    before = seen.jobs(), seen.pods()
    assert seen.steps() == {""}, "the operator of then"

    upgraded(CHART, "--set=worker.image.tag=next")
    apply(cluster, {**job("later", DONE), "spec": {**job("later", DONE)["spec"], "preflight": "Skip"}})
    seen.until("later", "Completed")
    assert names.Step.COMPRESS in seen.steps(), "the operator of now"
    now = seen.jobs()
    assert before == ({name: uid for name, uid in now.items() if name in before[0]}, seen.pods()), "the same Jobs, the same pods"
    assert len(now) == len(before[0]) + 1 and seen.reason("done") == "Completed", "nothing runs again"

    seen.cue("retrying")
    seen.until("retrying", "Completed")
    cluster.kubectl("patch", "kcj", "stopped", "-n", "team-a", "--type=merge", '-p={"spec":{"suspend":false}}')
    seen.until("stopped", "Compressing")
    first, second = sorted(name for name in seen.jobs() if name.startswith("retrying"))
    assert seen.image(first) == seen.image(second) == OLD_IMAGE, "an attempt goes on with the worker of the one before"
    (stopped,) = (name for name in seen.jobs() if name.startswith("stopped"))
    assert seen.image(stopped) == NEW_IMAGE

    cluster.helm("rollback", "one", "1", "-n", "system", "--wait", "--timeout", "240s")
    seen.cue("running", "stopped")
    for name in ("running", "stopped"):
        seen.until(name, "Completed")
    assert {name: uid for name, uid in seen.jobs().items() if name.startswith("running")}.items() <= before[0].items()
