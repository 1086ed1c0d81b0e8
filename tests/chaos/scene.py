"""Where one job is played: a namespace, a proxy, an operator that may die, and a witness. Many at a time on one stage.

with theatre.scene() as scene:                  # namespace and proxy; no operator yet
    scene.raise_operator()                      # waits until its watches are open
    scene.play(SUCCEED)                         # stage.Stage's `play`
    scene.until("Completed")
    scene.strike()                              # the job is deleted; what is left is looked for at the end, see `Theatre.swept`
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from observer import Observer, Witness
from on_node import occupied, running
from operator_nursery import Clock, Nursery
from plain_api import Api, ApiRefusal
from proxy import Proxies, Proxy
from stage import BASES, PATIENCE, Operator, Stage, eventually

from kompressor_api import names

__all__ = ["Scene", "Theatre"]

LEFT = ("configmaps", "serviceaccounts", "roles", "rolebindings", "jobs", "pods")
WATCHES = 3


@dataclass
class Scene:
    stage: Stage
    nursery: Nursery
    proxy: Proxy
    witness: Witness
    clock: Clock
    settings: dict[str, str] = field(default_factory=dict)
    operator: Operator | None = None
    uid: str = ""

    def raise_operator(self) -> Operator:
        """Another operator, behind the proxy; returns once it watches, and counts its requests from here."""
        self.operator = running = self.nursery.start(self.stage, self.proxy, self.clock, **self.settings)
        eventually(lambda: self.proxy.watches == WATCHES and running.ready())
        self.proxy.begin()
        return running

    def end_operator(self) -> None:
        if self.operator is not None and self.operator.process.poll() is None:
            self.operator.stop()

    def play(self, *script: str, **spec: Any) -> str:
        self.uid = self.stage.play(*script, **spec)
        return self.uid

    def until(self, reason: str, name: str = "play", seconds: float = PATIENCE) -> dict[str, Any]:
        """The status, once Ready has this reason."""

        def told() -> dict[str, Any]:
            return self.witness.status(name) if self.witness.reason(name) == reason else {}

        return self.witness.until(told, seconds, f"{name} {reason}")

    def strike(self, name: str = "play") -> None:
        """Deletes the job."""
        self.stage.delete("compressionjobs", name, propagationPolicy="Background")


class Theatre:
    """A stage, and what scenes on it share."""

    def __init__(self, stage: Stage, nursery: Nursery, proxies: Proxies, observer: Observer) -> None:
        self.stage, self.nursery, self.proxies, self.observer = stage, nursery, proxies, observer

    @contextmanager
    def scene(self, **settings: str) -> Iterator[Scene]:
        """A fresh namespace. At its end the operator is ended, and what must never be has not been seen."""
        stage = copy.copy(self.stage)
        stage.api = Api(stage.cluster)  # a connection of its own: scenes are played side by side
        stage.enter_namespace()
        with ExitStack() as stack:
            stack.callback(self.observer.dismiss, stage.namespace)
            proxy = self.proxies.open()
            stack.callback(self.proxies.close, proxy)
            clock = Clock(stage.root / f"{stage.namespace}.clock")
            scene = Scene(stage, self.nursery, proxy, self.observer.of(stage.namespace), clock, settings)
            stack.callback(scene.end_operator)
            try:
                yield scene
                scene.witness.check()
            except BaseException:
                with suppress(ApiRefusal, OSError):
                    stage.leave_namespace()  # or what it has begun would go on beside all that is played after it
                raise

    def swept(self, namespaces: set[str], seconds: float = PATIENCE) -> None:
        """Nothing of any job is left in these namespaces, no CompressionJob, and nothing of their pods on the node. The garbage collector
        takes its time."""
        api, deadline = Api(self.stage.cluster), time.monotonic() + seconds
        while left := self._left(api, namespaces):
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(1.0)

    def ended(self, seconds: float = PATIENCE) -> None:
        """After all scenes: no operator lives, and no pod of a job runs."""
        deadline = time.monotonic() + seconds
        while left := [f"operator {pid}" for pid in self.nursery.alive()] + [f"pod {uid}" for uid in running(self.stage.cluster.root)]:
            assert time.monotonic() < deadline, f"not ended: {left}"
            time.sleep(1.0)

    def _left(self, api: Api, namespaces: set[str]) -> list[str]:
        """What a clean-up leaves, its own Job, has a time to live of its own."""
        found, on_node = [], occupied(self.stage.cluster.root)  # before the pods are asked for: what is new by then is not left
        for kind in ("compressionjobs", *LEFT):
            query = "" if kind == "compressionjobs" else f"?labelSelector={names.LABEL_JOB_UID},{names.LABEL_STEP}!=cleanup"
            metas = [item["metadata"] for item in api.call("GET", f"{BASES.get(kind, '/api/v1')}/{kind}{query}")["items"]]
            found += [f"{kind} {meta['namespace']}/{meta['name']}" for meta in metas if meta["namespace"] in namespaces]
        known = {item["metadata"]["uid"] for item in api.call("GET", "/api/v1/pods")["items"]}
        return found + [str(place) for place in on_node if place.uid not in known and place.namespace in (*namespaces, "")]
