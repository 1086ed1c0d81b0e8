"""What the worker's container asks for: the operator's settings, over them what the plan estimates, over both what the job says. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kompressor_api.failures import ADVICE
from kompressor_api.names import WORKER_CONTAINER, Reason
from kompressor_api.pod import accelerators
from kompressor_api.quantity import parse, readable, rounded_up
from kompressor_api.worker import trains
from kompressor_operator.observed import Manifest
from kompressor_operator.pod_template import overlay_of
from kompressor_operator.settings import Settings

__all__ = ["below_plan", "worker_resources"]

HEADROOM = 1.2
"""Of the estimate, what is asked for: measured peaks were up to 3 % above it."""
STEP_BYTES = 256 << 20
FLOWING = ("calibration", "evaluation")
"""With one of these sections activations flow through the model, as they do where it is trained: which is what a GPU is for."""


def worker_resources(spec: Manifest, settings: Settings, plan: Mapping[str, Any]) -> Manifest:
    """`resources` of the container. By resource, whoever names it says both its request and its limit: halves of two would contradict."""
    merged: Manifest = {"requests": {}, "limits": {}}
    for layer in (settings.worker_resources, _planned(spec, settings, plan), *_own(spec)):
        named = {*(layer.get("requests") or {}), *(layer.get("limits") or {})}
        for part in ("requests", "limits"):
            kept = {name: amount for name, amount in merged[part].items() if name not in named}
            merged[part] = kept | (layer.get(part) or {})
        if layer.get("claims"):
            merged["claims"] = layer["claims"]
    return {part: asked for part, asked in merged.items() if asked}


def below_plan(spec: Manifest, plan: Mapping[str, Any]) -> str:
    """What to say if the job's own memory is less than the estimate; empty if it is not, or names none."""
    memory, estimate = None, int(plan.get("hostMemoryBytes") or 0)
    for layer in _own(spec):
        given = (layer.get("limits") or {}).get("memory", (layer.get("requests") or {}).get("memory"))
        memory = memory if given is None else given
    try:
        if memory is None or parse(memory) >= estimate:
            return ""
    except ValueError:  # of podTemplate, which the API server alone judges
        return ""
    advice = ADVICE[Reason.RESOURCES_BELOW_PLAN]
    return f"the job gives its worker {memory} of memory, and the plan estimates {readable(estimate)}: {advice}"


def _own(spec: Manifest) -> Iterable[Mapping[str, Any]]:
    """What the job itself says, the last word last."""
    yield (spec.get("worker") or {}).get("resources") or {}
    for container in (overlay_of(spec).get("spec") or {}).get("containers") or ():
        if container.get("name") == WORKER_CONTAINER:
            yield container.get("resources") or {}


def _planned(spec: Manifest, settings: Settings, plan: Mapping[str, Any]) -> Manifest:
    asked: Manifest = {"requests": {}, "limits": {}}
    if estimate := int(plan.get("hostMemoryBytes") or 0):
        memory = rounded_up(HEADROOM * estimate, STEP_BYTES)
        asked = {"requests": {"memory": memory}, "limits": {"memory": memory}}
    flows = any(spec.get(section) for section in FLOWING) or trains(spec.get("passes") or ())
    if settings.worker_gpu_resource and flows and not accelerators(spec.get("worker") or {}):
        asked["limits"][settings.worker_gpu_resource] = 1
    return asked
