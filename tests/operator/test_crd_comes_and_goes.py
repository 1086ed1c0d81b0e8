"""The CRD may come after the operator, go, and come back: `kubectl apply -f crds/` in any order, a chart taken away and put back."""

from __future__ import annotations

import pytest
from stage import ROOT, SUCCEED, ApiRefusal, Stage, eventually

pytestmark = pytest.mark.cluster

CRD = "compressionjobs.kompressor.io"


def play_as_soon_as_it_is_served(stage: Stage, name: str) -> None:
    def served() -> str:
        try:
            return stage.play(SUCCEED, name=name)
        except (ApiRefusal, ValueError):  # until it is there the API server answers in plain text
            return ""

    eventually(served)
    stage.until("Completed", name)


def test_the_crd_comes_after_the_operator_goes_and_comes_back(stage: Stage) -> None:
    kubectl = stage.cluster.kubectl
    kubectl("delete", "crd", CRD)
    try:
        with stage.operator(ready=False) as running:
            eventually(lambda: running.said("the CRD compressionjobs.kompressor.io is not installed"))
            assert running.probe("/healthz") == 200 and running.probe("/readyz") == 503
            kubectl("apply", "-f", str(ROOT / "crds"))
            play_as_soon_as_it_is_served(stage, "first")
            kubectl("delete", "crd", CRD)
            kubectl("apply", "-f", str(ROOT / "crds"))
            play_as_soon_as_it_is_served(stage, "second")
            assert running.process.poll() is None
    finally:
        kubectl("apply", "-f", str(ROOT / "crds"))
