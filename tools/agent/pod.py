"""One pod: observe its containers, decide, act, report. Level-based: every round starts from what is, so nothing is missed."""

import contextlib
import logging
import os
import select
import threading
import time

from agent import containers, stopping
from agent.client import ApiError, ApiUnavailable, Object
from agent.context import Context
from agent.home import Home
from agent.lifecycle import decide
from agent.probes import KINDS, Outcome, Prober
from agent.records import Container
from agent.status import TERMINAL, Ending, Observed, pod_status
from agent.volumes import MountError, Volumes

log = logging.getLogger(__name__)
_RETRY_SECONDS = 1.0
_FORCED_GRACE_SECONDS = 1.0
_REFUSED = "UnexpectedAdmissionError"
_DEADLINE = "Pod was active on the node longer than the specified deadline"


class PodWorker:
    """The thread of one pod, from its binding to this node until the API server has forgotten it."""

    def __init__(self, context: Context, pod: Object) -> None:
        self.name = f"pod {pod['metadata']['namespace']}/{pod['metadata']['name']}"
        self.uid: str = pod["metadata"]["uid"]
        self.finished = False
        self._context = context
        self._lock = threading.RLock()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK)
        self._pod = pod
        self._gone = False
        self._ending: Ending | None = None
        self._reported: Object | None = None
        self._acknowledged = pod.get("status", {}).get("phase") in TERMINAL
        self._deleted = False
        self._volumes_ready = False
        self._home = Home.of(context, pod)
        self.containers = self._home.containers
        facts = context.facts
        self._volumes = Volumes(self._view(), self._home.volumes, context.root / "claims", context.client, facts.allocatable)
        self._places = self._home.places
        if self._home.ip and self._home.refusal is None and not self._acknowledged:
            context.names.enter(self.uid, self._view, self._home.folder)

    # Called by other threads

    def start(self) -> None:
        threading.Thread(target=self._run, name=self.name, daemon=True).start()

    def update(self, pod: Object) -> None:
        """A newer version of the pod, or the same."""
        with self._lock:
            if int(pod["metadata"]["resourceVersion"]) > int(self._pod["metadata"]["resourceVersion"]):
                self._pod = pod
        self.ring()

    def forget(self) -> None:
        """The API server no longer has the pod."""
        self._gone = True
        self.ring()

    def ring(self) -> None:
        """Look again, now."""
        with self._lock:
            if not self.finished:
                os.eventfd_write(self._bell, 1)

    def describe(self) -> Object:
        return self._pod

    # The worker's own thread

    def _run(self) -> None:
        while not (self.finished or self._context.leaving.is_set()):
            try:
                wake_at = self._round(time.time())
            except ApiUnavailable as error:
                log.info("%s: %s; trying again", self.name, error)
                wake_at = time.time() + _RETRY_SECONDS
            except Exception:
                # One pod's trouble must not take the node down, nor spin.
                log.exception("%s: unexpected; trying again", self.name)
                wake_at = time.time() + 10 * _RETRY_SECONDS
            if not self.finished:
                self._wait(wake_at)

    def _wait(self, until: float) -> None:
        poller = select.poll()
        poller.register(self._bell, select.POLLIN)
        for container in self.containers:
            if container.run and container.run.pidfd >= 0:
                poller.register(container.run.pidfd, select.POLLIN)
        left = min(until - time.time(), 3600.0)
        poller.poll(max(0.0, left) * 1000 + 1)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)

    def _view(self) -> Object:
        """The pod with its addresses, which the API server may not know yet."""
        ip, host = self._home.ip, self._context.facts.address
        own = {"podIP": ip, "podIPs": [{"ip": ip}], "hostIP": host, "hostIPs": [{"ip": host}]}
        return {**self._pod, "status": {**self._pod.get("status", {}), **own}}

    def _round(self, now: float) -> float:
        """One look at everything; returns when to look again."""
        pod = self._view()
        for container in self.containers:
            if container.run and container.run.running:
                container.run.observe()
                if not container.run.running:
                    self._ended(container)
        if self._gone:
            return self._tear_down(now)
        if self._acknowledged:
            return self._delete(pod, now)
        self._ending = self._ending or self._reason_to_end(pod, now)
        wake_at = float("inf")
        if self._ending is None:
            wake_at = self._advance(pod, now)
        if self._ending is not None:
            wake_at = self._stop_all(pod, now)
        self._report(pod, now)
        return min(wake_at, self._next_kill(), self._deadline(pod))

    def _next_kill(self) -> float:
        waiting = [c.stopping.deadline for c in self.containers if c.stopping and not c.stopping.killed]
        return min(waiting, default=float("inf"))

    def _reason_to_end(self, pod: Object, now: float) -> Ending | None:
        if self._home.refusal is not None:
            self._context.events.pod(pod, "Warning", _REFUSED, self._home.refusal)
            return Ending(_REFUSED, self._home.refusal, failed=True, refused=True)
        if "deletionTimestamp" in pod["metadata"]:
            return Ending()
        if now >= self._deadline(pod):
            self._context.events.pod(pod, "Normal", "DeadlineExceeded", _DEADLINE)
            return Ending("DeadlineExceeded", _DEADLINE, failed=True)
        return None

    def _deadline(self, pod: Object) -> float:
        seconds = pod["spec"].get("activeDeadlineSeconds")
        return self._home.started_at + seconds if seconds is not None and self._ending is None else float("inf")

    def _advance(self, pod: Object, now: float) -> float:
        """Volumes, then containers, as far as they go."""
        if not self._volumes_ready or now >= self._volumes.due():
            try:
                self._places = self._volumes.prepare()
                self._volumes_ready = True
            except MountError as error:
                self._context.events.pod(pod, "Warning", "FailedMount", str(error))
                if not self._volumes_ready:
                    return now + _RETRY_SECONDS
        step = decide(pod["spec"].get("restartPolicy", "Always"), self.containers, now, self._context.backoff)
        for container, delay in step.backing_off:
            if container.waiting is None:
                self._back_off(pod, container, delay)
        for container in step.start:
            containers.start(self._context, pod, container, self._places, self._home.gpus, now)
            step.wake_at = min(step.wake_at, container.retry_at or float("inf"))
        if any(not container.running and container.waiting is None for container in step.start):
            step.wake_at = now  # it could not be started, which may be the end of the pod
        for container in self.containers:
            self._probe(container)
        if step.finished:
            self._ending = Ending()
        return min(step.wake_at, self._volumes.due())

    def _back_off(self, pod: Object, container: Container, delay: float) -> None:
        meta = pod["metadata"]
        where = f"container={container.name} pod={meta['name']}_{meta['namespace']}({meta['uid']})"
        container.waiting = ("CrashLoopBackOff", f"back-off {delay:g}s restarting failed {where}")
        self._context.events.pod(pod, "Warning", "BackOff", f"Back-off restarting failed container {container.name} in pod {where}")

    def _ended(self, container: Container) -> None:
        run = container.run
        assert run is not None
        container.end()
        if run.state.finished_at - run.state.started_at > 2 * self._context.backoff.most:
            container.forgiven = run.attempt + 1
        self._home.drop_old_runs(container)

    def _probe(self, container: Container) -> None:
        """Starts the probes of a fresh run, or of one that an earlier agent started."""
        run = container.run
        if run is None or not run.running or container.probers:
            return

        def report(kind: str, outcome: Outcome, seen: str) -> None:
            self._probed(container, run.attempt, kind, outcome, seen)

        for kind in KINDS:
            if kind in container.spec:
                prober = Prober(kind, container.spec, self._home.ip, run.folder, lambda: container.started, report)
                container.probers.append(prober)
                prober.start()

    def _probed(self, container: Container, attempt: int, kind: str, outcome: Outcome, seen: str) -> None:
        """From a probe's thread."""
        if container.restarts != attempt or not container.running:
            return
        pod, name = self._pod, KINDS[kind]
        if outcome is not Outcome.PASSED:
            self._context.events.pod(pod, "Warning", "Unhealthy", f"{name} probe failed: {seen}")
        if outcome is Outcome.FAILING:
            return
        if kind == "startupProbe" and outcome is Outcome.PASSED:
            container.started = True
            container.ready = "readinessProbe" not in container.spec
        elif kind == "readinessProbe":
            container.ready = outcome is Outcome.PASSED
        elif outcome is Outcome.FAILED:
            why = f"Container {container.name} failed {name.lower()} probe, will be restarted"
            self._context.events.pod(pod, "Normal", "Killing", why)
            grace = container.spec[kind].get("terminationGracePeriodSeconds", pod["spec"].get("terminationGracePeriodSeconds", 30))
            stopping.begin(container, grace, time.time(), self._home.ip)
        self.ring()

    def _stop_all(self, pod: Object, now: float) -> float:
        grace = pod["spec"].get("terminationGracePeriodSeconds", 30)
        grace = pod["metadata"].get("deletionGracePeriodSeconds", grace)
        for container in self.containers:
            if container.running:
                if container.stopping is None:
                    self._context.events.pod(pod, "Normal", "Killing", f"Stopping container {container.name}")
                stopping.begin(container, grace, now, self._home.ip)
        return float("inf")

    def _report(self, pod: Object, now: float) -> None:
        """Writes the status if it changed. What a pod held is free before its end is told, which may bring the next pod at once."""
        over = self._ending is not None and not any(container.running for container in self.containers)
        if over:
            self._context.names.leave(self.uid)
            self._home.release()
        facts = self._context.facts
        seen = Observed(self.containers, facts.address, self._home.ip, self._home.started_at, self._volumes_ready, self._ending, over)
        status = pod_status(pod, seen, now)
        if status != self._reported:
            meta = pod["metadata"]
            path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}/status"
            try:
                self.update(self._context.client.patch(path, {"metadata": {"uid": self.uid}, "status": status}))
            except ApiError as error:
                if error.code not in (404, 409):
                    raise
                self.forget()  # deleted, or another pod of the same name has taken its place
                return
            self._reported = status
        if over:
            self._acknowledged = True
            self.ring()

    def _delete(self, pod: Object, now: float) -> float:
        """The pod is over and the API server knows: if someone asked for its deletion, it may go."""
        if "deletionTimestamp" in pod["metadata"] and not self._deleted:
            meta = pod["metadata"]
            path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}"
            try:
                self._context.client.delete(path, {"gracePeriodSeconds": 0, "preconditions": {"uid": self.uid}})
            except ApiError as error:
                if error.code not in (404, 409):
                    raise
            self._deleted = True
        return float("inf")

    def _tear_down(self, now: float) -> float:
        """Nobody asks for the pod any more: what still runs is stopped at once, its folder goes."""
        for container in self.containers:
            if container.running:
                stopping.begin(container, _FORCED_GRACE_SECONDS, now, self._home.ip)
        if any(container.running for container in self.containers):
            return self._next_kill()
        self._context.names.leave(self.uid)
        self._home.remove()
        with self._lock:
            self.finished = True
            os.close(self._bell)
        return float("inf")
