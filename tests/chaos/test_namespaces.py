"""A namespace that goes at any moment takes everything along, and nothing hangs; a status whose fields the CRD does not keep, since it is
older or somebody has edited it, makes no second Job and no hot loop."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
from scene import Scene, Theatre
from stage import GO_ON, SUCCEED, ApiRefusal

pytestmark = pytest.mark.cluster

CRD = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/compressionjobs.kompressor.io"
FIELDS = ("attempt", "failures", "jobName", "plan")
MOMENTS = {"at once": "", "at work": "Compressing", "ended": "Completed"}


def namespace_gone(scene: Scene) -> bool:
    try:
        scene.stage.api.call("GET", f"/api/v1/namespaces/{scene.stage.namespace}")
    except ApiRefusal as refusal:
        return refusal.status == 404
    return False


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_namespace_goes(moment: str, theatre: Theatre) -> None:
    """With a clean-up to be done, which cannot be any more: a namespace that goes takes no new Job."""
    with theatre.scene(relist_seconds="5") as scene:
        operator = scene.raise_operator()
        scene.play(SUCCEED if moment == "ended" else GO_ON, deletionPolicy="Delete", output={"uri": "s3://models/two-0"})
        if MOMENTS[moment]:
            scene.until(MOMENTS[moment])
        scene.stage.leave_namespace()
        scene.witness.until(lambda: namespace_gone(scene) and "gone", what="the namespace has gone")
        time.sleep(1.0)
        before = scene.proxy.requests
        time.sleep(2.0)
        assert scene.proxy.requests - before < 10, "nobody is busy with what is gone"
        assert operator.process.poll() is None and operator.probe("/healthz") == 200


@pytest.fixture(params=FIELDS)
def pruned(request: pytest.FixtureRequest, theatre: Theatre) -> Iterator[str]:
    """Without this field of the status, until the test is over."""
    api, field = theatre.stage.api, str(request.param)
    crd = api.call("GET", CRD)
    (version,) = crd["spec"]["versions"]
    schema = json.dumps(version["schema"])
    del version["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"][field]
    api.call("PUT", CRD, crd)
    time.sleep(2.0)  # until every handler has it
    yield field
    again = api.call("GET", CRD)
    again["spec"]["versions"][0]["schema"] = json.loads(schema)
    api.call("PUT", CRD, again)
    time.sleep(2.0)


def test_a_field_that_is_not_kept(pruned: str, theatre: Theatre) -> None:
    with theatre.scene(relist_seconds="2") as scene:
        scene.raise_operator()
        scene.play(GO_ON, preflight="Job")
        scene.until("Compressing")
        before = scene.proxy.requests
        time.sleep(6.0)
        made = scene.proxy.requests - before
        assert made < 40, f"{made} requests in six seconds without status.{pruned}"
        scene.witness.check()
        assert len(scene.witness.children("jobs", scene.uid, ever=True)) == 1
        scene.strike()
    theatre.swept({scene.stage.namespace})
