"""The picture of the cluster stays right whatever order events, lists and answers come in."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

from kcj_builders import NOW, UID, child_body, job_body

from kompressor_api import names
from kompressor_api.names import ExitCode
from kompressor_operator.observed import ChildJob
from kompressor_operator.store import Packed, Store

KEY = ("team", "llama")


def packed(version: int, uid: str = UID) -> Packed:
    return Packed.pack(job_body(uid, version))


def test_packing_keeps_what_decides() -> None:
    store = Store()
    body = job_body(version=7)
    body["metadata"] |= {"managedFields": ["a"] * 100, "deletionTimestamp": "2026-01-01T00:00:00Z"}
    assert store.tell_resource(body) == KEY
    job = store.job(KEY)
    assert job and job.deleting and job.resource_version == "7" and job.spec == body["spec"]
    assert b"managedFields" not in zlib.decompress(store.resources.records[KEY].text)


def test_packing_keeps_what_stands_beside_the_spec() -> None:
    store = Store()
    store.tell_resource(job_body() | {"apiVersion": "kompressor.io/v1alpha1", "kind": "CompressionJob", "suspend": True})
    job = store.job(KEY)
    assert job and job.beside == {"suspend": True}


def test_an_older_event_changes_nothing() -> None:
    store = Store()
    store.put_resource(job_body(version=9))
    store.tell_resource(job_body(version=8))
    job = store.job(KEY)
    assert job and job.resource_version == "9"


def test_a_namesake_replaces_whatever_its_version_and_a_late_deletion_does_not_hurt_it() -> None:
    store = Store()
    store.tell_resource(job_body("old", 5))
    store.tell_resource(job_body("new", 6))
    store.tell_resource(job_body("old", 7), deleted=True)
    job = store.job(KEY)
    assert job and job.uid == "new"


def test_children_lead_to_their_owner() -> None:
    store = Store()
    assert store.tell_job(child_body()) is None  # the owner is not known yet
    store.tell_resource(job_body())
    assert store.tell_job(child_body(2)) == KEY
    assert [job.name for job in store.observed(UID).jobs] == ["llama-1"]
    assert store.tell_job(child_body(3), deleted=True) == KEY
    assert store.observed(UID).jobs == ()


def test_a_job_with_our_label_but_another_owner_is_not_ours() -> None:
    store = Store()
    store.tell_resource(job_body())
    body = child_body()
    body["metadata"]["ownerReferences"] = [{"uid": "other", "controller": True}]
    assert store.tell_job(body) is None
    assert store.observed(UID).jobs == ()


def test_a_list_repairs_what_the_watch_missed() -> None:
    store = Store()
    store.tell_resource(job_body(version=3))
    store.tell_job(child_body(4))
    store.begin_list()
    store.list_jobs([], "10")
    store.list_resources([], "11")
    assert store.job(KEY) is None and store.observed(UID).jobs == () and store.keys == []


def test_only_what_is_new_is_read_from_a_list() -> None:
    """Of ten thousand jobs that are done nothing is new. A namesake is, whatever its version."""
    store, read = Store(), list[tuple[str, str]]()

    def parse(body: Mapping[str, Any]) -> Packed:
        read.append((body["metadata"]["uid"], body["metadata"]["resourceVersion"]))
        return Packed.pack(body)

    store.tell_resource(job_body(version=5))
    known = store.resources.records[KEY]
    assert store.resources.read(job_body(version=5), parse) is known and read == []
    assert store.resources.read(job_body(version=6), parse).resource_version == "6"
    assert store.resources.read(job_body("other", 5), parse).uid == "other"
    assert read == [(UID, "6"), ("other", "5")]


def test_a_list_does_not_undo_what_came_meanwhile() -> None:
    store = Store()
    store.begin_list()
    store.tell_resource(job_body("new", 12))  # made after the list was taken
    store.list_resources([], "10")
    assert store.keys == [KEY]
    store.begin_list()
    store.tell_resource(job_body("new", 13), deleted=True)  # deleted after the list was taken
    store.list_resources([packed(12, "new")], "12")
    assert store.keys == []


def test_what_a_list_shows_first_the_watch_still_owes() -> None:
    store = Store()
    store.begin_list()
    store.list_resources([packed(5)], "6")
    assert store.unproven == {("resources", KEY, 5)}
    store.tell_resource(job_body(version=5))
    assert store.unproven == frozenset()
    store.begin_list()
    store.list_resources([packed(5)], "8")
    assert store.unproven == frozenset()  # nothing new in it


def test_an_own_write_is_no_proof_that_the_watch_lives() -> None:
    store = Store()
    store.list_resources([packed(5)], "6")
    store.put_resource(job_body(version=7))
    assert store.unproven
    store.tell_resource(job_body(version=8), deleted=True)
    assert not store.unproven and store.keys == []


def test_attempts_are_ordered() -> None:
    store = Store()
    store.tell_resource(job_body())
    for name, attempt in (("llama-10", "10"), ("llama-2", "2")):
        body = child_body(name=name)
        body["metadata"]["labels"]["kompressor.io/attempt"] = attempt
        store.put_job(ChildJob.parse(body))
    assert [job.attempt for job in store.observed(UID).jobs] == [2, 10]


def test_each_step_has_its_place_and_older_releases_only_compressed() -> None:
    """A preflight Job that was taken for an attempt would end the job, or start a second one."""
    store = Store()
    store.tell_resource(job_body())
    for name, step in (("llama-1", ""), ("llama-2", "compress"), ("llama-preflight", "preflight")):
        body = child_body(name=name)
        body["metadata"]["labels"] |= {"kompressor.io/step": step} if step else {}
        store.put_job(ChildJob.parse(body))
    cleanup = child_body(name="llama-cleanup")
    del cleanup["metadata"]["ownerReferences"]  # it outlives its owner
    cleanup["metadata"]["labels"]["kompressor.io/step"] = "cleanup"
    assert store.tell_job(cleanup) == KEY
    pods = {"llama-1-a": {}, "llama-preflight-a": {"kompressor.io/step": "preflight"}}
    for name, labels in pods.items():
        body = child_body(name=name)
        body["metadata"]["labels"] |= labels | {"batch.kubernetes.io/job-name": name[:-2]}
        store.tell_pod(body)
    seen = store.observed(UID)
    assert sorted(job.name for job in seen.jobs) == ["llama-1", "llama-2"]
    assert seen.preflight and seen.cleanup and (seen.preflight.name, seen.cleanup.name) == ("llama-preflight", "llama-cleanup")
    assert ([pod.name for pod in seen.pods], [pod.name for pod in seen.step_pods]) == (["llama-1-a"], ["llama-preflight-a"])
    assert [pod.name for pod in seen.pods_of(seen.preflight)] == ["llama-preflight-a"]


def test_a_child_job_tells_when_it_started_with_what_and_in_which_queue() -> None:
    body = child_body(status={"startTime": "2026-01-02T03:04:05Z"})
    body["spec"] = {"template": {"spec": {"containers": [{"name": "side", "image": "x"}, {"name": "worker", "image": "worker:1"}]}}}
    body["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "gpu"
    job = ChildJob.parse(body)
    assert (job.image, job.queue, job.started) == ("worker:1", "gpu", NOW)
    assert ChildJob.parse(child_body()).started is None


def test_packing_keeps_finalizers() -> None:
    body = job_body()
    body["metadata"]["finalizers"] = ["kompressor.io/cleanup"]
    assert Packed.pack(body).unpack().finalizers == ("kompressor.io/cleanup",)


def test_a_job_is_over_once_it_has_ended_and_until_it_is_deleted() -> None:
    store = Store()
    for version, phase, over in ((1, "Running", False), (2, "Complete", True), (3, "Failed", True)):
        store.tell_resource(job_body(version=version) | {"status": {"phase": phase}})
        assert store.over(KEY) is over, phase
    body = job_body(version=4) | {"status": {"phase": "Complete"}}
    body["metadata"] |= {"deletionTimestamp": "2026-01-01T00:00:00Z"}
    store.tell_resource(body)
    assert not store.over(KEY), "its children's end is waited for"
    assert not store.over(("team", "unknown"))


def ended_pod(version: int, code: int = 0, name: str = "llama-1-a", created: str = "2026-01-02T03:03:30Z") -> dict[str, Any]:
    state = {"terminated": {"exitCode": code, "message": '{"reason": "Completed"}'}}
    return {
        "metadata": {
            "namespace": "team",
            "name": name,
            "uid": f"pod-{name}",
            "resourceVersion": str(version),
            "creationTimestamp": created,
            "labels": {names.LABEL_JOB_UID: UID, "batch.kubernetes.io/job-name": "llama-1"},
        },
        "status": {"phase": "Failed" if code else "Succeeded", "containerStatuses": [{"name": names.WORKER_CONTAINER, "state": state}]},
    }


def known(store: Store) -> list[str]:
    return [pod.name for pod in store.observed(UID).pods]


def test_what_a_pod_said_outlives_it_until_the_job_has_taken_it_in() -> None:
    store = Store()
    store.tell_resource(job_body(version=1))
    store.tell_job(child_body(2))
    store.tell_pod(ended_pod(3))
    store.tell_pod(ended_pod(4), deleted=True)  # collected by the controller manager
    assert known(store) == ["llama-1-a"] and store.observed(UID).pods[0].terminated
    over = job_body(version=5)
    store.tell_resource(over | {"status": {"phase": "Complete"}})
    assert known(store) == []
    store.tell_pod(ended_pod(6, name="llama-1-b"), deleted=True)
    assert known(store) == [], "nobody waits for it"


def test_a_list_that_lacks_a_pod_keeps_its_words_too() -> None:
    store = Store()
    store.tell_resource(job_body(version=1))
    store.tell_job(child_body(2))
    store.tell_pod(ended_pod(3, code=ExitCode.USER_ERROR))
    store.begin_list()
    store.list_pods([], "9")
    store.tell_pod(ended_pod(10, code=ExitCode.USER_ERROR), deleted=True)
    assert known(store) == ["llama-1-a"], "once, though the watch tells of it as well"
    store.list_resources([], "10")
    store.tell_resource(job_body(version=11))
    assert known(store) == [], "its CompressionJob was gone in between"


def test_no_words_are_kept_of_what_another_pod_or_another_job_follows() -> None:
    store = Store()
    store.tell_resource(job_body(version=1))
    store.tell_job(child_body(2))
    store.tell_pod(ended_pod(3, code=ExitCode.TERMINATED), deleted=True)
    assert known(store) == [], "stopped on the way: another pod follows"
    store.tell_pod(ended_pod(4, created="2026-01-02T03:00:00Z"), deleted=True)
    assert known(store) == [], "older than this Job: a namesake's"
    store.tell_pod(ended_pod(5), deleted=True)
    store.tell_job(child_body(6), deleted=True)
    again = child_body(7)
    again["metadata"]["uid"] = "another"
    store.tell_job(again)
    assert known(store) == [], "its Job is gone, and this is another of its name"
