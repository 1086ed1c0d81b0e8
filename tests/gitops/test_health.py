"""What kstatus, Argo CD and Flux make of every status that the operator can write: each of them asked itself, none imitated."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from kcj_builders import NOW, child, complete, condition, failed, judge, kcj, pod

from gitops.health_judges import ON_THE_WAY, ROOT, ArgoCD, Flux, kstatus, words_for
from kompressor_api import names
from kompressor_api.names import Reason
from kompressor_operator.conditions import Phase, Verdict, generation_patch, status_patch
from kompressor_operator.observed import CompressionJob
from kompressor_operator.refusals import conflict, refusal

Object = dict[str, Any]


def as_object(job: CompressionJob, **status: Any) -> Object:
    meta = {"name": job.name, "namespace": job.namespace, "uid": job.uid, "generation": job.generation}
    told = {name: value for name, value in (job.status | status).items() if value is not None}
    return {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": meta, "spec": job.spec, "status": told}


def told(job: CompressionJob, verdict: Verdict) -> Object:
    """The resource once the operator has written what it thinks."""
    return as_object(job, **status_patch(job, verdict, NOW))


def decided(job: CompressionJob, *children: Any, **fields: Any) -> Object:
    """The same for what the policies say about these children."""
    decision = judge(job, *children, **fields)
    assert decision.verdict, decision
    return told(job, decision.verdict)


@pytest.fixture(scope="module")
def argo() -> ArgoCD:
    return ArgoCD()


@pytest.fixture(scope="module")
def flux() -> Flux:
    return Flux()


RUNNING = {"jobName": "llama-1", "attempt": 1, "conditions": [condition("Ready", "False", reason="Compressing")]}
SUSPENDED = RUNNING | {"conditions": [condition("Suspended")]}

LIVES: dict[str, tuple[Object, Phase, str]] = {
    "starts": (decided(kcj()), Phase.PENDING, "Pending"),
    "queued": (decided(kcj(queueName="gpu")), Phase.QUEUED, "Queued"),
    "held by something else": (decided(kcj(status=RUNNING), child(suspended=True)), Phase.QUEUED, "Queued"),
    "preflight": (decided(kcj(preflight="Job", status={"conditions": [condition("Ready", "False")]})), Phase.VALIDATING, "Preflight"),
    "invalid": (decided(kcj(passes=[{"rtn": {"scheme": "W4A16", "grupSize": 64}}])), Phase.FAILED, "InvalidSpec"),
    "no room": (told(kcj(), refusal("Job", "llama-1", 403, "exceeded quota: x").verdict(NOW)), Phase.PENDING, "QuotaExceeded"),
    "namesake": (told(kcj(), conflict("Job", "team", "llama-1").verdict(NOW)), Phase.PENDING, "NameConflict"),
    "runs": (decided(kcj(status=RUNNING), child(), pod()), Phase.COMPRESSING, "Compressing"),
    "again in place": (decided(kcj(status=RUNNING), child(failed=1), pod(exit=74)), Phase.RETRYING, "Retrying"),
    "smaller": (decided(kcj(status=RUNNING), failed(), pod(exit=71)), Phase.RETRYING, "Retrying"),
    "suspended": (decided(kcj(suspend=True, status=RUNNING), child(), pod()), Phase.SUSPENDED, "Suspended"),
    "suspended before": (decided(kcj(suspend=True)), Phase.SUSPENDED, "Suspended"),
    "resumed": (decided(kcj(status=SUSPENDED), child(), pod()), Phase.COMPRESSING, "Compressing"),
    "done": (decided(kcj(status=RUNNING), complete(), pod(exit=0)), Phase.COMPLETE, "Completed"),
    "done while suspended": (decided(kcj(suspend=True, status=SUSPENDED), complete(), pod(exit=0)), Phase.COMPLETE, "Completed"),
    "broken source": (decided(kcj(status=RUNNING), failed(), pod(exit=65)), Phase.FAILED, "CorruptSource"),
    "gate": (decided(kcj(status=RUNNING), failed(), pod(exit=67)), Phase.FAILED, "GateFailed"),
    "too late": (decided(kcj(status=RUNNING), failed(reason="DeadlineExceeded")), Phase.FAILED, "DeadlineExceeded"),
}


@pytest.mark.parametrize("name", LIVES)
def test_lives_are_what_they_are_called(name: str) -> None:
    found, phase, reason = LIVES[name]
    (ready,) = [c for c in found["status"]["conditions"] if c["type"] == "Ready"]
    assert (found["status"]["phase"], ready["reason"]) == (phase, reason)


def test_lives_meet_every_phase() -> None:
    assert {phase for _, phase, _ in LIVES.values()} == set(Phase)


def test_every_life_is_judged_rightly(kstatus_judge: Path, argo: ArgoCD, flux: Flux) -> None:
    computed = kstatus((found for found, _, _ in LIVES.values()), kstatus_judge)
    for (name, (found, phase, reason)), word in zip(LIVES.items(), computed, strict=True):
        health, message = argo(found)
        assert (word, health, flux(found)) == words_for(phase), name
        assert message.startswith(reason), name


def test_every_phase_with_every_reason(kstatus_judge: Path, argo: ArgoCD, flux: Flux) -> None:
    """Reasons never change what a tool makes of a phase; nor does what was before; another generation is always in progress."""
    before = [kcj(), kcj(status=SUSPENDED)]
    rows = [(told(job, Verdict(phase, reason, "words")), phase, reason) for phase, reason, job in product(Phase, Reason, before)]
    assert len(rows) == 2 * len(Phase) * len(Reason)
    for (found, phase, reason), word in zip(rows, kstatus((row[0] for row in rows), kstatus_judge), strict=True):
        health, message = argo(found)
        assert (word, health, flux(found)) == words_for(phase), (phase, reason)
        assert message == f"{reason}: words"


def test_a_new_generation_is_in_progress_until_the_operator_has_seen_it(kstatus_judge: Path, argo: ArgoCD, flux: Flux) -> None:
    """Also one whose TTL is changed after the end, which then holds for the new generation."""
    for phase in Phase:
        job = kcj()
        stored = replace(job, generation=2, status=told(job, Verdict(phase, "Any", "words"))["status"])
        judged = [as_object(stored), as_object(stored, **generation_patch(stored))]
        first, then = kstatus(judged, kstatus_judge)
        assert (first, argo(judged[0])[0], flux(judged[0])) == ON_THE_WAY, phase
        assert (then, argo(judged[1])[0], flux(judged[1])) == words_for(phase), phase


def test_a_job_that_was_just_created_is_not_done(kstatus_judge: Path, argo: ArgoCD, flux: Flux) -> None:
    """It has the status that the CRD gives it, and no conditions. Without that one kstatus would call it current."""
    (version,) = yaml.safe_load((ROOT / "crds" / "compressionjobs.yaml").read_text())["spec"]["versions"]
    default = version["schema"]["openAPIV3Schema"]["properties"]["status"]["default"]
    new = as_object(replace(kcj(), status=default))
    assert (*kstatus([new], kstatus_judge), argo(new)[0], flux(new)) == ON_THE_WAY
    seen = as_object(replace(kcj(), status={"observedGeneration": 1}))
    assert argo(seen)[0] == "Progressing" and flux(seen) == "InProgress", "no conditions are no error"
    bare = {name: value for name, value in new.items() if name != "status"}
    assert kstatus([bare], kstatus_judge) == ["Current"] and argo(bare)[0] == "Progressing"


def test_a_job_that_is_being_deleted_is_terminating(kstatus_judge: Path) -> None:
    """A finalizer of ours may hold it for a while, done or not."""
    found = [told(kcj(), Verdict(phase, "Any", "")) for phase in Phase]
    for each in found:
        each["metadata"] |= {"deletionTimestamp": "2026-01-02T03:04:05Z", "finalizers": [names.FINALIZER]}
    assert set(kstatus(found, kstatus_judge)) == {"Terminating"}
