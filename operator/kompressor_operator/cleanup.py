"""deletionPolicy Delete: what the job wrote goes before the CompressionJob does. Pure.

A finalizer holds the resource until a Job with the worker's credentials has run `kompressor clean`; the operator itself has none. The Job
has no owner, since foreground deletion would take it along. Whatever happens the finalizer goes in the end: nothing may hang for ever.
"""

from __future__ import annotations

import json
from datetime import timedelta
from urllib.parse import urlsplit

from kompressor_api import names
from kompressor_api.names import Reason, Role, Step
from kompressor_operator.conditions import Event
from kompressor_operator.decide import CONFIRM, NOTHING, Decision, View
from kompressor_operator.endings import ending_of
from kompressor_operator.manifests import labels, marked, pod_failure_rules, stem, users_account
from kompressor_operator.observed import ChildJob, CompressionJob, Manifest
from kompressor_operator.planner import RESOURCES, planner_image, shared
from kompressor_operator.pod_shape import container, pod_spec
from kompressor_operator.progress import running
from kompressor_operator.settings import Settings
from kompressor_operator.troubles import LOST_AFTER, lost
from kompressor_operator.worker_pod import PROBED_KEY, places

COMMAND = ["kompressor", "clean", "--in-cluster"]
SECONDS = 600
"""For the clean-up, and again until its Job is removed."""
OVERDUE = timedelta(seconds=SECONDS + 60)
"""From its creation, queue included: the Job's own deadline does not run while it is suspended, nor end it while its pod's node is lost."""
RETRIES = 3
ON_ITS_WAY = (Reason.PENDING, Reason.COMPRESSING, Reason.RETRYING)
"""What is said of a Job that nothing keeps from running."""


def deleting(view: View) -> Decision | None:
    """Owner references clean up the children. With our finalizer: stop the worker, wait until it is gone, clean up, let go."""
    job, observed = view.job, view.observed
    if not job.deleting:
        return None
    if names.FINALIZER not in job.finalizers:
        return NOTHING
    if observed.cleanup is not None and observed.cleanup.ended:
        return _over(view, observed.cleanup)
    if observed.cleanup is not None and (observed.cleanup.created + OVERDUE <= view.now or not observed.cleanup.deleting):
        return _going(view, observed.cleanup)
    if not observed.live:
        return CONFIRM
    if job.finished and not job.status.get("jobName") and not observed.jobs:
        return Decision(finalizer=False)  # it ended before any worker: there is nothing of it
    before = (*observed.jobs, *([observed.preflight] if observed.preflight else []))
    running = tuple(child for child in before if not child.ended and not child.deleting)
    if running:
        return Decision(deletes=running)
    alive = [pod for pod in (*observed.pods, *observed.step_pods) if not pod.ended]
    if any(not lost(pod, view.now) for pod in alive):  # one on a lost node has lost its claim on the output, or will
        return Decision(again_after=LOST_AFTER.total_seconds())
    return Decision(create=(cleanup_job(job, view.settings),))


def guarded(view: View) -> Decision | None:
    """A finalizer before the first child, where the output is to be deleted too."""
    job = view.job
    wanted = job.spec.get("deletionPolicy") == "Delete" and not job.finished
    return Decision(finalizer=True) if wanted and names.FINALIZER not in job.finalizers else None


def given_up(view: View, why: str) -> Decision:
    """The clean-up Job cannot be created."""
    return Decision(finalizer=False, event=_left(view.job, f"the clean-up could not be started: {why}"))


def cleanup_job(job: CompressionJob, settings: Settings) -> Manifest:
    """All that it needs is inline: the job's ConfigMap and service account may be gone before it starts."""
    marks = {**labels(job), names.LABEL_STEP: str(Step.CLEANUP)}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"{stem(job)}-cleanup", "namespace": job.namespace, "labels": marks},
        "spec": {
            "parallelism": 1,
            "completions": 1,
            "backoffLimit": RETRIES,
            "activeDeadlineSeconds": SECONDS,
            "ttlSecondsAfterFinished": SECONDS,
            "podFailurePolicy": {"rules": pod_failure_rules()},
            "podReplacementPolicy": "Failed",
            "template": marked(shared(job, {"spec": _pod(job, settings)}), marks),
        },
    }


def _over(view: View, cleanup: ChildJob) -> Decision:
    if cleanup.ended == "Complete":
        said = ending_of(cleanup, view.observed.pods_of(cleanup)).message
        message = said or f"what this job wrote to {view.job.spec['output']['uri']} is deleted"
        return Decision(finalizer=False, event=Event(False, Reason.CLEANED_UP, message))
    if not view.observed.live:
        return CONFIRM  # the pod that says why may not have reached us yet
    ending = ending_of(cleanup, view.observed.pods_of(cleanup))
    return Decision(finalizer=False, event=_left(view.job, f"{ending.reason}: {ending.message}"))


def _going(view: View, cleanup: ChildJob) -> Decision:
    """It may take its time, but not hold the job for ever."""
    rest = cleanup.created + OVERDUE - view.now
    if rest > timedelta():
        return _told(view, cleanup, rest.total_seconds())
    if not view.observed.live:
        return CONFIRM
    how = "kept suspended by something else" if cleanup.suspended else "not over"
    why = f"clean-up Job {cleanup.name} was still {how} {OVERDUE.total_seconds():.0f} s after its creation, and is deleted"
    return Decision(finalizer=False, deletes=(cleanup,), event=_left(view.job, why))


def _told(view: View, cleanup: ChildJob, rest: float) -> Decision:
    """As of a worker's Job that goes on, but only what is in its way."""
    if cleanup.suspended:
        kept = f"the clean-up waits: Job {cleanup.name} is kept suspended by something else"
        return Decision(blocked=Event(True, Reason.QUEUED, kept), again_after=rest)
    if cleanup.failing:
        return Decision(again_after=rest)  # within seconds it says why
    decision = running(view, cleanup, (), {})
    verdict = decision.verdict
    if verdict is None:
        return decision  # the warnings are wanted first
    blocked = None
    if verdict.reason not in ON_ITS_WAY:
        blocked = Event(True, verdict.reason, f"the clean-up waits: {verdict.message}")
    return Decision(blocked=blocked, again_after=min(rest, decision.again_after or rest))


def _left(job: CompressionJob, why: str) -> Event:
    uri = job.spec["output"]["uri"]
    remedy = f"what it wrote to {uri} may still be there: `kompressor clean {uri}`, or delete it yourself"
    return Event(True, Reason.CLEANUP_FAILED, f"{why[:600]}; {remedy}")


def _pod(job: CompressionJob, settings: Settings) -> Manifest:
    """Sees the output alone, with the credentials that the worker had for it."""
    volumes = [{"name": name, **source} for name, source, _ in _volumes(job)]
    # the account made for the job may be gone by now
    return pod_spec(settings, users_account(job) or "default", _container(job, settings), volumes, token=False)


def _container(job: CompressionJob, settings: Settings) -> Manifest:
    output = job.spec["output"]
    values = {**settings.worker_env, **places(settings)} | {"HOME": "/tmp", "XDG_CACHE_HOME": "/tmp"}
    values |= {names.ENV_OUTPUT: json.dumps(output), names.ENV_JOB_UID: job.uid}
    env: list[Manifest] = [{"name": name, "value": value} for name, value in values.items()]
    env_from: list[Manifest] = []
    if secret := output.get("credentialsSecret"):
        env_from.append({"prefix": Role.OUTPUT.env_prefix, "secretRef": {"name": secret}})
        if key := PROBED_KEY.get(urlsplit(output["uri"]).scheme):
            env.append({"name": Role.OUTPUT.env_prefix + key, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    mounts = [{"name": name, **mount} for name, _, mount in _volumes(job)]
    return container(settings, planner_image(job, settings), COMMAND, env, mounts, env_from) | {"resources": RESOURCES}


def _volumes(job: CompressionJob) -> list[tuple[str, Manifest, Manifest]]:
    """Name, source and mount of each."""
    output = job.spec["output"]
    found: list[tuple[str, Manifest, Manifest]] = [("tmp", {"emptyDir": {}}, {"mountPath": "/tmp"})]
    if bundle := output.get("caBundle"):
        key = bundle.get("key") or "ca.crt"
        source = {"configMap": {"name": bundle["configMap"], "items": [{"key": key, "path": key}]}}
        found.append(("ca", source, {"mountPath": f"{names.CA_DIRECTORY}/{Role.OUTPUT}", "readOnly": True}))
    place = urlsplit(output["uri"])
    if place.scheme == "pvc":
        source = {"persistentVolumeClaim": {"claimName": place.netloc}}
        found.append(("claim", source, {"mountPath": f"{names.CLAIM_DIRECTORY}/{place.netloc}"}))
    return found
