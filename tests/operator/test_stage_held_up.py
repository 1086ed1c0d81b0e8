"""What holds a job up: its conditions exactly, in the words of whoever holds it up, and the remedy that is told with it cures it.

Every version of every status is judged by kstatus, Argo CD and Flux too, as in test_stage_truth.py.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from stage import IMAGE, SUCCEED, Stage, eventually
from test_stage_failures import STUBBORN, completes_again
from versions import Versions, judged, reasons

from kompressor_api.failures import ANEW, advice_for
from kompressor_api.names import Reason, Step

pytestmark = pytest.mark.cluster

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Held:
    """All of this stands in the conditions, and nothing else."""

    reason: Reason
    says: str
    """The message between whom it is about and the remedy, in the words of whoever holds it up: a pattern."""
    step: Step = Step.COMPRESS
    remedy: str = ""
    """Where docs/failures.md has another one for this reason."""


NO_SECRET, NO_IMAGE = r'secret "models" not found', "the image cannot be pulled: .*{}: not found.*"
FULL = r'Error creating: pods "\S+" is forbidden: exceeded quota: small, requested: pods=1, used: pods=0, limited: pods=0'
UNNAMED = r'Error creating: pods "\S+" is forbidden: failed quota: small: must specify limits\.cpu for: worker'
NO_JOB = r'jobs\.batch "\S+" is forbidden: exceeded quota: small, requested: count/jobs\.batch=1, used: count/jobs\.batch=2, limited: .*=2'
RAISE = "end what else counts against that quota, or raise it; the operator tries again"
DEFAULT = "give the namespace a LimitRange with a default for it, and the pod follows by itself"
NAME_IT = f"{DEFAULT}; or name it in spec.worker.resources, {ANEW}"

HELD_UP = {
    "image": Held(Reason.IMAGE_PULL_FAILED, NO_IMAGE.format("absent:1")),
    "image-first": Held(Reason.IMAGE_PULL_FAILED, NO_IMAGE.format("absent:2"), Step.PREFLIGHT),
    "secret": Held(Reason.SECRET_MISSING, NO_SECRET),
    "secret-first": Held(Reason.SECRET_MISSING, NO_SECRET, Step.PREFLIGHT),
    "key": Held(Reason.SECRET_MISSING, r"couldn't find key AWS_ACCESS_KEY_ID in Secret \S+/results"),
    "gpu": Held(Reason.UNSCHEDULABLE, r"0/\d+ nodes are available: .*\d Insufficient nvidia\.com/gpu.*"),
    "claim": Held(Reason.VOLUME_NOT_MOUNTED, r'0/\d+ nodes are available: .*persistentvolumeclaim "models" not found.*', Step.PREFLIGHT),
    "far-first": Held(Reason.UNSCHEDULABLE, r"0/\d+ nodes are available: .*match PersistentVolume's node affinity.*", Step.PREFLIGHT),
    "bundle": Held(Reason.VOLUME_NOT_MOUNTED, r'MountVolume\.SetUp failed for volume "ca-output" : configmap "private-ca" not found'),
    "account": Held(
        Reason.POD_REFUSED,
        r'Error creating: .*serviceaccount "mine" not found',
        remedy="create the account that spec.worker.serviceAccountName names",
    ),
    "silent": Held(Reason.NODE_LOST, "its node node-silent does not answer"),
    "lost": Held(Reason.NODE_LOST, "its node node-lost does not answer"),
}
IN_A_SMALL_QUOTA = {
    "full": Held(Reason.QUOTA_EXCEEDED, FULL),
    "full-first": Held(Reason.QUOTA_EXCEEDED, FULL, Step.PREFLIGHT),
    "crowded": Held(Reason.QUOTA_EXCEEDED, NO_JOB, remedy=RAISE),
}
IN_A_LARGER_QUOTA = {
    "full": Held(Reason.POD_REFUSED, UNNAMED, remedy=NAME_IT),
    "full-first": Held(Reason.POD_REFUSED, UNNAMED, Step.PREFLIGHT, remedy=DEFAULT),
    "crowded": Held(Reason.POD_REFUSED, UNNAMED, remedy=NAME_IT),
}
"""One that counts what their pods do not name."""
NEW_NODE = {"required": {"nodeSelectorTerms": [{"matchExpressions": [{"key": "kompressor.test/new", "operator": "Exists"}]}]}}
ON_A_NODE = ("silent", "lost", "gone")
"""Each on a node of its own that stops to answer; the last one's is deleted."""


def told_exactly(stage: Stage, rows: dict[str, Held]) -> None:
    for name, held in rows.items():
        conditions = stage.until(held.reason, name)["conditions"]
        validated = ("Unknown", "Preflight") if held.step is Step.PREFLIGHT else ("True", "Valid")
        states = {c["type"]: (c["status"], c["reason"]) for c in conditions}
        assert states == {"Ready": ("False", held.reason), "Reconciling": ("True", held.reason), "Validated": validated}, name
        (message,) = {c["message"] for c in conditions if c["type"] != "Validated"}
        remedy = held.remedy or advice_for(held.reason, held.step)
        assert re.fullmatch(rf"(pod|Job) {name}-\S+: {held.says}; {re.escape(remedy)}", message), message


def begin_held_up(stage: Stage) -> None:
    """All at once, in a namespace where next to nothing is."""
    stage.create("secrets", {"metadata": {"name": "results"}, "stringData": {"OTHER": "x"}})
    place, models, first = "s3://models/two", {"source": {"uri": "s3://models/one", "credentialsSecret": "models"}}, {"preflight": "Job"}
    stage.play(SUCCEED, name="image", worker={"image": "absent:1"})
    stage.play(SUCCEED, name="image-first", worker={"image": "absent:2"}, **first)
    stage.play(SUCCEED, name="secret", model=models)
    stage.play(SUCCEED, name="secret-first", model=models, **first)
    stage.play(SUCCEED, name="key", output={"uri": place, "credentialsSecret": "results"})
    stage.play(SUCCEED, name="gpu", worker={"resources": {"limits": {"nvidia.com/gpu": 1}}})
    stage.play(SUCCEED, name="claim", model={"source": {"uri": "pvc://models/one"}}, **first)
    stage.play(SUCCEED, name="far-first", model={"source": {"uri": "pvc://far/one"}}, **first)
    stage.play(SUCCEED, name="bundle", output={"uri": place, "caBundle": {"configMap": "private-ca"}})
    stage.play(SUCCEED, name="account", worker={"serviceAccountName": "mine"})


def cure(stage: Stage, folder: Path) -> None:
    """As the remedies say it for a job as it is, but for the node that some wait for."""
    stage.cluster.add_images({"absent:1": IMAGE, "absent:2": IMAGE})
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    stage.create("secrets", {"metadata": {"name": "models"}, "stringData": keys})
    stage.patch("secrets", "results", {"stringData": keys})
    stage.create("configmaps", {"metadata": {"name": "private-ca"}, "data": {"ca.crt": "x"}})
    stage.create("serviceaccounts", {"metadata": {"name": "mine"}})
    claim(stage, "models", folder)


def claim(stage: Stage, name: str, folder: Path, **volume: Any) -> None:
    modes, size = {"accessModes": ["ReadWriteOnce"]}, {"storage": "1Gi"}
    reserved = {"claimRef": {"namespace": stage.namespace, "name": name}, "hostPath": {"path": str(folder)}}
    body = {"metadata": {"name": f"{stage.namespace}-{name}"}, "spec": modes | reserved | {"capacity": size} | volume}
    stage.api.call("POST", "/api/v1/persistentvolumes", body)
    wanted = {"storageClassName": "", "volumeName": body["metadata"]["name"], "resources": {"requests": size}}
    stage.create("persistentvolumeclaims", {"metadata": {"name": name}, "spec": modes | wanted})
    eventually(lambda: stage.get("persistentvolumeclaims", name)["status"].get("phase") == "Bound")


def set_quota(stage: Stage, **hard: str) -> None:
    stage.patch("resourcequotas", "small", {"spec": {"hard": hard}})
    eventually(lambda: stage.get("resourcequotas", "small").get("status", {}).get("hard") == hard)


@contextmanager
def with_small_quota(stage: Stage) -> Iterator[Stage]:
    """The stage in another namespace: no pods, two Jobs."""
    other = copy.copy(stage)
    other.enter_namespace()
    try:
        other.create("resourcequotas", {"metadata": {"name": "small"}})
        set_quota(other, **{"pods": "0", "count/jobs.batch": "2"})
        yield other
    finally:
        other.leave_namespace()


def begin_on_nodes(stage: Stage) -> dict[str, Manifest]:
    """Returns the pods that run there, until their nodes fall silent."""
    stays = {"key": "node.kubernetes.io/unreachable", "operator": "Exists"}
    uids = {}
    for name in ON_A_NODE:
        worker = {"nodeSelector": {f"kompressor.test/{name}": "yes"}} | ({"tolerations": [stays]} if name == "silent" else {})
        uids[name] = stage.play(*STUBBORN, name=name, retry={"limit": 0}, worker=worker)
    pods = {name: stage.acting(uid) for name, uid in uids.items()}
    for name in ON_A_NODE:
        stage.until("Compressing", name)
        stage.cluster.kubectl("cordon", f"node-{name}")  # or others would be lost with it
        stage.silence_node(f"node-{name}")
    stage.cluster.kubectl("delete", "node", "node-gone")
    return pods


def cure_nodes(stage: Stage, before: dict[str, Manifest]) -> None:
    """One comes back, one is said to be dead for good; of the one that was deleted Kubernetes clears the pods away within 80 seconds."""
    stage.resume_node("node-silent")
    stage.cluster.kubectl("taint", "node", "node-lost", "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute")
    stage.until("Compressing", "silent")
    stage.cue("end", "silent")
    for name in ("lost", "gone"):
        uid = stage.get("compressionjobs", name)["metadata"]["uid"]
        assert completes_again(stage, name, uid, before[name])["spec"]["nodeName"] == "node-new"
    stage.until("Completed", "silent")
    (same,) = stage.pods(stage.get("compressionjobs", "silent")["metadata"]["uid"])
    assert same["metadata"]["uid"] == before["silent"]["metadata"]["uid"]


def test_what_holds_a_job_up_is_told_exactly_and_its_remedy_cures_it(stage: Stage, kstatus_judge: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        for name in ON_A_NODE:
            stack.enter_context(stage.node(f"node-{name}", f"--labels=kompressor.test/{name}=yes,topology.kubernetes.io/zone={name}"))
        crowd = stack.enter_context(with_small_quota(stage))
        watched = Versions(stage), Versions(crowd)
        stack.enter_context(stage.operator(namespaces=f"{stage.namespace},{crowd.namespace}"))
        crowd.play(SUCCEED, name="full")
        crowd.play(SUCCEED, name="full-first", preflight="Job")
        before = begin_on_nodes(stage)
        claim(stage, "far", tmp_path, nodeAffinity=NEW_NODE)
        begin_held_up(stage)
        eventually(lambda: len(crowd.list("jobs")) == 2)
        crowd.play(SUCCEED, name="crowded")

        told_exactly(crowd, IN_A_SMALL_QUOTA)
        set_quota(crowd, **{"pods": "20", "count/jobs.batch": "20", "limits.cpu": "100"})
        told_exactly(stage, HELD_UP)
        cure(stage, tmp_path)
        labels = ",".join(f"kompressor.test/{name}=yes" for name in ("lost", "gone", "new"))
        stack.enter_context(stage.node("node-new", "--capacity=nvidia.com/gpu=1", f"--labels={labels}"))
        told_exactly(crowd, IN_A_LARGER_QUOTA)
        limits = {"limits": [{"type": "Container", "default": {"cpu": "200m"}, "defaultRequest": {"cpu": "10m"}}]}
        crowd.create("limitranges", {"metadata": {"name": "defaults"}, "spec": limits})
        cure_nodes(stage, before)

        ends = [(stage, name) for name in HELD_UP] + [(crowd, name) for name in IN_A_SMALL_QUOTA]
        for where, name in ends:
            where.until("Completed", name)
        versions = [version for each in watched for version in each.told()]
        for name in ("models", "far"):
            stage.api.call("DELETE", f"/api/v1/persistentvolumes/{stage.namespace}-{name}")
    told_once(versions)
    _, last = judged(versions, kstatus_judge)
    assert last == dict.fromkeys((*HELD_UP, *IN_A_SMALL_QUOTA, "gone"), "Current")


def told_once(versions: list[Manifest]) -> None:
    """What holds a job up does not come and go, and a node that is lost does not make it a new job."""
    on_the_way = ("Pending", "Preflight", "Compressing")
    for name in {*HELD_UP, *IN_A_SMALL_QUOTA} - {*ON_A_NODE}:
        rows = [table[name].reason for table in (HELD_UP, IN_A_SMALL_QUOTA, IN_A_LARGER_QUOTA) if name in table]
        assert [reason for reason in reasons(versions, name) if reason not in on_the_way] == [*rows, "Completed"], name
    assert reasons(versions, "silent") == ["Pending", "Compressing", "NodeLost", "Compressing", "Completed"]
    assert reasons(versions, "lost") == ["Pending", "Compressing", "NodeLost", "Retrying", "Compressing", "Completed"]
    assert reasons(versions, "gone") == ["Pending", "Compressing", "Retrying", "Compressing", "Completed"]
