"""The parts of a Pod that a CompressionJob passes on: checked here, so that a misspelt name is refused with the job."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, StringConstraints
from pydantic_core import CoreSchema, core_schema

from kompressor_api.fields import Count, Model, Name, Short
from kompressor_api.names import WORKER_CONTAINER

__all__ = ["PlainDict", "Quantity", "ResourceClaim", "Resources", "Toleration", "accelerators"]

Quantity = (
    Count
    | Annotated[
        str,
        StringConstraints(
            pattern=r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]{1,2})?$",
            max_length=64,
        ),
    ]
)
"""An amount as in a Pod: 8, 500m, 24Gi. Of an exponent, two digits: the API server caps what is larger, exact arithmetic would not end."""


class PlainDict:
    """Marks a `dict[str, Any]` field that is checked as `model` and stays a dict: what goes into a Pod as it is."""

    def __init__(self, model: type[Model]) -> None:
        self.model = model

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(
            lambda value: value.model_dump(by_alias=True, exclude_unset=True),
            handler.generate_schema(self.model),
            serialization=core_schema.plain_serializer_function_ser_schema(lambda value: value),
        )


class ResourceClaim(Model):
    """One entry of `resources.claims`."""

    name: Name = Field(description="Name of an entry in the pod's resourceClaims.")
    request: Short | None = Field(default=None, description="Name of one request in that claim. Default: all of it.")


class Resources(Model):
    """Compute resources, as in a Pod's container."""

    requests: dict[Short, Quantity] = Field(
        default_factory=dict,
        max_length=32,
        description="What the pod is promised, such as cpu: 4, memory: 24Gi. Default: the limits.",
    )
    limits: dict[Short, Quantity] = Field(
        default_factory=dict,
        max_length=32,
        description="What the pod may use at most, such as memory: 24Gi, nvidia.com/gpu: 1.",
    )
    claims: list[ResourceClaim] = Field(default_factory=list, max_length=16, description="Dynamic resource claims that the container uses.")


class Toleration(Model):
    """A taint that the pod does not mind, as in a Pod."""

    key: Short | None = Field(default=None, description="Key of the taint. Default: every key, with operator Exists.")
    operator: Literal["Exists", "Equal", "Lt", "Gt"] | None = Field(
        default=None, description="How the taint's value is compared: Exists, Equal, Lt or Gt. Default: Equal."
    )
    value: Short | None = Field(default=None, description="Value that the taint is compared with.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="NoSchedule, PreferNoSchedule or NoExecute. Default: all of them."
    )
    toleration_seconds: Count | None = Field(default=None, description="Seconds that a NoExecute taint is tolerated. Default: for ever.")


_ACCELERATOR = re.compile(r"(^|[/.])gpu$|/mig-|(^|/)gpu\.")
"""nvidia.com/gpu, nvidia.com/gpu.shared, nvidia.com/mig-1g.10gb, amd.com/gpu, gpu.intel.com/i915."""


def accelerators(worker: Mapping[str, Any]) -> int:
    """How many GPUs (or slices of one) `spec.worker`, as it is on the wire, asks for: by resources, or by podTemplate, which wins."""
    limits = dict((worker.get("resources") or {}).get("limits") or {})
    containers = ((worker.get("podTemplate") or {}).get("spec") or {}).get("containers")
    for container in containers if isinstance(containers, list) else ():
        if isinstance(container, dict) and container.get("name") == WORKER_CONTAINER:
            limits |= (container.get("resources") or {}).get("limits") or {}
    return sum(int(amount) for name, amount in limits.items() if _ACCELERATOR.search(name) and str(amount).isdigit())
