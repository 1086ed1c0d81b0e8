"""The timer: now and then list everything, repair what the watches have missed, and look at every job again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kompressor_api import names
from kompressor_operator.cluster import ApiError, Cluster
from kompressor_operator.observed import ChildJob, Key
from kompressor_operator.pods import ChildPod
from kompressor_operator.shelf import Record, Shelf
from kompressor_operator.store import Packed, Store

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)

SOON = 3.0
"""Seconds after the first list. What went between it and the opening of the watches, these will never tell: they still owe it then."""
FIRST_PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0)
"""Seconds between tries until the first list succeeds; the last one is repeated."""


@dataclass
class Relister:
    """Lists, repairs, enqueues. `attempted` moves whether or not the API server answers: it shows that this task lives."""

    cluster: Cluster
    store: Store
    enqueue: Callable[[Key], None]
    """Behind what there is news of."""
    namespaces: Sequence[str]
    interval: float
    impatient: float
    """Seconds until the next list while a watch owes us something, so that a dead one is noticed."""
    clock: Callable[[], float] = time.monotonic
    attempted: float = field(default=0.0)

    async def first(self) -> None:
        """Until it works: at the start there may be no API server yet, or no CRD."""
        for turn in range(2**31):
            if await self._try():
                return
            await asyncio.sleep(FIRST_PAUSES[min(turn, len(FIRST_PAUSES) - 1)])

    async def forever(self) -> None:
        """The timer itself."""
        await asyncio.sleep(min(SOON, self.interval))
        if self.store.unproven:
            await self._try()
        while True:
            await asyncio.sleep(min(self.interval, self.impatient) if self.store.unproven else self.interval)
            await self._try()

    async def relist(self) -> None:
        """Children first: a job that is looked at must not lack children that were there before it."""
        self.store.begin_list()
        jobs, version = await self._all("Job", self.store.jobs, ChildJob.parse, labelSelector=names.LABEL_JOB_UID)
        self.store.list_jobs(jobs, version)
        pods, version = await self._all("Pod", self.store.pods, ChildPod.parse, labelSelector=names.LABEL_JOB_UID)
        self.store.list_pods(pods, version)
        resources, version = await self._all(names.KIND, self.store.resources, Packed.pack)
        self.store.list_resources(resources, version)
        self.store.kueue = await self._has_kueue()
        for key in self.store.keys:
            self.enqueue(key)

    async def _has_kueue(self) -> bool | None:
        """For a hint only, so nothing fails without the answer."""
        try:
            return await self.cluster.has_group(names.QUEUE_GROUP)
        except ApiError as error:
            log.info("looking for Kueue, %s", error)
            return self.store.kueue

    async def _try(self) -> bool:
        self.attempted = self.clock()
        try:
            await self.relist()
        except ApiError as error:
            hint = ""
            if error.status == 404:
                hint = f"; the CRD {names.PLURAL}.{names.GROUP} is not installed: `kubectl apply -f crds/`"
            if error.status == 403:
                hint = "; the operator's role does not allow it: install it with the chart, or set KOMPRESSOR_NAMESPACES"
            log.warning("listing, %s%s", error, hint)
            return False
        return True

    async def _all(self, kind: str, shelf: Shelf[R], parse: Callable[[Mapping[str, Any]], R], **selectors: str) -> tuple[list[R], str]:
        """Everything of a kind in the namespaces that are served, and the oldest version that it is true of."""
        records: list[R] = []
        versions: list[str] = []
        for namespace in self.namespaces or ("",):
            first = ""
            async for page in self.cluster.pages(kind, namespace, **selectors):
                records.extend(shelf.read(item, parse) for item in page.items)
                first = first or page.version
            versions.append(first)
        return records, min(versions, key=lambda v: int(v) if v.isdigit() else 0)
