"""What a decision can ask for beside starting a Job, done by the real API server with the operator's own role."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
from kcj_builders import SETTINGS
from stage import Stage, eventually

from kompressor_api import names
from kompressor_api.names import Reason
from kompressor_operator import manifests
from kompressor_operator.cluster import ApiError, Cluster
from kompressor_operator.conditions import Event, Phase, Verdict
from kompressor_operator.decide import NOTHING, Decision, Involved, View
from kompressor_operator.manifests import Attempt
from kompressor_operator.observed import ChildJob, CompressionJob, Manifest
from kompressor_operator.reconcile import Reconciler
from kompressor_operator.store import Store
from kompressor_operator.validation import known_passes
from kompressor_operator.work import RetryLater

pytestmark = pytest.mark.cluster


@dataclass
class Hand:
    """A reconciler without watches that does what the test decides."""

    stage: Stage
    cluster: Cluster
    store: Store
    job: CompressionJob

    async def does(self, **decision: Any) -> None:
        """One reconcile of what the API server has now, by this decision."""
        self.store.put_resource(self.stage.get("compressionjobs", "play"))

        def policy(view: View) -> Decision:
            wanted = Decision(**decision)
            if wanted.finalizer and names.FINALIZER in view.job.finalizers:
                return replace(wanted, finalizer=None)
            return wanted

        await Reconciler(self.cluster, self.store, SETTINGS, known_passes(), policies=(policy,)).reconcile(self.job.key)

    @property
    def finalizers(self) -> list[str]:
        return list(self.stage.get("compressionjobs", "play")["metadata"].get("finalizers", []))

    def worker_job(self, number: int = 1) -> Manifest:
        body = manifests.worker_job(self.job, Attempt(number), SETTINGS)
        body["spec"]["suspend"] = True  # its pod is not wanted here
        return body


@pytest.fixture
async def hand(stage: Stage) -> AsyncIterator[Hand]:
    stage.play("exit 0")
    with mock.patch.dict(os.environ, {"KUBECONFIG": str(stage.root / "operator.kubeconfig")}):
        made = await Cluster.connect(15, pool=4)
    async with made as cluster:
        yield Hand(stage, cluster, Store(), CompressionJob.parse(stage.get("compressionjobs", "play")))


async def test_the_finalizer_goes_on_before_anything_else_and_off_after_it(hand: Hand) -> None:
    hand.stage.patch("compressionjobs", "play", {"metadata": {"finalizers": ["example.org/theirs"]}})
    with pytest.raises(RetryLater):
        await hand.does(finalizer=True, create=(manifests.config_map(hand.job) | {"kind": "Lease"},))
    assert hand.finalizers == ["example.org/theirs", names.FINALIZER]
    await hand.does(finalizer=False, event=Event(False, "CleanedUp", "words"), create=(manifests.config_map(hand.job),))
    assert hand.finalizers == ["example.org/theirs"] and hand.stage.list("configmaps", names.LABEL_JOB_UID)
    assert hand.stage.events()[-1] == "CleanedUp"
    hand.stage.patch("compressionjobs", "play", {"metadata": {"finalizers": None}})


async def test_children_are_created_once_and_a_strangers_is_not_ours(hand: Hand) -> None:
    for _ in range(2):
        await hand.does(create=(manifests.config_map(hand.job), hand.worker_job()))
    (found,) = hand.stage.list("jobs")
    assert found["metadata"]["labels"][names.LABEL_STEP] == "compress"
    (record,) = hand.store.observed(hand.job.uid).jobs
    assert (record.image, record.suspended, record.queue) == ("worker:1", True, "")
    theirs = hand.worker_job(2)
    del theirs["metadata"]["ownerReferences"]
    hand.stage.create("jobs", theirs)
    with pytest.raises(RetryLater, match="belongs to something else"):
        await hand.does(create=(hand.worker_job(2),))
    assert hand.stage.reason() == "NameConflict"


async def test_a_clean_up_job_is_ours_by_its_label_alone(hand: Hand) -> None:
    body = hand.worker_job()
    del body["metadata"]["ownerReferences"]
    body["metadata"]["labels"] = body["metadata"]["labels"] | {names.LABEL_STEP: "cleanup"}
    for _ in range(2):
        await hand.does(create=(body,))
    observed = hand.store.observed(hand.job.uid)
    assert observed.jobs == () and observed.cleanup and observed.cleanup.name == body["metadata"]["name"]


async def test_a_dry_run_leaves_nothing_and_its_refusal_goes_to_the_status(hand: Hand) -> None:
    await hand.does(dry_run=Attempt())
    assert hand.stage.list("jobs") == [] and hand.store.observed(hand.job.uid).jobs == ()
    assert hand.stage.status() == {"observedGeneration": -1}
    misspelt = hand.worker_job() | {"spec": {"templates": {}}}
    with mock.patch.object(manifests, "worker_job", lambda *_: misspelt):
        await hand.does(dry_run=Attempt(), create=(manifests.config_map(hand.job),))
    assert hand.stage.reason() == "InvalidSpec" and "templates" in hand.stage.message()
    assert not hand.stage.list("configmaps", names.LABEL_JOB_UID), "judged before anything is created"


async def test_a_job_is_deleted_by_its_uid_and_never_a_namesake(hand: Hand) -> None:
    await hand.does(create=(hand.worker_job(),))
    (body,) = hand.stage.list("jobs")
    await hand.does(deletes=(replace(ChildJob.parse(body), uid="another"),))
    assert hand.stage.list("jobs")
    await hand.does(deletes=(ChildJob.parse(body),))
    eventually(lambda: not hand.stage.list("jobs"))
    await hand.does(deletes=(ChildJob.parse(body),))


async def test_a_status_that_was_decided_on_something_old_is_not_written(hand: Hand) -> None:
    hand.store.put_resource(hand.stage.get("compressionjobs", "play"))
    hand.stage.patch("compressionjobs", "play", {"spec": {"suspend": True}})
    verdict = Verdict(Phase.QUEUED, Reason.QUEUED, "words")
    with pytest.raises(RetryLater, match="409 Conflict"):
        await Reconciler(hand.cluster, hand.store, SETTINGS, known_passes(), policies=(lambda view: Decision(verdict=verdict),)).reconcile(
            hand.job.key
        )
    assert hand.stage.status() == {"observedGeneration": -1} and hand.stage.events() == []


async def test_groups_and_what_else_is_asked(hand: Hand) -> None:
    assert await hand.cluster.has_group("batch") and not await hand.cluster.has_group(names.QUEUE_GROUP)
    with pytest.raises(ApiError) as absent:
        await hand.cluster.get(names.RECIPE_KIND, hand.stage.namespace, "none")
    assert absent.value.status == 404, "may read, but there is none"
    with pytest.raises(ApiError) as absent:
        await hand.cluster.get(names.CLUSTER_RECIPE_KIND, "", "none")
    assert absent.value.status == 404
    assert hand.cluster.requests["GET", names.CLUSTER_RECIPE_KIND, 404] == 1
    assert (await hand.cluster.create(hand.worker_job(), dry_run=True))["kind"] == "Job"


async def test_what_keeps_asking_for_more_is_ended(hand: Hand) -> None:
    with pytest.raises(RetryLater, match="still undecided"):
        await hand.does(look=Involved("CompressionJob", "play", hand.job.uid))
    await hand.does(**vars(NOTHING))
