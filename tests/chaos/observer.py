"""Watches the whole cluster and holds against every version of everything what must never be. Independent of the operator's code.

    with Observer(stage, judge) as observer:
        witness = observer.of(namespace)
        witness.until(lambda: witness.reason("play") == "Completed")    # waits for the watch, asks nobody
        witness.check()                                                 # raises what has been seen that must never be

What must never be, at any version: two Jobs of one CompressionJob that compress, neither ended nor being deleted; two live pods that
compress for it; an end (Complete, Failed) that goes away or changes its reason; `attempt`, `failures` or `observedGeneration` that falls;
Current, in the judgement of kstatus, before Complete.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from plain_api import Api, ApiRefusal
from stage import BASES, PATIENCE, Stage

from kompressor_api import names

__all__ = ["Observer", "Witness"]

T = TypeVar("T")
Manifest = dict[str, Any]

KINDS = ("compressionjobs", "jobs", "pods", "events")
NEVER_FALL = ("attempt", "failures", "observedGeneration")
ENDS = ("Complete", "Failed")


class Witness:
    """What was seen in one namespace."""

    def __init__(self, judged: Callable[[Manifest], str]) -> None:
        self.news = threading.Condition()
        self.now: dict[str, dict[str, Manifest]] = {kind: {} for kind in KINDS}
        """Kind -> uid -> the object as last seen; what is gone is not there."""
        self.ever: dict[str, dict[str, Manifest]] = {kind: {} for kind in KINDS}
        """The same, but what is gone stays."""
        self.told: dict[str, list[tuple[str, str]]] = defaultdict(list)
        """uid of a CompressionJob -> (reason of Ready, phase), as they followed each other."""
        self.wrong: list[str] = []
        self._judged = judged

    # ---- what tests ask

    def job(self, name: str) -> Manifest:
        """A CompressionJob that is there; empty if none is."""
        return next((job for job in self.now["compressionjobs"].values() if job["metadata"]["name"] == name), {})

    def status(self, name: str) -> Manifest:
        status: Manifest = self.job(name).get("status") or {}
        return status

    def reason(self, name: str) -> str:
        return _ready(self.status(name)).get("reason", "")

    def children(self, kind: str, uid: str, step: str = "compress", ever: bool = False) -> list[Manifest]:
        """Jobs or pods of a CompressionJob."""
        among = (self.ever if ever else self.now)[kind].values()
        return [child for child in among if _of(child, step) == uid]

    def until(self, look: Callable[[], T | None], seconds: float = PATIENCE, what: str = "") -> T:
        """The first truthy answer; asked whenever there is news. Raises AssertionError, also for what must never be."""
        deadline = time.monotonic() + seconds
        with self.news:
            while True:
                self.check()
                if answer := look():
                    return answer
                left = deadline - time.monotonic()
                assert left > 0, f"not within {seconds} s: {what}; {self.summary()}"
                self.news.wait(min(left, 5.0))

    def check(self) -> None:
        assert not self.wrong, self.wrong

    def check_events(self) -> None:
        """Each is told at most as often as there was something to tell."""
        for uid, told in self.told.items():
            about = [event for event in self.ever["events"].values() if event["involvedObject"].get("uid") == uid]
            said = Counter(event["reason"] for event in about)
            changes = Counter(reason for reason, _ in told) + Counter({"CleanedUp": 1, "CleanupFailed": 1, "ResourcesBelowPlan": 1})
            assert said <= changes, f"told more often than it was so: {said - changes}"

    def summary(self) -> str:
        jobs = {job["metadata"]["name"]: job.get("status") for job in self.now["compressionjobs"].values()}
        return json.dumps({"jobs": jobs, "told": self.told, "Jobs": [j["metadata"]["name"] for j in self.now["jobs"].values()]})

    # ---- what the observer tells

    def hear(self, kind: str, event: Manifest) -> None:
        found, uid = event["object"], event["object"]["metadata"]["uid"]
        with self.news:
            if kind == "compressionjobs" and event["type"] != "DELETED":
                self._judge(self.now[kind].get(uid), found)
            self.ever[kind][uid] = found
            if event["type"] == "DELETED":
                self.now[kind].pop(uid, None)
            else:
                self.now[kind][uid] = found
                if kind in ("jobs", "pods"):
                    self._one_at_most(kind, _of(found, "compress"))
            self.news.notify_all()

    def _one_at_most(self, kind: str, owner: str) -> None:
        goes_on = _job_goes_on if kind == "jobs" else _pod_lives
        going = [child["metadata"]["name"] for child in self.children(kind, owner) if goes_on(child)] if owner else []
        if len(going) > 1:
            self.wrong.append(f"two {kind} at once for {owner}: {going}")

    def _judge(self, before: Manifest | None, found: Manifest) -> None:
        meta, status, old = found["metadata"], found.get("status") or {}, (before or {}).get("status") or {}
        about = f"{meta['namespace']}/{meta['name']} at {meta['resourceVersion']}"
        ready = (_ready(status).get("reason", ""), status.get("phase", ""))
        if ready[0] and self.told[meta["uid"]][-1:] != [ready]:
            self.told[meta["uid"]].append(ready)
        for field in NEVER_FALL:
            if field in old and old[field] > status.get(field, -2):
                self.wrong.append(f"{about}: {field} fell from {old[field]} to {status.get(field)}")
        if (status.get("observedGeneration") or 0) > meta["generation"]:
            self.wrong.append(f"{about}: observed a generation that is not there yet")
        over, was = _ends(status), _ends(old)
        if was and over != was:
            self.wrong.append(f"{about}: the end {was} became {over}")
        if self._judged(found) == "Current" and "Complete" not in over:
            self.wrong.append(f"{about}: Current before it is Complete")


class Observer:
    """Watches of everything, from the moment it is entered."""

    def __init__(self, stage: Stage, judge: Path) -> None:
        self._cluster = stage.cluster
        self._witnesses: dict[str, Witness] = {}
        self._lock = threading.Lock()
        self._judge = subprocess.Popen([judge], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Observer:
        api = Api(self._cluster)
        for kind in KINDS:
            version = api.call("GET", _path(kind) + "?limit=1")["metadata"]["resourceVersion"]
            thread = threading.Thread(target=self._watch, args=(kind, version), name=f"observer of {kind}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._judge.kill()
        self._judge.communicate()

    def of(self, namespace: str) -> Witness:
        with self._lock:
            return self._witnesses.setdefault(namespace, Witness(self._judged))

    def dismiss(self, namespace: str) -> None:
        """Its scene is over. All that a thousand scenes have seen does not fit into memory."""
        with self._lock:
            self._witnesses.pop(namespace, None)

    def _tell(self, kind: str, event: Manifest) -> None:
        with self._lock:
            witness = self._witnesses.get(event["object"]["metadata"]["namespace"])
        if witness is not None:
            witness.hear(kind, event)

    def _judged(self, found: Manifest) -> str:
        with self._lock:
            assert self._judge.stdin is not None and self._judge.stdout is not None
            self._judge.stdin.write(json.dumps(found) + "\n")
            self._judge.stdin.flush()
            return self._judge.stdout.readline().strip()

    def _look(self, api: Api, kind: str) -> str:
        """What there is now, since a watch cannot go on from where it was. Returns as of which version."""
        found = api.call("GET", _path(kind))
        for item in found["items"]:
            self._tell(kind, {"type": "MODIFIED", "object": item})
        return str(found["metadata"]["resourceVersion"])

    def _watch(self, kind: str, version: str) -> None:
        """Again and again, from where it was; an API server that is away is waited for."""
        api = Api(self._cluster)
        while not self._over.is_set():
            try:
                for event in api.watch(f"{_path(kind)}?watch=1&allowWatchBookmarks=true&resourceVersion={version}"):
                    if event.get("type") in (None, "ERROR"):  # its CRD has changed, or the server was away
                        version = self._look(api, kind)
                        break
                    version = event["object"]["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK":
                        self._tell(kind, event)
            except (OSError, http.client.HTTPException, ApiRefusal, ValueError):
                time.sleep(0.2)


def _path(kind: str) -> str:
    return f"{BASES.get(kind, '/api/v1')}/{kind}"


def _ready(status: Manifest) -> Manifest:
    return next((c for c in status.get("conditions") or () if c["type"] == "Ready"), {})


def _ends(status: Manifest) -> dict[str, str]:
    """Complete or Failed, with its reason."""
    return {c["type"]: c["reason"] for c in status.get("conditions") or () if c["type"] in ENDS and c["status"] == "True"}


def _of(child: Manifest, step: str) -> str:
    """uid of the CompressionJob that this child takes this step for."""
    labels = child["metadata"].get("labels") or {}
    return str(labels.get(names.LABEL_JOB_UID, "")) if labels.get(names.LABEL_STEP) == step else ""


def _job_goes_on(job: Manifest) -> bool:
    over = any(c["type"] in ENDS and c["status"] == "True" for c in job.get("status", {}).get("conditions") or ())
    return not over and "deletionTimestamp" not in job["metadata"]


def _pod_lives(pod: Manifest) -> bool:
    return pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")
