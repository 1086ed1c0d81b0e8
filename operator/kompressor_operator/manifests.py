"""The children of a CompressionJob as dicts: ConfigMap, ServiceAccount, Role, RoleBinding, a Service for a group of pods, Job. Pure.

Names are deterministic, so that a second creation meets a 409 and not a second child; every child has the CompressionJob as its
controlling owner, so that Kubernetes cleans up even while the operator is down. The pod itself is in worker_pod.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kompressor_api import names
from kompressor_api.failures import KILLED
from kompressor_api.names import ExitCode, Step
from kompressor_operator import group
from kompressor_operator.observed import CompressionJob, Manifest
from kompressor_operator.pod_template import overlay_of
from kompressor_operator.settings import Settings
from kompressor_operator.worker_pod import worker_template

RECIPE_FILE = "recipe.json"
"""Beside job.json in the ConfigMap of a job with a recipe: {kind, name, generation, spec} as it was read."""

OUT_OF_MEMORY_CODES = (int(ExitCode.OUT_OF_MEMORY), KILLED)
"""The worker's own, and SIGKILL; only the pod's reason says whether the kernel killed it for memory."""


@dataclass(frozen=True)
class Attempt:
    """One Job in the life of a CompressionJob; a new one only where a Job cannot retry in place."""

    number: int = 1
    memory_plan: int = 0
    """How often it ran out of memory before."""
    failures_before: int = 0
    """Failures of earlier attempts that count against retry.limit."""
    image: str = ""
    """Of the worker; empty for what the job and the settings say now. An attempt keeps the image of the one before it."""
    deadline: int | None = None
    """Seconds that this attempt may take; None for no limit."""
    plan: Mapping[str, Any] | None = None
    """What the preflight estimates, before the status says so; None for what the status says."""


def stem(job: CompressionJob) -> str:
    """`<name cut to 40>-<6 of sha256(uid)>`: at most 47 bytes, of this incarnation alone."""
    name = job.name if group.pods_in(job.spec) == 1 else job.name.replace(".", "-")  # a host name has no dots
    return f"{name[:40].rstrip('-.')}-{hashlib.sha256(job.uid.encode()).hexdigest()[:6]}"


def job_name(job: CompressionJob, attempt: int) -> str:
    """Name of the Job; its pods add six bytes, those of a group their index too, and must stay below 63."""
    return f"{stem(job)}-{attempt}"


def labels(job: CompressionJob) -> dict[str, str]:
    return {
        names.LABEL_NAME: "kompressor-worker",
        names.LABEL_INSTANCE: job.name[:63].rstrip("-."),  # a label holds 63 bytes, a name 253
        names.LABEL_MANAGED_BY: names.MANAGED_BY,
        names.LABEL_JOB_UID: job.uid,
    }


def owner_reference(job: CompressionJob) -> Manifest:
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "name": job.name,
        "uid": job.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def spec_digest(spec: Manifest) -> str:
    """Digest of what the worker was told, without the fields that may change on the way."""
    fixed = {key: value for key, value in spec.items() if key not in names.MUTABLE}
    text = json.dumps(fixed, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def service_account_name(job: CompressionJob) -> str:
    """The user's own, which is used as it is, or the one made for this job alone."""
    return users_account(job) or stem(job)


def users_account(job: CompressionJob) -> str:
    """A service account that the job names; podTemplate has the last word."""
    template = overlay_of(job.spec).get("spec") or {}
    named = template.get("serviceAccountName") or template.get("serviceAccount")
    return str(named or (job.spec.get("worker") or {}).get("serviceAccountName") or "")


def supports(job: CompressionJob, config: bool = True) -> list[Manifest]:
    """What must exist before the RoleBinding and the Jobs, in any order; without the ConfigMap where it is there for certain."""
    children = [*([config_map(job)] if config else []), role(job)]
    if not users_account(job):
        children.append(service_account(job))
    if group.pods_in(job.spec) > 1:
        children.append(service(job))
    return children


def config_map(job: CompressionJob, spec: Manifest | None = None, recipe: Manifest | None = None) -> Manifest:
    """The job as the worker reads it: immutable, so that nothing that runs changes under its feet.

    With a recipe, the spec that was made with it, and the recipe itself for the record.
    """
    told = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": job.name, "namespace": job.namespace, "uid": job.uid, "generation": job.generation},
        "spec": job.spec if spec is None else spec,
    }
    data = {names.JOB_FILE: told} | ({RECIPE_FILE: recipe} if recipe else {})
    return child(job, "v1", "ConfigMap", {"immutable": True, "data": {name: json.dumps(value, indent=1) for name, value in data.items()}})


def service_account(job: CompressionJob) -> Manifest:
    """The worker's identity; the token is mounted by the pod that asks for it, and by no other."""
    return child(job, "v1", "ServiceAccount", {"automountServiceAccountToken": False})


def service(job: CompressionJob) -> Manifest:
    """One for all attempts, since their pods never live at once; the host names tell them apart."""
    selector = {names.LABEL_JOB_UID: job.uid, names.LABEL_STEP: str(Step.COMPRESS)}
    return child(job, "v1", "Service", {"spec": group.service_spec(selector)}, name=group.service_name(stem(job)))


def role(job: CompressionJob) -> Manifest:
    """May read this one resource and patch its status, nothing else."""
    api = {"apiGroups": [names.GROUP], "resourceNames": [job.name]}
    rules = [
        {**api, "resources": [names.PLURAL], "verbs": ["get"]},
        {**api, "resources": [f"{names.PLURAL}/status"], "verbs": ["get", "patch"]},
    ]
    return child(job, "rbac.authorization.k8s.io/v1", "Role", {"rules": rules})


def role_binding(job: CompressionJob) -> Manifest:
    subject = {"kind": "ServiceAccount", "name": service_account_name(job), "namespace": job.namespace}
    group = "rbac.authorization.k8s.io"
    reference = {"apiGroup": group, "kind": "Role", "name": stem(job)}
    return child(job, f"{group}/v1", "RoleBinding", {"roleRef": reference, "subjects": [subject]})


def worker_job(job: CompressionJob, attempt: Attempt, settings: Settings) -> Manifest:
    """The Job that retries in place. Its template cannot change later, so all of it is decided here."""
    marks = {**labels(job), names.LABEL_STEP: str(Step.COMPRESS), names.LABEL_ATTEMPT: str(attempt.number)}
    plan = job.status.get("plan") if attempt.plan is None else attempt.plan
    pods, name = group.pods_in(job.spec), job_name(job, attempt.number)
    if pods > 1:
        marks[names.LABEL_GROUP] = str(pods)
    template = worker_template(
        job,
        settings,
        stem(job),
        service_account_name(job),
        job_name=name,
        subdomain=group.service_name(stem(job)) if pods > 1 else "",
        memory_plan=attempt.memory_plan,
        image=attempt.image,
        plan=plan,
    )
    spec: Manifest = {
        "parallelism": pods,
        "completions": pods,
        "backoffLimit": backoff_limit(job, attempt.failures_before),
        "podFailurePolicy": {"rules": pod_failure_rules()},
        "podReplacementPolicy": "Failed",  # never two pods of one index on one output; demanded with a podFailurePolicy anyway
        "template": marked(template, marks),
    }
    if pods > 1:
        spec |= group.indexed(pods)
    if attempt.deadline is not None:
        spec["activeDeadlineSeconds"] = attempt.deadline
    manifest = child(job, "batch/v1", "Job", {"spec": spec}, name=name)
    manifest["metadata"]["labels"] = marks
    if queue := job.spec.get("queueName"):
        spec["suspend"] = True  # until the queue admits it, which alone writes this field from now on
        manifest["metadata"]["labels"] = {**marks, names.QUEUE_LABEL: queue}
    manifest["metadata"]["annotations"] = {
        names.ANNOTATION_MEMORY_PLAN: str(attempt.memory_plan),
        names.ANNOTATION_FAILURES_BEFORE: str(attempt.failures_before),
    }
    return manifest


def marked(template: Manifest, marks: Mapping[str, str]) -> Manifest:
    """With the labels that the operator finds its pods by, over those of podTemplate."""
    metadata = template.get("metadata") or {}
    return template | {"metadata": metadata | {"labels": {**(metadata.get("labels") or {}), **marks}}}


def backoff_limit(job: CompressionJob, failures_before: int) -> int:
    """What is left of retry.limit for a Job that comes after others."""
    return max(0, job.retry_limit - failures_before)


def pod_failure_rules(smaller: bool = True) -> list[Manifest]:
    """First hit wins, so the order is the policy: outside causes, a commit on SIGTERM and another pod's end are free, final codes end the
    Job, running out of memory ends this attempt (where a `smaller` one can follow), all else counts against backoffLimit."""

    def exit_codes(action: str, codes: tuple[int, ...]) -> Manifest:
        on = {"containerName": names.WORKER_CONTAINER, "operator": "In", "values": sorted(codes)}
        return {"action": action, "onExitCodes": on}

    rules = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        exit_codes("Ignore", (int(ExitCode.TERMINATED), int(ExitCode.PEER_LOST))),
        exit_codes("FailJob", tuple(int(code) for code in names.FINAL_EXIT_CODES)),
        exit_codes("FailJob", OUT_OF_MEMORY_CODES),
    ]
    return rules if smaller else rules[:-1]


def child(job: CompressionJob, api_version: str, kind: str, body: Manifest, name: str = "") -> Manifest:
    metadata = {
        "name": name or stem(job),
        "namespace": job.namespace,
        "labels": labels(job),
        "ownerReferences": [owner_reference(job)],
    }
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **body}
