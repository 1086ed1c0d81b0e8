"""`spec.worker`: the pod that does the work, and how many of them train together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import Field, StringConstraints

from kompressor_api.fields import Count, Flag, Model, Name, Short
from kompressor_api.names import TRAINING_PASS
from kompressor_api.pod import PlainDict, Resources, Toleration

__all__ = ["WorkerSpec", "refuse_idle_processes", "trains"]

MAX_PODS = 256
MAX_PROCESSES = 64


class WorkerSpec(Model):
    """The pod that does the work."""

    image: Annotated[str, StringConstraints(min_length=1, max_length=512)] | None = Field(
        default=None, description="Worker image. Default: the one the operator was installed with."
    )
    resources: Annotated[dict[str, Any], PlainDict(Resources)] = Field(
        default_factory=dict, description="Requests and limits of the worker's container, as in a Pod."
    )
    node_selector: dict[Short, Short] = Field(default_factory=dict, max_length=32, description="Labels that the worker's node must have.")
    tolerations: list[Annotated[dict[str, Any], PlainDict(Toleration)]] = Field(
        default_factory=list, max_length=32, description="Taints that the worker's pod tolerates, as in a Pod."
    )
    service_account_name: Name | None = Field(
        default=None,
        description="Existing service account for the pod (workload identity). Default: one made for this job alone.",
    )
    allow_device_change: Flag | None = Field(
        default=None,
        description=(
            "Whether a calibrated job that was cut off may go on with another kind of GPU or processor, or number of threads: as good, not "
            "the same to the byte; the report says what was made on what. Default: false."
        ),
    )
    parallelism: Count | None = Field(
        default=None,
        ge=1,
        le=MAX_PODS,
        description=(
            "Pods that train together, with the pass distil, each with these resources. The first does all else, too; one that is lost "
            "starts the group again from its last checkpoint. Default: 1."
        ),
    )
    processes_per_pod: Count | None = Field(
        default=None,
        ge=1,
        le=MAX_PROCESSES,
        description="Training processes in each pod, with the pass distil. Default: one for each GPU in the container's limits, else 1.",
    )
    pod_template: dict[str, Any] | None = Field(
        default=None,
        description=(
            "Part of a PodTemplateSpec, laid over the worker's pod by Kubernetes' merge keys: affinity, volumes, env, labels and more. "
            "The container is called worker."
        ),
    )


def trains(passes: Iterable[Any]) -> bool:
    """Is there a pass that many processes can share? By its name alone: its parameters are the worker's to judge."""
    return any(isinstance(entry, dict) and TRAINING_PASS in entry for entry in passes)


def refuse_idle_processes(worker: WorkerSpec, passes: Iterable[Any]) -> None:
    """Raises ValueError where more than one process is asked for and none of these passes would share the work."""
    given = {"parallelism": worker.parallelism, "processesPerPod": worker.processes_per_pod}
    idle = next((f"{name} {count}" for name, count in given.items() if count is not None and count > 1), None)
    if idle and not trains(passes):
        raise ValueError(
            f"worker.{idle} would leave all processes but one idle: only the pass {TRAINING_PASS} trains in many; leave it out"
        )
