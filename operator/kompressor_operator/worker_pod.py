"""The worker's pod: command, environment, credentials, volumes, security context. Pure.

It passes the `restricted` Pod Security Standard: numeric non-root user, no capabilities, read-only root; what must be written
has an emptyDir. Credentials reach the container from Secrets by reference; the operator never reads one.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from kompressor_api import names
from kompressor_api.names import Role
from kompressor_operator.observed import CompressionJob, Manifest
from kompressor_operator.settings import Settings

USER = 65532
COMMAND = ["kompressor", "run", f"{names.JOB_DIRECTORY}/{names.JOB_FILE}", "--in-cluster"]
PROBED_KEY = {"s3": "AWS_ACCESS_KEY_ID", "hf": "HF_TOKEN"}
"""The key that a Secret must hold for a scheme; named one by one, so that a missing one shows as CreateContainerConfigError."""
DATASETS = {Role.DATA: "calibration", Role.EVALUATION: "evaluation", Role.DRIFT: "drift"}
"""Sections of a spec that name a dataset."""

_JOB, _SCRATCH, _TMP = "job", "scratch", "tmp"


def pod_template(
    job: CompressionJob, settings: Settings, config_map: str, service_account: str, memory_plan: int, image: str = ""
) -> Manifest:
    """The Job's template without its labels; `image` is that of the attempt before, if there was one."""
    worker = job.spec.get("worker") or {}
    spec: Manifest = {
        "restartPolicy": "Never",
        "serviceAccountName": service_account,
        "automountServiceAccountToken": True,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": settings.worker_grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,  # a claim is writable for the worker
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(job, settings, memory_plan, image)],
        "volumes": _volumes(job, settings, config_map),
    }
    for field in ("nodeSelector", "tolerations"):
        if worker.get(field):
            spec[field] = worker[field]
    if settings.worker_image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.worker_image_pull_secrets]
    return {"spec": spec}


def _container(job: CompressionJob, settings: Settings, memory_plan: int, image: str) -> Manifest:
    worker = job.spec.get("worker") or {}
    container: Manifest = {
        "name": names.WORKER_CONTAINER,
        "image": image or worker.get("image") or settings.worker_image,
        "command": COMMAND,
        "env": _environment(job, settings, memory_plan),
        "volumeMounts": _mounts(job),
        "terminationMessagePath": names.TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    if settings.worker_image_pull_policy:
        container["imagePullPolicy"] = settings.worker_image_pull_policy
    if resources := worker.get("resources") or dict(settings.worker_resources):
        container["resources"] = resources
    if sources := _env_from(job):
        container["envFrom"] = sources
    return container


def _environment(job: CompressionJob, settings: Settings, memory_plan: int) -> list[Manifest]:
    caches = {
        "HOME": "",
        "XDG_CACHE_HOME": "/cache",
        "HF_HOME": "/huggingface",
        "TORCHINDUCTOR_CACHE_DIR": "/inductor",
        "TRITON_CACHE_DIR": "/triton",
    }
    values = dict(settings.worker_env) | {name: names.SCRATCH_DIRECTORY + below for name, below in caches.items()}
    if memory_plan:
        values[names.ENV_MEMORY_PLAN] = str(memory_plan)
    fields = {
        names.ENV_POD_UID: "metadata.uid",
        names.ENV_POD_NAME: "metadata.name",
        names.ENV_POD_NAMESPACE: "metadata.namespace",
    }
    entries: dict[str, Manifest] = {name: {"value": value} for name, value in values.items()}
    entries |= {name: {"valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()}
    for role, location in locations(job):
        secret, key = location.get("credentialsSecret"), PROBED_KEY.get(_scheme(location))
        if secret and key:
            entries[role.env_prefix + key] = {"valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
    return [{"name": name, **entry} for name, entry in entries.items()]


def _env_from(job: CompressionJob) -> list[Manifest]:
    """All keys of each location's Secret under the location's prefix: they may differ in account."""
    return [
        {"prefix": role.env_prefix, "secretRef": {"name": secret}}
        for role, location in locations(job)
        if (secret := location.get("credentialsSecret"))
    ]


def _volumes(job: CompressionJob, settings: Settings, config_map: str) -> list[Manifest]:
    limit = {"sizeLimit": settings.worker_scratch_size} if settings.worker_scratch_size else {}
    volumes: list[Manifest] = [
        {"name": _JOB, "configMap": {"name": config_map}},
        {"name": _SCRATCH, "emptyDir": limit},
        {"name": _TMP, "emptyDir": {}},
    ]
    for role, bundle in _bundles(job):
        key = bundle.get("key") or "ca.crt"
        source = {"name": bundle["configMap"], "items": [{"key": key, "path": key}]}
        volumes.append({"name": f"ca-{role}", "configMap": source})
    for index, claim in enumerate(claims(job)):
        volumes.append({"name": f"claim-{index}", "persistentVolumeClaim": {"claimName": claim}})
    return volumes


def _mounts(job: CompressionJob) -> list[Manifest]:
    mounts: list[Manifest] = [
        {"name": _JOB, "mountPath": names.JOB_DIRECTORY, "readOnly": True},
        {"name": _SCRATCH, "mountPath": names.SCRATCH_DIRECTORY},
        {"name": _TMP, "mountPath": "/tmp"},
    ]
    for role, _ in _bundles(job):
        mounts.append({"name": f"ca-{role}", "mountPath": f"{names.CA_DIRECTORY}/{role}", "readOnly": True})
    for index, (claim, writable) in enumerate(claims(job).items()):
        mount: Manifest = {"name": f"claim-{index}", "mountPath": f"{names.CLAIM_DIRECTORY}/{claim}"}
        mounts.append(mount if writable else {**mount, "readOnly": True})
    return mounts


def locations(job: CompressionJob) -> list[tuple[Role, Manifest]]:
    """Every place that the worker reads or writes, with what it is for."""
    found = [(Role.SOURCE, job.spec["model"]["source"]), (Role.OUTPUT, job.spec["output"])]
    return found + [(role, job.spec[section]["dataset"]) for role, section in DATASETS.items() if job.spec.get(section)]


def claims(job: CompressionJob) -> dict[str, bool]:
    """Claim -> written to. A claim that is source and output is mounted once, writable."""
    found: dict[str, bool] = {}
    for role, location in locations(job):
        if _scheme(location) == "pvc":
            claim = urlsplit(location["uri"]).netloc
            found[claim] = found.get(claim, False) or role is Role.OUTPUT
    return found


def _bundles(job: CompressionJob) -> list[tuple[Role, Manifest]]:
    return [(role, bundle) for role, location in locations(job) if (bundle := location.get("caBundle"))]


def _scheme(location: Manifest) -> str:
    return str(location["uri"]).partition("://")[0]
