"""Every version of every CompressionJob's status, as a watch tells them, and what the health judges make of each."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stage import Stage, eventually

from gitops.health_judges import ON_THE_WAY, ArgoCD, Flux, Judged, kstatus, words_for

__all__ = ["Versions", "judged", "reasons"]

Manifest = dict[str, Any]
WATCH_SECONDS = 600


class Versions:
    """Those of a stage's namespace, from now on. Watched meanwhile: the API server forgets old ones."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._told: list[Manifest] = []
        since = stage.version("compressionjobs")
        self._path = stage.path("compressionjobs") + f"?watch=1&resourceVersion={since}&timeoutSeconds={WATCH_SECONDS}"
        threading.Thread(target=self._follow, daemon=True).start()

    def told(self) -> list[Manifest]:
        """All until now but those that tell of a deletion that is done, oldest first."""
        last = {job["metadata"]["resourceVersion"] for job in self._stage.list("compressionjobs")}
        eventually(lambda: last <= {event["object"]["metadata"]["resourceVersion"] for event in list(self._told)})
        return [event["object"] for event in list(self._told) if event["type"] != "DELETED"]

    def _follow(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):  # the cluster ends; what is missed before, `told` misses
            for event in self._stage.api.watch(self._path):
                self._told.append(event)


def judged(versions: Iterable[Manifest], judge: Path) -> tuple[set[str], dict[str, str]]:
    """Fails for the first that is judged wrongly. Returns the phases that were met, and kstatus's last word on each job."""
    found = list(versions)
    argo, flux, met = ArgoCD(), Flux(), set()
    last: dict[str, str] = {}
    for version, word in zip(found, kstatus(found, judge), strict=True):
        if "deletionTimestamp" in version["metadata"]:
            assert word == "Terminating"
            met.add("Terminating")
            continue
        assert (word, argo(version)[0], flux(version)) == expected(version), version
        met.add(version["status"].get("phase", "New"))
        last[version["metadata"]["name"]] = word
    return met, last


def expected(version: Manifest) -> Judged:
    status = version["status"]
    if status["observedGeneration"] != version["metadata"]["generation"]:
        return ON_THE_WAY
    return words_for(status.get("phase", ""))


def reasons(versions: Iterable[Manifest], name: str) -> list[str]:
    """What Ready said of this job, one after the other."""
    said: list[str] = []
    for version in versions:
        ready = [c["reason"] for c in version["status"].get("conditions", []) if c["type"] == "Ready"]
        if version["metadata"]["name"] == name and ready and ready != said[-1:]:
            said += ready
    return said
