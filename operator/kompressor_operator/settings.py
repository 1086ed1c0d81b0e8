"""What can be set from outside: a frozen dataclass, read once from the environment."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from kompressor_api.pod import Quantity, Resources

T = TypeVar("T")

PREFIX = "KOMPRESSOR_"


class SettingError(ValueError):
    """An environment variable that cannot be used; the message names it, its value and the remedy."""


@dataclass(frozen=True)
class Settings:
    """Each field is the environment variable KOMPRESSOR_<FIELD>; the docstring under it gives unit, default and why."""

    worker_image: str
    """Image of the worker for jobs that name none. Required: there is no default that would be right everywhere."""

    worker_image_pull_policy: str = ""
    """imagePullPolicy of the worker's container: Always, IfNotPresent or Never. Default: what Kubernetes derives from the tag."""

    worker_image_pull_secrets: tuple[str, ...] = ()
    """Names of pull secrets (comma-separated) that worker pods refer to; they must exist in each job's namespace."""

    worker_env: Mapping[str, str] = field(default_factory=dict)
    """JSON object of environment variables for every worker, such as a proxy or a hub mirror. The operator's own names win."""

    worker_resources: Mapping[str, Any] = field(default_factory=dict)
    """JSON object: resources of the worker's container that neither a job nor its preflight's plan names. Default: none."""

    worker_grace_seconds: int = 60
    """Seconds between SIGTERM and SIGKILL. Default 60: committing the journal to a slow object store takes that long at worst."""

    worker_scratch_size: str = ""
    """sizeLimit of the worker's scratch volume, such as 20Gi. Default: no limit but the node's."""

    worker_shared_memory: str = ""
    """sizeLimit of the worker's /dev/shm, such as 8Gi. Default: none but the container's memory limit."""

    worker_gpu_resource: str = ""
    """Resource that one GPU is asked for as, such as nvidia.com/gpu, by jobs whose activations flow. Default: none, on the CPU."""

    planner_image: str = ""
    """Image of the preflight and of the clean-up. Default: the worker's."""

    namespaces: tuple[str, ...] = ()
    """Namespaces to serve (comma-separated). Default: all of them, which needs a ClusterRole."""

    lease_namespace: str = ""
    """Namespace of the Lease that replicas agree by who leads. Default: no Lease, for one replica."""

    lease_name: str = "kompressor-operator"
    """Name of that Lease."""

    concurrency: int = 16
    """Reconciles at once. Default 16: enough to keep an API server busy, few enough not to flood it."""

    relist_seconds: float = 600.0
    """Seconds between two full lists, which repair whatever a watch has missed. Default 600."""

    watch_seconds: int = 240
    """Seconds until the server ends a watch, which is then opened again; a stream cannot stay dead for longer. Default 240."""

    request_seconds: float = 15.0
    """Timeout of one API request. Default 15: the API server itself gives up on most after ten."""

    backoff_initial_seconds: float = 0.1
    """Delay before a failed reconcile is tried again; doubles each time. Default 0.1."""

    backoff_maximum_seconds: float = 60.0
    """Longest delay between two tries. Default 60."""

    health_host: str = "0.0.0.0"
    """Address of the probes. Default: all, since the kubelet calls from outside the pod."""

    health_port: int = 8080
    """Port of /healthz, /readyz and /metrics. Default 8080; 0 picks a free one."""

    stale_seconds: float = 120.0
    """/healthz fails when a watch has not delivered, for this long, what a list has shown; or the relist task is this late. Default 120."""

    shutdown_seconds: float = 10.0
    """Seconds that reconciles under way get to finish after SIGTERM. Default 10."""

    log_level: str = "INFO"
    """DEBUG, INFO, WARNING or ERROR. Default INFO."""

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read and check all of them. Raises SettingError for the first that cannot be used."""
        given = {f.name: environ[PREFIX + f.name.upper()] for f in fields(cls) if environ.get(PREFIX + f.name.upper())}
        if "worker_image" not in given:
            raise SettingError(f"{PREFIX}WORKER_IMAGE is not set: name the worker's image, as the chart does with worker.image")
        return cls(**{name: _parse(name, text) for name, text in given.items()})


def _parse(name: str, text: str) -> Any:
    for suffixes, read in _READERS.items():
        if name.endswith(suffixes):
            return read(name, text)
    return text


def _number(convert: Callable[[str], T], minimum: float) -> Callable[[str, str], T]:
    def read(name: str, text: str) -> T:
        try:
            value = convert(text)
            if float(text) >= minimum:
                return value
        except ValueError:
            pass
        raise SettingError(f"{PREFIX}{name.upper()}={text!r} is not usable: give a number of at least {minimum:g}")

    return read


def _names(name: str, text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _mapping(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise SettingError(f"{PREFIX}{name.upper()}={text!r} is not JSON ({error}): give an object") from error
    if not isinstance(value, dict):
        raise SettingError(f'{PREFIX}{name.upper()}={text!r} is not a JSON object such as {{"key": "value"}}')
    return value


def _environment(name: str, text: str) -> dict[str, str]:
    value = _mapping(name, text)
    if wrong := sorted(key for key, content in value.items() if not isinstance(content, str)):
        raise SettingError(f"{PREFIX}{name.upper()}={text!r}: the value of {wrong[0]} is not a string; put it into quotes")
    return value


def _resources(name: str, text: str) -> dict[str, Any]:
    """Checked here: later it would be the spec of every job that is called invalid."""
    try:
        return Resources.model_validate(_mapping(name, text)).model_dump(by_alias=True, exclude_unset=True)
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"])
        remedy = 'give resources as in a container, such as {"limits": {"memory": "24Gi"}}'
        raise SettingError(f"{PREFIX}{name.upper()}={text!r}: {place} is not usable; {remedy}") from error


def _quantity(name: str, text: str) -> str:
    try:
        TypeAdapter(Quantity).validate_python(text)
    except ValidationError as error:
        raise SettingError(f"{PREFIX}{name.upper()}={text!r} is not an amount: give one such as 20Gi") from error
    return text


def _pull_policy(name: str, text: str) -> str:
    if text in ("Always", "IfNotPresent", "Never"):
        return text
    raise SettingError(f"{PREFIX}{name.upper()}={text!r} is no pull policy: choose Always, IfNotPresent or Never")


def _level(name: str, text: str) -> str:
    if text.upper() in ("DEBUG", "INFO", "WARNING", "ERROR"):
        return text.upper()
    raise SettingError(f"{PREFIX}{name.upper()}={text!r} is no log level: choose DEBUG, INFO, WARNING or ERROR")


_READERS: dict[tuple[str, ...], Callable[[str, str], Any]] = {
    ("worker_image_pull_secrets", "namespaces"): _names,
    ("worker_env",): _environment,
    ("worker_resources",): _resources,
    ("worker_scratch_size", "worker_shared_memory"): _quantity,
    ("worker_image_pull_policy",): _pull_policy,
    ("log_level",): _level,
    ("worker_grace_seconds", "watch_seconds", "concurrency"): _number(int, 1),
    ("health_port",): _number(int, 0),
    ("_seconds",): _number(float, 0.01),
}
