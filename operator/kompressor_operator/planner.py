"""The preflight's Job: `kompressor plan` over the same job, from headers alone, in a small pod without a GPU. Pure."""

from __future__ import annotations

from kompressor_api import names
from kompressor_api.names import Step
from kompressor_operator.manifests import backoff_limit, child, labels, marked, pod_failure_rules, service_account_name, stem
from kompressor_operator.observed import CompressionJob, Manifest
from kompressor_operator.pod_template import merge, overlay_of
from kompressor_operator.settings import Settings
from kompressor_operator.worker_pod import JOB_PATH, Program, own, template, worker_image

COMMAND = ("kompressor", "plan", JOB_PATH, "--in-cluster")
MEMORY_LIMIT = "1Gi"
RESOURCES: Manifest = {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": MEMORY_LIMIT}}
SHORTEST_TTL = 3600
"""Seconds that its end can be read for, whatever the job's own TTL: an operator that is away for longer runs it again."""

POD_FIELDS = frozenset(
    {"serviceAccountName", "imagePullSecrets", "hostAliases", "dnsPolicy", "dnsConfig", "securityContext", "tolerations"}
)
CONTAINER_FIELDS = frozenset({"name", "env", "envFrom", "imagePullPolicy", "securityContext"})
"""What of podTemplate holds for a pod without a GPU: identity, network and names. Where the GPUs are, and what they need, does not."""


def preflight_job(job: CompressionJob, settings: Settings) -> Manifest:
    """Retried in place like the worker, without a queue; its TTL is there from the beginning, for its outcome can be had again."""
    marks = {**labels(job), names.LABEL_STEP: str(Step.PREFLIGHT)}
    spec: Manifest = {
        "parallelism": 1,
        "completions": 1,
        "backoffLimit": backoff_limit(job, 0),
        "podFailurePolicy": {"rules": pod_failure_rules(smaller=False)},
        "podReplacementPolicy": "Failed",
        "template": marked(_template(job, settings), marks),
    }
    if (ttl := preflight_ttl(job)) is not None:
        spec["ttlSecondsAfterFinished"] = ttl
    made = child(job, "batch/v1", "Job", {"spec": spec}, name=f"{stem(job)}-preflight")
    made["metadata"]["labels"] = marks
    return made


def preflight_ttl(job: CompressionJob) -> int | None:
    """Seconds that the preflight's Job is kept once it has ended; None for as long as the CompressionJob."""
    return None if job.ttl is None else max(job.ttl, SHORTEST_TTL)


def _template(job: CompressionJob, settings: Settings) -> Manifest:
    image = worker_image(job, settings) if serves(job) else planner_image(job, settings)
    program = Program(COMMAND, image, RESOURCES, writes=False)
    return shared(job, template(job, settings, program, stem(job), service_account_name(job)))


def serves(job: CompressionJob) -> bool:
    """Whether an engine of the worker's image is asked for: only there it can be seen that it is missing."""
    return bool((job.spec.get("evaluation") or {}).get("runtime"))


def planner_image(job: CompressionJob, settings: Settings) -> str:
    """Of the pods that need no GPU: the preflight's and the clean-up's."""
    return settings.planner_image or worker_image(job, settings)


def shared(job: CompressionJob, base: Manifest) -> Manifest:
    """The template of a pod without a GPU, with what of the job's worker holds for it too."""
    if tolerations := (job.spec.get("worker") or {}).get("tolerations"):
        base = base | {"spec": base["spec"] | {"tolerations": tolerations}}
    return own(merge(base, _shared(overlay_of(job.spec))), base)


def _shared(overlay: Manifest) -> Manifest:
    metadata, spec = overlay.get("metadata") or {}, overlay.get("spec") or {}
    marks = {name: value for name, value in (metadata.get("labels") or {}).items() if name != names.QUEUE_LABEL}
    kept = {name: value for name, value in spec.items() if name in POD_FIELDS}
    own_container = [one for one in spec.get("containers") or () if one["name"] == names.WORKER_CONTAINER]
    kept["containers"] = [{name: value for name, value in one.items() if name in CONTAINER_FIELDS} for one in own_container]
    return {"metadata": {**metadata, "labels": marks}, "spec": kept}
