"""observe -> decide -> act -> one status patch. The same for an event, a restart and the timer; nothing is remembered in between."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from kompressor_api import names
from kompressor_operator import manifests
from kompressor_operator.cluster import ApiError, Cluster
from kompressor_operator.conditions import Event, Verdict, generation_patch, status_patch, transition
from kompressor_operator.decide import Decision, Involved, Policy, View, decide
from kompressor_operator.manifests import Attempt
from kompressor_operator.observed import (
    ChildJob,
    ChildPod,
    CompressionJob,
    Key,
    Manifest,
    Warned,
    controller_uid,
    stamp,
)
from kompressor_operator.policies import POLICIES
from kompressor_operator.refusals import Refusal, conflict, refusal
from kompressor_operator.settings import Settings
from kompressor_operator.store import Store, observe
from kompressor_operator.validation import PassParameters
from kompressor_operator.work import RetryLater

log = logging.getLogger(__name__)

EVENT_LIMIT = 1024
"""Bytes that the API server takes in an event's message."""


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class Reconciler:
    """One function, `reconcile`, and what it needs. Clock and store are injected."""

    cluster: Cluster
    store: Store
    settings: Settings
    passes: PassParameters
    clock: Callable[[], datetime] = utc_now
    policies: Sequence[Policy] = POLICIES

    async def reconcile(self, key: Key) -> float | None:
        """Make the world as the spec wants it, one step, and say so. Returns seconds after which to look again, if at all.

        Raises RetryLater if something failed that another try may cure.
        """
        job = self.store.job(key)
        if job is None:
            return None
        try:
            return await self._step(job)
        except ApiError as error:
            if error.status == 404 or "is being terminated" in error.message:
                raise RetryLater(f"{error}; it is probably being deleted", 1.0) from error
            raise RetryLater(str(error), error.retry_after) from error

    async def _step(self, job: CompressionJob) -> float | None:
        view = View(job, self.store.observed(job.uid), self.clock(), self.passes)
        decision = decide(view, self.policies)
        if decision.confirm:
            live = await self._confirmed(view)
            if live is None:
                return None
            view, decision = live, decide(live, self.policies)
        if decision.look:
            view = replace(view, observed=replace(view.observed, warnings=await self._warnings(view.job, decision.look)))
            decision = decide(view, self.policies)
        refused = await self._act(view.job, decision)
        verdict = refused.verdict(self.clock()) if refused else decision.verdict
        if verdict is not None:
            await self._tell(view.job, verdict)
        elif decision.keep_generation:
            await self._write(view.job, generation_patch(view.job))
        if refused and not refused.final:
            raise RetryLater(refused.message)
        return decision.again_after

    async def _confirmed(self, view: View) -> View | None:
        """The same view read from the API server itself; None if this incarnation of the job is gone."""
        namespace, name, uid = view.job.namespace, view.job.name, view.job.uid
        try:
            body, jobs, pods = await asyncio.gather(
                self.cluster.get(names.KIND, namespace, name),
                self.cluster.children("Job", namespace, uid),
                self.cluster.children("Pod", namespace, uid),
            )
        except ApiError as error:
            if error.status == 404:
                return None  # the watch will tell
            raise
        job = self.store.put_resource(body)
        if job.uid != uid:
            return None
        children = [child for child in map(ChildJob.parse, jobs) if child.owner == uid]
        for child in children:
            self.store.put_job(child)
        observed = observe(children, map(ChildPod.parse, pods), live=True)
        return replace(view, job=job, observed=observed, now=self.clock())

    async def _warnings(self, job: CompressionJob, child: Involved) -> tuple[Warned, ...]:
        events = [Warned.parse(event) for event in await self.cluster.warnings(job.namespace, child.uid)]
        return tuple(sorted(events, key=lambda warned: warned.seen, reverse=True))

    async def _act(self, job: CompressionJob, decision: Decision) -> Refusal | None:
        """Do it. A refusal says why it could not be done, and goes to the status."""
        if decision.start is not None:
            refused = await self._start(job, decision.start)
            if refused:
                return refused
        for change in decision.patches:
            try:
                body = await self.cluster.patch("Job", job.namespace, change.job, {"spec": change.spec})
            except ApiError as error:
                if error.status == 404:
                    continue  # gone meanwhile: the watch will tell, and that is decided anew
                raise
            self.store.put_job(ChildJob.parse(body))
        return None

    async def _start(self, job: CompressionJob, attempt: Attempt) -> Refusal | None:
        """Create the children: first what the others need, then the Job.

        The RoleBinding goes beside the Job, since the API server takes 100 ms to see that it does not escalate and the worker needs it
        only later. So a Job may be there without it, if we die in between: until the status names the Job, all of this is done again.
        """
        worker_job = manifests.worker_job(job, attempt, self.settings)
        for together in (manifests.supports(job), [manifests.role_binding(job), worker_job]):
            refusals = await asyncio.gather(*(self._create(job, child) for child in together))
            if refused := next((found for found in refusals if found), None):
                return refused
        return None

    async def _create(self, job: CompressionJob, child: Manifest) -> Refusal | None:
        """Create one child; one that is there already is as good, if it is ours."""
        kind, name, is_job = child["kind"], child["metadata"]["name"], child["kind"] == "Job"
        try:
            body = await self.cluster.create(child, strict=is_job)
        except ApiError as error:
            if error.status != 409 or error.reason == "Conflict":  # a quota that is being counted is a conflict too, but not of names
                refused = refusal(kind, name, error.status, error.message)
                if refused is None:
                    raise
                return refused
            body = await self.cluster.get(kind, job.namespace, name)
            if controller_uid(body["metadata"]) != job.uid:
                return conflict(kind, job.namespace, name)
            if "deletionTimestamp" in body["metadata"]:
                raise RetryLater(f"{kind} {job.namespace}/{name} is still being deleted", 1.0) from error
        if is_job:
            self.store.put_job(ChildJob.parse(body))
        return None

    async def _tell(self, job: CompressionJob, verdict: Verdict) -> None:
        """Write the status if it says something new, and only then tell it as an event."""
        event = transition(job, verdict)
        if await self._write(job, status_patch(job, verdict, self.clock())) and event:
            await self._emit(job, event)

    async def _write(self, job: CompressionJob, patch: Manifest) -> bool:
        """One conditional patch. A conflict means that we decided on something old: again, on what is there now."""
        if not patch:
            return False
        body = {"metadata": {"resourceVersion": job.resource_version}, "status": patch}
        self.store.put_resource(await self.cluster.patch(names.KIND, job.namespace, job.name, body, status=True))
        if "conditions" in patch:
            said = patch["conditions"][0]
            log.info("%s/%s: %s", job.namespace, job.name, said["reason"], extra={"detail": said["message"]})
        return True

    async def _emit(self, job: CompressionJob, event: Event) -> None:
        """For `kubectl describe`. An event that is lost is not worth another reconcile."""
        unique = hashlib.sha256(f"{job.uid}/{job.resource_version}/{event.reason}".encode()).hexdigest()[:16]
        now = stamp(self.clock())
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{job.name[:200]}.{unique}", "namespace": job.namespace},
            "involvedObject": {
                "apiVersion": names.API_VERSION,
                "kind": names.KIND,
                "namespace": job.namespace,
                "name": job.name,
                "uid": job.uid,
                "resourceVersion": job.resource_version,
            },
            "type": "Warning" if event.warning else "Normal",
            "reason": event.reason,
            "message": event.message.encode()[:EVENT_LIMIT].decode(errors="ignore"),
            "source": {"component": names.FIELD_MANAGER},
            "reportingComponent": names.FIELD_MANAGER,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            await self.cluster.create(body)
        except ApiError as error:
            log.warning("event lost: %s", error)
