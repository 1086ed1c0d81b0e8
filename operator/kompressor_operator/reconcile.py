"""observe -> decide -> act -> one status patch. The same for an event, a restart and the timer; nothing is remembered in between."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from kompressor_api import names
from kompressor_api.names import Condition
from kompressor_operator import manifests
from kompressor_operator.bulletin import Bulletin
from kompressor_operator.cleanup import given_up
from kompressor_operator.cluster import ApiError, Cluster
from kompressor_operator.conditions import Event, Verdict, blocked_patch, event_body, events, generation_patch, status_patch
from kompressor_operator.decide import Decision, Policy, View, decide
from kompressor_operator.manifests import Attempt
from kompressor_operator.metrics import Metrics
from kompressor_operator.newer import Served, outdated
from kompressor_operator.observed import ChildJob, CompressionJob, Key, Manifest, ours
from kompressor_operator.pods import ChildPod
from kompressor_operator.policies import POLICIES
from kompressor_operator.recipes import fetch
from kompressor_operator.refusals import NAMESPACE_GOES, Refusal, conflict, refusal
from kompressor_operator.server_clock import utc_now
from kompressor_operator.settings import Settings
from kompressor_operator.store import Store, observe
from kompressor_operator.usage import with_usage
from kompressor_operator.validation import PassParameters
from kompressor_operator.work import RetryLater

log = logging.getLogger(__name__)

LOOKS = 7
"""Times that one reconcile may ask for more before it decides: each of confirm, look, finalizer, resolve and unknown once, one to spare."""
CREATION_TRIES = 8
"""Tries after which a clean-up Job that is refused is given up: about half a minute, so that nothing hangs for a full quota."""


@contextlib.contextmanager
def gone_is_fine(*codes: int) -> Iterator[None]:
    """What is gone (or, by these codes, replaced by a namesake) the watch will tell, and that is decided anew."""
    try:
        yield
    except ApiError as error:
        if error.status not in (404, *codes):
            raise


@dataclass(frozen=True)
class Reconciler:
    """One function, `reconcile`, and what it needs. Clock and store are injected."""

    cluster: Cluster
    store: Store
    settings: Settings
    passes: PassParameters
    clock: Callable[[], datetime] = utc_now
    policies: Sequence[Policy] = POLICIES
    tries: Callable[[Key], int] = field(default=lambda key: 0)
    """How often this key has failed since its last success."""
    metrics: Metrics = field(default_factory=Metrics)
    served: Served = field(default_factory=Served)
    bulletin: Bulletin = field(default_factory=Bulletin)

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
            if error.status == 404 or NAMESPACE_GOES in error.message:
                raise RetryLater(f"{error}; it is probably being deleted", 1.0) from error
            raise RetryLater(str(error), error.retry_after) from error

    async def _step(self, job: CompressionJob) -> float | None:
        view = self._view(job)
        for _ in range(LOOKS):
            decision = decide(view, self.policies)
            known = await self._learn(view, decision)
            if known is view:
                return await self._conclude(view, decision)
            if known is None or isinstance(known, float):
                return known
            if isinstance(known, Refusal):
                await self._refuse(view, known)
                return None
            view = known
        raise RetryLater(f"{job.namespace}/{job.name}: still undecided after {LOOKS} looks")

    def _view(self, job: CompressionJob) -> View:
        observed, tries = self.store.observed(job.uid), self.tries(job.key)
        return View(job, observed, self.clock(), self.settings, self.passes, kueue=self.store.kueue, tries=tries)

    async def _learn(self, view: View, decision: Decision) -> View | Refusal | float | None:
        """What the decision wants to know or have before it is one; the same view if it is one, None if the job is gone. Seconds until the
        next look, if that is not known yet."""
        if decision.confirm:
            return await self._confirmed(view)
        if decision.look:
            warnings = await self.bulletin.about(self.cluster, view.job.namespace, decision.look)
            return warnings if isinstance(warnings, float) else replace(view, observed=replace(view.observed, warnings=warnings))
        if decision.finalizer:
            return replace(view, job=await self._guard(view.job))
        if decision.resolve:
            found = await fetch(self.cluster, view.job)
            return found if isinstance(found, Refusal) else replace(view, resolved=found.spec, recipe=found.recipe)
        if decision.unknown:
            if await self.served.all_known(self.cluster, decision.unknown):
                return outdated(decision.unknown)
            return replace(view, misspelt=True)
        return view

    async def _conclude(self, view: View, decision: Decision) -> float | None:
        try:
            refused = await self._act(view, decision)
        except ApiError as error:
            if not (view.job.deleting and decision.create and NAMESPACE_GOES in error.message):
                raise
            decision, refused = given_up(view, error.message), None  # no Job can be made there ever again
        if refused and view.job.deleting and view.tries >= CREATION_TRIES:
            decision, refused = given_up(view, refused.message), None
        if refused:
            await self._refuse(view, refused)
            return None
        if decision.verdict is not None:
            await self._tell(view.job, with_usage(view, decision.verdict))
        elif view.job.deleting and decision.finalizer is None:
            await self._tell_blocked(view.job, decision.blocked)
        elif decision.keep_generation:
            await self._write(view.job, generation_patch(view.job))
        if decision.finalizer is False:
            await self._release(view.job)
            self.metrics.cleaned(decision.event)
        if decision.event:
            await self._emit(view.job, decision.event)
        return decision.again_after

    async def _refuse(self, view: View, refused: Refusal) -> None:
        if view.job.deleting:  # its status tells how it ended, not what becomes of its output
            raise RetryLater(refused.message)
        await self._tell(view.job, refused.verdict(self.clock()))
        if not refused.final:
            raise RetryLater(refused.message)

    async def _guard(self, job: CompressionJob) -> CompressionJob:
        """Our finalizer, before there is anything that it guards. A list is replaced as a whole, so only the one that we have seen."""
        meta = {"resourceVersion": job.resource_version, "finalizers": [*job.finalizers, names.FINALIZER]}
        return self.store.put_resource(await self.cluster.patch(names.KIND, job.namespace, job.name, {"metadata": meta}))

    async def _release(self, job: CompressionJob) -> None:
        """The answer may show an object that is gone by now, so it is not kept."""
        job = self.store.job(job.key) or job  # our own status write has just moved its version
        rest = [name for name in job.finalizers if name != names.FINALIZER]
        meta = {"resourceVersion": job.resource_version, "finalizers": rest}
        await self.cluster.patch(names.KIND, job.namespace, job.name, {"metadata": meta})

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
        observed = observe(children, [*map(ChildPod.parse, pods), *self.store.last_words.of(uid, children)], live=True)
        return replace(view, job=job, observed=observed, now=self.clock())

    async def _act(self, view: View, decision: Decision) -> Refusal | None:
        """Do it. A refusal says why it could not be done, and goes to the status."""
        job = view.told
        if decision.dry_run is not None:
            refused = await self._create(job, manifests.worker_job(job, decision.dry_run, self.settings), dry_run=True)
            if refused:
                return refused
        for child in decision.create:
            if refused := await self._create(job, child):
                return refused
        for child in decision.keep:
            if refused := await self._keep(job, child):
                return refused
        if decision.start is not None:
            refused = await self._start(view, decision.start)
            if refused:
                return refused
        for change in decision.patches:
            with gone_is_fine():
                body = await self.cluster.patch("Job", job.namespace, change.job, {"spec": change.spec})
                self.store.put_job(ChildJob.parse(body))
        for doomed in decision.deletes:
            with gone_is_fine(409):
                await self.cluster.delete("Job", doomed.namespace, doomed.name, doomed.uid)
        return None

    async def _start(self, view: View, attempt: Attempt) -> Refusal | None:
        """Create the children: first what the others need, then the Job.

        The RoleBinding goes beside the Job, since the API server takes 100 ms to see that it does not escalate and the worker needs it
        only later. So a Job may be there without it, if we die in between: until the status names the Job, all of this is done again.
        What the others need was made for the preflight already, so its Job is proof that it is there. All that takes its time, and a name
        is free again once its Job is deleted: what has changed meanwhile is decided anew, or another operator's Job would rise again.
        """
        job, worker_job = view.told, manifests.worker_job(view.told, attempt, self.settings)
        proved = view.observed.preflight is not None and not view.job.status.get("jobName")
        supports = [] if proved else manifests.supports(job, config=view.resolved is None)
        for together in (supports, [manifests.role_binding(job), worker_job]):
            if worker_job in together and self._changed(job):
                raise RetryLater(f"{job.namespace}/{job.name} has changed while its start was prepared")
            refusals = await asyncio.gather(*(self._create(job, child) for child in together))
            if refused := next((found for found in refusals if found), None):
                return refused
        return None

    def _changed(self, job: CompressionJob) -> bool:
        """As far as the watches have told."""
        now = self.store.resources.records.get(job.key)
        return now is None or (now.uid, now.resource_version) != (job.uid, job.resource_version)

    async def _keep(self, job: CompressionJob, child: Manifest) -> Refusal | None:
        """One request where it is there, which it nearly always is."""
        try:
            await self.cluster.get(child["kind"], job.namespace, child["metadata"]["name"])
        except ApiError as error:
            if error.status != 404:
                raise
            return await self._create(job, child)
        return None

    async def _create(self, job: CompressionJob, child: Manifest, dry_run: bool = False) -> Refusal | None:
        """Create one child; one that is there already is as good, if it is ours."""
        kind, name, is_job = child["kind"], child["metadata"]["name"], child["kind"] == "Job"
        try:
            body = await self.cluster.create(child, strict=is_job, dry_run=dry_run)
        except ApiError as error:
            if error.status != 409 or error.reason == "Conflict":  # a quota that is being counted is a conflict too, but not of names
                refused = refusal(kind, name, error.status, error.message)
                if refused is None:
                    raise
                return refused
            body = await self.cluster.get(kind, job.namespace, name)
            if not ours(body, job):
                return conflict(kind, job.namespace, name)
            if "deletionTimestamp" in body["metadata"]:
                raise RetryLater(f"{kind} {job.namespace}/{name} is still being deleted", 1.0) from error
        if is_job and not dry_run:
            self.store.put_job(ChildJob.parse(body))
        return None

    async def _tell(self, job: CompressionJob, verdict: Verdict) -> None:
        """Write the status if it says something new, and only then tell it as an event."""
        if await self._write(job, status_patch(job, verdict, self.clock())):
            self.metrics.told(job, verdict)
            for event in events(job, verdict):
                await self._emit(job, event)

    async def _tell_blocked(self, job: CompressionJob, blocked: Event | None) -> None:
        """The same of what a deletion waits for; other words for the same reason are no other event."""
        before = job.condition(Condition.CLEANUP_BLOCKED).get("reason")
        written = await self._write(job, blocked_patch(job, blocked, self.clock()))
        if written and blocked and blocked.reason != before:
            await self._emit(job, blocked)

    async def _write(self, job: CompressionJob, patch: Manifest) -> bool:
        """One conditional patch. A conflict means that we decided on something old: again, on what is there now."""
        if not patch:
            return False
        body = {"metadata": {"resourceVersion": job.resource_version}, "status": patch}
        self.store.put_resource(await self.cluster.patch(names.KIND, job.namespace, job.name, body, status=True))
        stored = job.status.get("conditions") or ()
        if said := next((c for c in patch.get("conditions") or () if c not in stored), None):
            about = {"namespace": job.namespace, "job": job.name, "uid": job.uid, "reason": said["reason"]}
            attempt = patch.get("attempt") or job.status.get("attempt")
            log.info("%s/%s: %s", job.namespace, job.name, said["reason"], extra={**about, "attempt": attempt, "detail": said["message"]})
        return True

    async def _emit(self, job: CompressionJob, event: Event) -> None:
        """For `kubectl describe`. An event that is lost is not worth another reconcile."""
        try:
            await self.cluster.create(event_body(job, event, self.clock()))
        except ApiError as error:
            about = {"namespace": job.namespace, "job": job.name, "uid": job.uid, "reason": event.reason}
            log.warning("event lost: %s", error, extra={**about, "detail": event.message})
