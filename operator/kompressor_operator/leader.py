"""Who of several replicas does the work: a coordination.k8s.io Lease, taken and kept as client-go does.

A lease is judged by when we saw it change, never by the times in it, so clocks may differ and jump. Whoever has it renews it every
`retry` seconds; who could not for `renew` seconds has lost it, before another takes it after `duration`. Two leaders at once would do no
harm (names are deterministic, status writes conditional); the Lease saves double work.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from kompressor_operator.cluster import ApiError, Cluster
from kompressor_operator.observed import Manifest

log = logging.getLogger(__name__)


class LeaseLost(Exception):
    """Another may lead by now: stop at once."""


@dataclass
class Leader:
    """One candidate. A take-over takes `duration` and two `retry` at most."""

    cluster: Cluster
    namespace: str
    name: str
    identity: str
    duration: float = 12.0
    renew: float = 10.0
    retry: float = 2.0
    clock: Callable[[], float] = time.monotonic
    _seen: Manifest = field(default_factory=dict)
    _seen_at: float = 0.0
    """When the record last changed before our eyes."""
    _renewed: float = float("-inf")
    """Just before the request that last renewed our lease."""

    @property
    def leading(self) -> bool:
        """Nobody else can have taken it yet. Asked before every write, so that nothing is written after a pause of the whole process."""
        return self.clock() - self._renewed < self.renew

    async def acquire(self) -> None:
        """Until it is ours."""
        while not await self._try(self.retry * 2):  # noqa: ASYNC110
            await asyncio.sleep(self.retry * (0.8 + 0.4 * random.random()))
        log.info("leading as %s", self.identity)

    async def hold(self) -> None:
        """Renews it for ever. Raises LeaseLost once that has not worked for too long, or another has it."""
        pause = self.retry
        while True:
            await asyncio.sleep(pause)
            left = self._renewed + self.renew - self.clock()
            if left <= 0:
                raise LeaseLost(f"Lease {self.namespace}/{self.name} could not be renewed for {self.renew:g} s")
            renewed = await self._try(min(left, self.retry * 2))
            pause = self.retry if renewed else self.retry / 4
            if not renewed and self._holder() not in ("", self.identity):
                raise LeaseLost(f"Lease {self.namespace}/{self.name} is held by {self._holder()}")

    async def release(self) -> None:
        """Lets another take it at once, at a stop in order; one that cannot be told waits for `duration`."""
        if not self.leading or self._holder() != self.identity:
            return
        self._renewed = float("-inf")  # first: nothing is written once it may be another's
        record = self._seen["spec"] | {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _micro_time()}
        try:
            await asyncio.wait_for(self.cluster.replace({**self._seen, "spec": record}), self.retry)
        except (ApiError, TimeoutError) as error:
            log.info("the Lease is left to run out: %s", error)

    async def _try(self, seconds: float) -> bool:
        """Take or renew it, within this time."""
        try:
            return await asyncio.wait_for(self._take_or_renew(), seconds)
        except TimeoutError:
            return False
        except ApiError as error:
            if error.status not in (404, 409):  # another was faster
                hint = "; allow get, create and update of leases there, as the chart does" if error.status == 403 else ""
                log.warning("%s%s", error, hint)
            return False

    async def _take_or_renew(self) -> bool:
        began = self.clock()
        if self.leading and self._holder() == self.identity:  # nobody else writes it, so the last answer is the newest
            try:
                return self._ours(await self.cluster.replace(self._record(self._seen)), began)
            except ApiError as error:
                if error.status not in (404, 409):
                    raise
        try:
            body = await self.cluster.get("Lease", self.namespace, self.name)
        except ApiError as error:
            if error.status != 404:
                raise
            return self._ours(await self.cluster.create(self._record({})), began)
        self._look(body)
        spec = body.get("spec") or {}
        runs_out = self._seen_at + float(spec.get("leaseDurationSeconds") or self.duration)
        if self._holder() not in ("", self.identity) and self.clock() < runs_out:
            return False
        return self._ours(await self.cluster.replace(self._record(body)), began)

    def _look(self, body: Manifest) -> None:
        if body["metadata"]["resourceVersion"] != (self._seen.get("metadata") or {}).get("resourceVersion"):
            self._seen, self._seen_at = body, self.clock()

    def _ours(self, body: Manifest, began: float) -> bool:
        self._look(body)
        self._renewed = began
        return True

    def _holder(self) -> str:
        return str((self._seen.get("spec") or {}).get("holderIdentity") or "")

    def _record(self, body: Manifest) -> Manifest:
        """What is written: whose it is, on top of what is there, with its resourceVersion."""
        spec: dict[str, Any] = dict(body.get("spec") or {})
        now = _micro_time()
        if spec.get("holderIdentity") != self.identity:
            spec["acquireTime"], spec["leaseTransitions"] = now, int(spec.get("leaseTransitions") or 0) + bool(body)
        spec |= {"holderIdentity": self.identity, "leaseDurationSeconds": round(self.duration), "renewTime": now}
        meta = body.get("metadata") or {"name": self.name, "namespace": self.namespace}
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": meta, "spec": spec}


def _micro_time() -> str:
    """For people: nothing is decided by it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
