"""A CRD that is newer than the operator: what it knows and we do not waits for a newer operator, and is no misspelt name."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from kcj_builders import NOW, judge, kcj
from stage import ROOT, SUCCEED, Stage, eventually

from kompressor_api.names import Reason
from kompressor_operator.cluster import ApiError
from kompressor_operator.conditions import Phase, conditions
from kompressor_operator.newer import FRESH_SECONDS, Served, outdated

CRD = "compressionjobs.kompressor.io"
FIELD = {"type": "string", "maxLength": 63, "description": "Of a release to come."}


class Hand:
    """A cluster whose CRD knows these fields of the spec."""

    def __init__(self, *fields: str, status: int = 0) -> None:
        self.fields, self.status, self.asked = fields, status, 0

    async def schema(self) -> dict[str, Any]:
        self.asked += 1
        if self.status:
            raise ApiError("reading the schema", self.status, "", "")
        passes = {"type": "array", "items": {"properties": {"awq": {"properties": {"grid": {}}}}}}
        return {"properties": {"spec": {"properties": {"passes": passes, **dict.fromkeys(self.fields, FIELD)}}}}


def known(served: Served, hand: Hand, *places: tuple[str | int, ...]) -> bool:
    return asyncio.run(served.all_known(hand, places))  # type: ignore[arg-type]  # as much of a Cluster as is asked


def test_what_the_api_server_is_asked_for() -> None:
    one = kcj(passes=[{"awq": {"grid": 8}}], someday="soon")
    asked = judge(one, misspelt=False)
    assert asked.unknown == (("spec", "someday"), ("spec", "passes", 0, "awq")) and asked.verdict is None
    refused = judge(one).verdict
    assert refused and (refused.phase, refused.reason) == (Phase.FAILED, Reason.INVALID_SPEC), "it does not know them either"
    for spec in ({"someday": 1, "retry": {"limit": -1}}, {"retry": {"limit": -1}}):
        assert judge(kcj(**spec), misspelt=False).verdict, "another fault ends it, whatever that is"


def test_names_are_looked_up_where_they_stand() -> None:
    served = Served()
    assert known(served, Hand("someday"), ("spec", "someday"), ("spec", "passes", 3, "awq", "grid"))
    for place in (("someday",), ("spec", "passes", "awq"), ("spec", "passes", 0, "awq", "gird"), ("spec", "someday", "x"), ("spec", 0)):
        assert not known(Served(), Hand("someday"), ("spec", "someday"), place)
    assert not known(Served(), Hand(status=403), ("spec", "someday"))
    with pytest.raises(ApiError):
        known(Served(), Hand(status=503), ("spec", "someday"))


def test_a_crowd_that_waits_asks_seldom_and_an_end_is_never_from_memory() -> None:
    now = [0.0]
    served, hand = Served(clock=lambda: now[0]), Hand("someday")
    for _ in range(5):
        assert known(served, hand, ("spec", "someday"))
    assert hand.asked == 1
    hand.fields = ("someday", "never")
    assert known(served, hand, ("spec", "never")) and hand.asked == 2, "the CRD has come since"
    hand.fields, now[0] = (), FRESH_SECONDS + 1
    assert not known(served, hand, ("spec", "someday")), "the CRD is gone since"


def test_what_the_status_says() -> None:
    verdict = outdated((("spec", "passes", 0, "awq"), ("spec", "someday"))).verdict(NOW)
    assert verdict.message.startswith("spec.passes[0].awq, spec.someday: ") and "helm upgrade" in verdict.message
    said = {c["type"]: (c["status"], c["reason"]) for c in conditions(kcj(), verdict, NOW)}
    late = "OperatorOutdated"
    assert said == {"Ready": ("False", late), "Reconciling": ("True", late), "Validated": ("Unknown", late)}


@pytest.mark.cluster
def test_a_job_waits_for_the_operator_that_knows_its_field(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kubectl, at = stage.cluster.kubectl, "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/someday"
    told = lambda: kubectl("get", "--raw", "/openapi/v3/apis/kompressor.io/v1alpha1")  # noqa: E731
    kubectl("patch", "crd", CRD, "--type=json", "-p", json.dumps([{"op": "add", "path": at, "value": FIELD}]))
    try:
        eventually(lambda: "Of a release to come." in told())
        with stage.operator():
            stage.play(SUCCEED, name="newer", someday="soon")
            stage.play(SUCCEED, name="misspelt", somday="soon")
            stage.until("InvalidSpec", "misspelt")
            stage.until("OperatorOutdated", "newer")
            assert stage.message("newer").startswith("spec.someday: ") and stage.list("jobs") == []
        shutil.copytree(ROOT / "crds" / "kompressor_api", tmp_path / "kompressor_api")
        models = tmp_path / "kompressor_api" / "v1alpha1.py"
        field, before = '    someday: Short | None = Field(default=None, description="Of a release to come.")\n', "    suspend: Flag ="
        models.write_text(models.read_text().replace(before, f"{field}{before}"))
        environ = {**stage.environ(), "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT / "operator")))}
        monkeypatch.setattr(stage, "environ", lambda **settings: environ)
        with stage.operator_process():
            stage.until("Completed", "newer")
        assert stage.reason("misspelt") == "InvalidSpec"
    finally:
        kubectl("patch", "crd", CRD, "--type=json", "-p", json.dumps([{"op": "remove", "path": at}]))
