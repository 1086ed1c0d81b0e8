"""Every version of every status that a real cluster sees, from creation to deletion: what kstatus, Argo CD and Flux made of it. And what
docs/first-job.md tells people to type. What holds a job up has a table of its own: test_stage_held_up.py.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from stage import GO_ON, HELD, ROOT, SUCCEED, Stage, eventually, report
from versions import Versions, judged

from kompressor_api import names
from test_docs import commands

pytestmark = pytest.mark.cluster

Manifest = dict[str, Any]
ENDS = {
    "good": "Completed",
    "smaller": "Completed",
    "there": "AlreadyCompressed",
    "misspelt": "InvalidSpec",
    "storage": "StorageFailed",
    "late": "DeadlineExceeded",
    "code-65": "CorruptSource",
    "code-66": "BadNumerics",
    "code-67": "GateFailed",
    "norecipe": "RecipeNotFound",
    "nowhere": "Unschedulable",
    "waits": "Queued",
    "asleep": "Suspended",
}
"""The last word of each job."""


def begin(stage: Stage) -> None:
    """All paths at once: they have nothing to do with each other."""
    already = report("AlreadyCompressed", "it is there", 0, ratio="4.0x", outputBytes=25)
    looks = [{"rtn": {"scheme": "W8A8", "ignore": ["exit 1"], "targets": ["sleep 5", already]}}]
    stage.play(HELD, "held end", SUCCEED, name="good")
    stage.play("[ $KOMPRESSOR_MEMORY_PLAN ] || exit 71", SUCCEED, name="smaller")
    stage.play(name="there", passes=looks, preflight="Job")
    stage.play(name="misspelt", passes=[{"rtn": {"scheme": "W8A8", "grupSize": 64}}])
    stage.play("exit 74", name="storage", retry={"limit": 1})
    stage.play(GO_ON, name="late", activeDeadlineSeconds=2)
    for code in (65, 66, 67):
        stage.play(f"exit {code}", name=f"code-{code}")
    spec = {"model": {"source": {"uri": "s3://models/one"}}, "output": {"uri": "s3://models/two"}, "recipeRef": {"name": "none"}}
    body = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": "norecipe"}, "spec": spec}
    stage.create("compressionjobs", body)
    stage.play(SUCCEED, name="nowhere", worker={"nodeSelector": {"there": "is-none"}})
    stage.play(SUCCEED, name="waits", queueName="gpu")
    stage.play(SUCCEED, name="asleep", suspend=True)
    stage.play(GO_ON, name="stops")
    stage.play(GO_ON, name="goes", deletionPolicy="Delete")


def applied_again(stage: Stage, tmp_path: Path) -> None:
    """Somebody else applies the same manifest, as GitOps tools do all the time: no conflict, no change."""
    before = stage.get("compressionjobs", "good")
    manifest = {**{key: before[key] for key in ("apiVersion", "kind", "spec")}, "metadata": {"name": "good"}}
    file = tmp_path / "good.json"
    file.write_text(json.dumps(manifest))
    stage.cluster.kubectl("apply", "-n", stage.namespace, "--server-side", "--field-manager=gitops", "-f", str(file))
    stage.cluster.kubectl("diff", "-n", stage.namespace, "--server-side", "--field-manager=gitops", "-f", str(file))
    after = stage.get("compressionjobs", "good")
    assert (after["metadata"]["generation"], after["spec"]) == (1, before["spec"])
    assert not after["metadata"].keys() & {"finalizers", "annotations"}


def test_every_version_is_judged_rightly_and_the_docs_commands_work(stage: Stage, kstatus_judge: Path, tmp_path: Path) -> None:
    versions = Versions(stage)
    begin(stage)
    with stage.operator():
        stage.until("Compressing", "good")
        applied_again(stage, tmp_path)
        stage.cue("end", "good")
        for name in ("stops", "goes"):
            stage.acting(stage.get("compressionjobs", name)["metadata"]["uid"])
        stage.until("Compressing", "stops")
        stage.patch("compressionjobs", "stops", {"spec": {"suspend": True}})
        stage.delete("compressionjobs", "goes")
        eventually(
            lambda: stage.reason("stops") == "Suspended" and not stage.pods(stage.get("compressionjobs", "stops")["metadata"]["uid"])
        )
        stage.patch("compressionjobs", "stops", {"spec": {"suspend": False}})
        for name, reason in ENDS.items():
            stage.until(reason, name)
        stage.until("Compressing", "stops")
        eventually(lambda: all(job["metadata"]["name"] != "goes" for job in stage.list("compressionjobs")))
        applied_again(stage, tmp_path)
        type_what_the_docs_say(stage)
        met, last = judged(versions.told(), kstatus_judge)
    phases = {"New", "Pending", "Validating", "Queued", "Compressing", "Retrying", "Suspended", "Complete", "Failed"}
    assert met == phases | {"Terminating"}, "every row of the table was met"
    assert {name for name, word in last.items() if word == "Current"} == {"good", "smaller", "there"}
    assert {name for name, word in last.items() if word == "Failed"} == {"misspelt", "storage", "late", "code-65", "code-66", "code-67"}


def type_what_the_docs_say(stage: Stage) -> None:
    """Each `kubectl get` and `kubectl wait` of the page, about a job to which it applies."""
    about = {"Failed": ["code-65"], "Suspended": ["asleep"], "completionTime": ["good", "code-65"]}
    lines = [line for line in commands(ROOT / "docs" / "first-job.md") if line.startswith(("kubectl wait", "kubectl get kcj quickstart"))]
    assert len(lines) >= 6
    for line in lines:
        for name in next((jobs for word, jobs in about.items() if word in line), ["good"]):
            words = [word.replace("quickstart", name) for word in shlex.split(line)[1:]]
            assert stage.cluster.kubectl(*words, "-n", stage.namespace).strip(), line
