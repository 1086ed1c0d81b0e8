"""The worker's pod: command, environment, credentials, volumes. Pure.

What must be written has an emptyDir. Credentials reach the container from Secrets by reference; the operator never reads one.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from kompressor_api import names
from kompressor_api.names import Role
from kompressor_api.training import training_locations
from kompressor_operator import group
from kompressor_operator.observed import CompressionJob, Manifest
from kompressor_operator.pod_shape import container, pod_spec
from kompressor_operator.pod_template import merge, overlay_of
from kompressor_operator.resources import worker_resources
from kompressor_operator.settings import Settings

JOB_PATH = f"{names.JOB_DIRECTORY}/{names.JOB_FILE}"
COMMAND = ("kompressor", "run", JOB_PATH, "--in-cluster")
PROBED_KEY = {"s3": "AWS_ACCESS_KEY_ID", "hf": "HF_TOKEN"}
"""The key that a Secret must hold for a scheme; named one by one, so that a missing one shows as CreateContainerConfigError."""
DATASETS = {Role.DATA: "calibration", Role.EVALUATION: "evaluation", Role.DRIFT: "drift"}
"""Sections of a spec that name a dataset."""

PLACES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", names.ENV_CLAIM_DIRECTORY, names.ENV_CA_DIRECTORY)
"""What `s3://` without an endpoint, `pvc://` and a CA bundle lead to: for the administrator to say, or a job's output would not be where
its spec says, and admission policies would look at something else."""
OWN_ENV = frozenset(
    {names.ENV_POD_UID, names.ENV_POD_NAME, names.ENV_POD_NAMESPACE, names.ENV_MEMORY_PLAN, names.ENV_OUTPUT, names.ENV_JOB_UID, *PLACES}
    | {names.ENV_PODS, names.ENV_LEADER, names.ENV_PORT, names.ENV_PROCESSES_PER_POD, names.ENV_POD_INDEX}
)
"""Variables that are the operator's alone, as is the key of a location's Secret."""

_JOB, _SCRATCH, _TMP, _SHARED = "job", "scratch", "tmp", "shared-memory"
_THEIRS = frozenset({_SCRATCH, _TMP, _SHARED})
"""Volumes that podTemplate may replace: nothing of a job lies there for good."""


@dataclass(frozen=True)
class Program:
    """What a pod runs, and what only this one needs."""

    command: tuple[str, ...]
    image: str
    resources: Manifest
    token: bool = False
    """Whether it talks to the API server."""
    shared_memory: bool = False
    writes: bool = True
    """To the claims that it has."""
    memory_plan: int = 0
    group: Mapping[str, str] = field(default_factory=dict)
    """What it is told of its group."""
    subdomain: str = ""
    """The Service that gives the group's pods their names."""


def worker_template(
    job: CompressionJob,
    settings: Settings,
    config_map: str,
    service_account: str,
    *,
    job_name: str,
    subdomain: str = "",
    memory_plan: int = 0,
    image: str = "",
    plan: Mapping[str, Any] | None = None,
) -> Manifest:
    """The Job's template without the operator's labels; `image` is that of the attempt before, if there was one."""
    worker, resources = job.spec.get("worker") or {}, worker_resources(job.spec, settings, plan or {})
    program = Program(
        command=COMMAND,
        image=image or worker_image(job, settings),
        resources=resources,
        token=True,
        shared_memory=True,
        memory_plan=memory_plan,
        group=group.environment(job.spec, job_name, subdomain, resources),
        subdomain=subdomain,
    )
    base = template(job, settings, program, config_map, service_account)
    for name in ("nodeSelector", "tolerations"):
        if worker.get(name):
            base["spec"][name] = worker[name]
    made = own(merge(base, overlay_of(job.spec)), base)
    if image:
        container_of(made)["image"] = image
    return made


def worker_image(job: CompressionJob, settings: Settings) -> str:
    """Of the first attempt."""
    containers = (overlay_of(job.spec).get("spec") or {}).get("containers") or ()
    theirs = next((one.get("image") for one in containers if one.get("name") == names.WORKER_CONTAINER), None)
    return str(theirs or (job.spec.get("worker") or {}).get("image") or settings.worker_image)


def template(job: CompressionJob, settings: Settings, program: Program, config_map: str, service_account: str) -> Manifest:
    """A pod that reads this job: the operator's own shape, which podTemplate is laid over."""
    volumes = _volumes(job, settings, program, config_map)
    spec = pod_spec(settings, service_account, _container(job, settings, program), volumes, token=program.token)
    if program.subdomain:
        spec["subdomain"] = program.subdomain
    return {"spec": spec | {"terminationGracePeriodSeconds": settings.worker_grace_seconds}}


def own(made: Manifest, base: Manifest) -> Manifest:
    """What no podTemplate changes: what is run, with which job, credentials and identity, and where its last words go."""
    spec = {name: value for name, value in made["spec"].items() if name != "serviceAccount"}
    fixed = ("restartPolicy", "serviceAccountName", "automountServiceAccountToken", "subdomain")
    spec |= {name: base["spec"][name] for name in fixed if name in base["spec"]}
    volumes = [one for one in base["spec"]["volumes"] if one["name"] not in _THEIRS]
    spec["volumes"] = [*volumes, *_without(spec["volumes"], volumes)]
    kept = container_of(base)
    container = {name: value for name, value in container_of(made).items() if name != "args"}
    container |= {name: kept[name] for name in ("command", "terminationMessagePath", "terminationMessagePolicy")}
    # first, so that a user's variables can refer to them
    env = [entry for entry in kept["env"] if entry["name"] in OWN_ENV or "secretKeyRef" in entry.get("valueFrom", {})]
    container["env"] = [*env, *(entry for entry in _without(container["env"], env) if entry["name"] not in OWN_ENV)]
    mounts = [one for one in kept["volumeMounts"] if one["name"] not in _THEIRS]
    container["volumeMounts"] = [*mounts, *(one for one in container["volumeMounts"] if not _hides(one, mounts))]
    if lost := [source for source in kept.get("envFrom", ()) if source not in container.get("envFrom", ())]:
        container["envFrom"] = [*container.get("envFrom", ()), *lost]
    others = [one for one in spec["containers"] if one["name"] != names.WORKER_CONTAINER]
    return made | {"spec": spec | {"containers": [container, *others]}}


def _without(entries: list[Manifest], kept: list[Manifest]) -> list[Manifest]:
    known = {one["name"] for one in kept}
    return [one for one in entries if one["name"] not in known]


def _hides(mount: Manifest, kept: list[Manifest]) -> bool:
    """Would it lie over one of these, or over a part of one?"""
    place = posixpath.normpath(f"/{str(mount['mountPath']).lstrip('/')}")
    return any(f"{place}/".startswith(f"{one['mountPath']}/") for one in kept)


def places(settings: Settings) -> dict[str, str]:
    """Said even where they are empty: an explicit variable wins over one that an envFrom brings."""
    return {name: settings.worker_env.get(name, "") for name in PLACES}


def container_of(made: Manifest) -> Manifest:
    """The worker's own container of a template."""
    found: Manifest = next(one for one in made["spec"]["containers"] if one["name"] == names.WORKER_CONTAINER)
    return found


def _container(job: CompressionJob, settings: Settings, program: Program) -> Manifest:
    env, mounts = _environment(job, settings, program), _mounts(job, program)
    made = container(settings, program.image, program.command, env, mounts, _env_from(job))
    return made | ({"resources": program.resources} if program.resources else {})


def _environment(job: CompressionJob, settings: Settings, program: Program) -> list[Manifest]:
    caches = {
        "HOME": "",
        "XDG_CACHE_HOME": "/cache",
        "HF_HOME": "/huggingface",
        "TORCHINDUCTOR_CACHE_DIR": "/inductor",
        "TRITON_CACHE_DIR": "/triton",
    }
    values = {**settings.worker_env, **places(settings)} | {name: names.SCRATCH_DIRECTORY + below for name, below in caches.items()}
    values |= program.group
    if program.memory_plan:
        values[names.ENV_MEMORY_PLAN] = str(program.memory_plan)
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


def _volumes(job: CompressionJob, settings: Settings, program: Program, config_map: str) -> list[Manifest]:
    limit = {"sizeLimit": settings.worker_scratch_size} if settings.worker_scratch_size else {}
    volumes: list[Manifest] = [
        {"name": _JOB, "configMap": {"name": config_map}},
        {"name": _SCRATCH, "emptyDir": limit},
        {"name": _TMP, "emptyDir": {}},
    ]
    if program.shared_memory:
        size = {"sizeLimit": settings.worker_shared_memory} if settings.worker_shared_memory else {}
        volumes.append({"name": _SHARED, "emptyDir": {"medium": "Memory", **size}})
    for role, bundle in _bundles(job):
        key = bundle.get("key") or "ca.crt"
        source = {"name": bundle["configMap"], "items": [{"key": key, "path": key}]}
        volumes.append({"name": f"ca-{role}", "configMap": source})
    for index, claim in enumerate(claims(job)):
        volumes.append({"name": f"claim-{index}", "persistentVolumeClaim": {"claimName": claim}})
    return volumes


def _mounts(job: CompressionJob, program: Program) -> list[Manifest]:
    mounts: list[Manifest] = [
        {"name": _JOB, "mountPath": names.JOB_DIRECTORY, "readOnly": True},
        {"name": _SCRATCH, "mountPath": names.SCRATCH_DIRECTORY},
        {"name": _TMP, "mountPath": "/tmp"},
    ]
    if program.shared_memory:
        mounts.append({"name": _SHARED, "mountPath": names.SHARED_MEMORY_DIRECTORY})
    for role, _ in _bundles(job):
        mounts.append({"name": f"ca-{role}", "mountPath": f"{names.CA_DIRECTORY}/{role}", "readOnly": True})
    for index, (claim, writable) in enumerate(claims(job).items()):
        mount: Manifest = {"name": f"claim-{index}", "mountPath": f"{names.CLAIM_DIRECTORY}/{claim}"}
        mounts.append(mount if writable and program.writes else {**mount, "readOnly": True})
    return mounts


def locations(job: CompressionJob) -> list[tuple[Role, Manifest]]:
    """Every place that the worker reads or writes, with what it is for."""
    found = [(Role.SOURCE, job.spec["model"]["source"]), (Role.OUTPUT, job.spec["output"])]
    found += [(role, job.spec[section]["dataset"]) for role, section in DATASETS.items() if job.spec.get(section)]
    return found + [(role, dict(place)) for role, place in training_locations(job.spec.get("passes") or ())]


def claims(job: CompressionJob) -> dict[str, bool]:
    """Claim -> written to. A claim that is source and output is mounted once, writable."""
    found: dict[str, bool] = {}
    for role, location in locations(job):
        if _scheme(location) == "pvc":
            claim = urlsplit(location["uri"]).netloc
            found[claim] = found.get(claim, False) or role in (Role.OUTPUT, Role.LOGITS)
    return found


def _bundles(job: CompressionJob) -> list[tuple[Role, Manifest]]:
    return [(role, bundle) for role, location in locations(job) if (bundle := location.get("caBundle"))]


def _scheme(location: Manifest) -> str:
    return str(location["uri"]).partition("://")[0]
