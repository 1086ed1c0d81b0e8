"""What the watches have told, by CompressionJob: the operator decides on this and asks the API server only where a mistake could not
be taken back. Compact on purpose: the resources as JSON text, their children as records of what decides.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kompressor_api.names import Step
from kompressor_operator.conditions import Phase
from kompressor_operator.last_words import LastWords
from kompressor_operator.observed import ChildJob, CompressionJob, Key, Manifest, Observed
from kompressor_operator.pods import ChildPod
from kompressor_operator.shelf import Shelf
from kompressor_operator.training import Training, training_of


@dataclass(frozen=True, slots=True)
class Packed:
    """A CompressionJob as deflated text; a twentieth of the memory that its dicts would take."""

    namespace: str
    name: str
    uid: str
    resource_version: str
    text: bytes
    phase: str = ""
    reason: str = ""
    """Of Ready: what there is to count, without unpacking it."""
    training: Training | None = None
    """How its training goes, if it trains now."""
    over: bool = False
    """Complete or Failed, and not being deleted."""

    @classmethod
    def pack(cls, body: Mapping[str, Any]) -> Packed:
        meta = body["metadata"]
        kept = {k: meta[k] for k in _KEPT if k in meta}
        rest = {name: value for name, value in body.items() if name not in _LEFT_OUT}
        text = json.dumps({**rest, "metadata": kept, "spec": body.get("spec") or {}, "status": body.get("status") or {}})
        phase, reason = _said(body.get("status") or {})
        training = training_of(body.get("status") or {})
        packed = zlib.compress(text.encode(), level=1)
        return cls(
            sys.intern(meta["namespace"]),
            meta["name"],
            sys.intern(meta["uid"]),
            meta.get("resourceVersion", ""),
            packed,
            phase,
            reason,
            training,
            phase in _OVER and "deletionTimestamp" not in meta,
        )

    def unpack(self) -> CompressionJob:
        return CompressionJob.parse(json.loads(zlib.decompress(self.text)))


_OVER = (Phase.COMPLETE, Phase.FAILED)
_LEFT_OUT = ("apiVersion", "kind", "metadata")
_KEPT = ("namespace", "name", "uid", "generation", "resourceVersion", "creationTimestamp", "deletionTimestamp", "finalizers")


class Store:
    """The operator's picture of the cluster."""

    def __init__(self) -> None:
        self.resources: Shelf[Packed] = Shelf()
        self.jobs: Shelf[ChildJob] = Shelf()
        self.pods: Shelf[ChildPod] = Shelf()
        self.kueue: bool | None = None
        """Does the cluster have Kueue? None until the relist has asked."""
        self._keys: dict[str, Key] = {}
        self._jobs_of: dict[str, tuple[Key, ...]] = {}
        self._pods_of: dict[str, tuple[Key, ...]] = {}
        self.last_words = LastWords()

    def job(self, key: Key) -> CompressionJob | None:
        packed = self.resources.records.get(key)
        return packed.unpack() if packed else None

    def over(self, key: Key) -> bool:
        """Whether nobody waits for what its children still do: thousands of them may be collected at once."""
        packed = self.resources.records.get(key)
        return packed is not None and packed.over

    def observed(self, uid: str) -> Observed:
        jobs = [job for key in self._jobs_of.get(uid, ()) if (job := self.jobs.records.get(key)) and job.owner == uid]
        pods = [pod for key in self._pods_of.get(uid, ()) if (pod := self.pods.records.get(key)) and pod.owner == uid]
        return observe(jobs, [*pods, *self.last_words.of(uid, jobs)])

    def tell_resource(self, body: Manifest, deleted: bool = False) -> Key:
        """A watch event of a CompressionJob. Returns its key."""
        packed = self.resources.read(body, Packed.pack)
        self.resources.told(packed, deleted)
        return self._index(packed, deleted)

    def tell_job(self, body: Manifest, deleted: bool = False) -> Key | None:
        """A watch event of a child Job. Returns the key of its CompressionJob, if that is known."""
        job = self.jobs.read(body, ChildJob.parse)
        self.jobs.told(job, deleted)
        return self._index_child(self._jobs_of, job, deleted)

    def tell_pod(self, body: Manifest, deleted: bool = False) -> Key | None:
        pod = self.pods.read(body, ChildPod.parse)
        self.pods.told(pod, deleted)
        if deleted:
            self._keep_words(pod)
        return self._index_child(self._pods_of, pod, deleted)

    def put_resource(self, body: Manifest) -> CompressionJob:
        """The answer to our own read or write: as good as an event, but no proof that the watch lives."""
        packed = Packed.pack(body)
        self.resources.put(packed)
        self._index(packed, False)
        return packed.unpack()

    def put_job(self, job: ChildJob) -> None:
        self.jobs.put(job)
        self._index_child(self._jobs_of, job, False)

    def begin_list(self) -> None:
        for shelf in (self.resources, self.jobs, self.pods):
            shelf.begin_list()

    def list_resources(self, records: Iterable[Packed], version: str) -> None:
        """All of them, as of this version."""
        self.resources.listed(records, version)
        self._keys = {record.uid: key for key, record in self.resources.records.items()}
        self.last_words.forget_all_but(record.uid for record in self.resources if not record.over)

    def list_jobs(self, records: Iterable[ChildJob], version: str) -> None:
        self.jobs.listed(records, version)
        self._jobs_of = _by_owner(self.jobs)

    def list_pods(self, records: Iterable[ChildPod], version: str) -> None:
        for pod in self.pods.listed(records, version):
            self._keep_words(pod)
        self._pods_of = _by_owner(self.pods)

    @property
    def keys(self) -> list[Key]:
        return list(self.resources.records)

    def tally(self) -> Counter[tuple[str, str]]:
        """(phase, reason) -> CompressionJobs."""
        return Counter((packed.phase, packed.reason) for packed in self.resources)

    def training(self) -> dict[Key, Training]:
        """Of the CompressionJobs that train now."""
        return {(packed.namespace, packed.name): packed.training for packed in self.resources if packed.training}

    @property
    def unproven(self) -> frozenset[tuple[str, Key, int]]:
        shelves: dict[str, Shelf[Any]] = {"resources": self.resources, "jobs": self.jobs, "pods": self.pods}
        return frozenset((kind, *owed) for kind, shelf in shelves.items() for owed in shelf.unproven)

    def _index(self, packed: Packed, deleted: bool) -> Key:
        key = (packed.namespace, packed.name)
        if deleted:
            self._keys.pop(packed.uid, None)
        else:
            self._keys[packed.uid] = key
        if deleted or packed.over:
            self.last_words.forget(packed.uid)
        return key

    def _keep_words(self, pod: ChildPod) -> None:
        owner = self._keys.get(pod.owner)
        if owner and not self.over(owner):
            self.last_words.keep(pod, self.jobs.records.get((pod.namespace, pod.job)))

    def _index_child(self, index: dict[str, tuple[Key, ...]], child: ChildJob | ChildPod, deleted: bool) -> Key | None:
        key = (child.namespace, child.name)
        others = tuple(other for other in index.get(child.owner, ()) if other != key)
        if not deleted:
            index[child.owner] = (*others, key)
        elif others:
            index[child.owner] = others
        else:
            index.pop(child.owner, None)
        return self._keys.get(child.owner)


def observe(jobs: Iterable[ChildJob], pods: Iterable[ChildPod], live: bool = False) -> Observed:
    """In the order that everything else relies on."""
    by_attempt = sorted(jobs, key=lambda job: (job.attempt, job.created))
    each = {pod.uid: pod for pod in pods}.values()  # one that goes just now is both listed and remembered
    by_creation = sorted(each, key=lambda pod: (pod.created, pod.name))
    newest = {job.step: job for job in by_attempt}
    return Observed(
        jobs=tuple(job for job in by_attempt if job.step is Step.COMPRESS),
        pods=tuple(pod for pod in by_creation if pod.step is Step.COMPRESS),
        preflight=newest.get(Step.PREFLIGHT),
        cleanup=newest.get(Step.CLEANUP),
        step_pods=tuple(pod for pod in by_creation if pod.step is not Step.COMPRESS),
        live=live,
    )


def _said(status: Mapping[str, Any]) -> tuple[str, str]:
    """Phase and reason; one text for all that have the same."""
    reason = next((c.get("reason") for c in status.get("conditions") or () if c.get("type") == "Ready"), "")
    return sys.intern(str(status.get("phase") or "")), sys.intern(str(reason or ""))


def _by_owner(shelf: Shelf[Any]) -> dict[str, tuple[Key, ...]]:
    index: dict[str, tuple[Key, ...]] = {}
    for child in shelf:
        index[child.owner] = (*index.get(child.owner, ()), (child.namespace, child.name))
    return index
