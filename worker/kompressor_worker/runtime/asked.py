"""What `evaluation.runtime` asks for, judged from headers: whether it can be measured, and what that takes. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from kompressor_api.runtime import RuntimeSpec
from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker.architectures import text_config
from kompressor_worker.assignment import Assignment
from kompressor_worker.errors import UserError
from kompressor_worker.layout import ModelLayout
from kompressor_worker.runtime import ENGINES, Engine, engine_of
from kompressor_worker.target.serving import caches

BLOCK = 256
"""Tokens that an engine's cache is taken to come in: no kernel has larger blocks."""
LEAST_CACHE = 64 << 20


def runtime_of(spec: CompressionJobSpec) -> RuntimeSpec | None:
    return spec.evaluation.runtime if spec.evaluation is not None else None


def price(spec: CompressionJobSpec) -> float | None:
    """Of an hour: of this hardware, or of the target's where only that is given."""
    runtime = runtime_of(spec)
    if runtime is None or runtime.price_per_hour is not None:
        return runtime.price_per_hour if runtime else None
    return spec.target.price_per_hour if spec.target is not None else None


def refuse_unservable(spec: CompressionJobSpec, assigned: Assignment) -> None:
    """Raises UserError for what no engine can be asked of this model."""
    runtime = runtime_of(spec)
    if runtime is None:
        return
    serves = ENGINES[runtime.engine].format
    if serves != spec.output.format:
        raise UserError(
            f"evaluation.runtime.engine: {runtime.engine} serves {serves}, and output.format is {spec.output.format}; choose "
            f"{engine_of(spec.output.format).name}, or output.format: {serves}"
        )
    if any(linear.bitmask is not None for linear in assigned.layout.linears()):
        raise UserError("evaluation.runtime: no engine loads output.sparseStorage: bitmask; store it dense, or leave one of the two out")
    longest = text_config(assigned.source.config).get("max_position_embeddings")
    if isinstance(longest, int) and runtime.tokens > longest:
        raise UserError(
            f"evaluation.runtime: prompt {runtime.prompt} and generate {runtime.generate} are {runtime.tokens} tokens, this model's "
            f"max_position_embeddings are {longest}; ask for fewer"
        )


def unmeasured(spec: CompressionJobSpec, report: Mapping[str, Any]) -> bool:
    """Whether a published result's report lacks what this job asks for."""
    runtime, found = runtime_of(spec), report.get("runtime") or {}
    if runtime is None:
        return False
    same = all(found.get(name) == getattr(runtime, name) for name in ("prompt", "generate", "batch"))
    return "after" not in found or not same or str(found.get("engine", "")).partition(" ")[0] != runtime.engine


def cache_bytes(layout: ModelLayout, runtime: RuntimeSpec) -> int:
    """Keys and values of all requests: their tokens in whole blocks, and two more; windows save nothing at lengths like these."""
    width = sum(cache.width for cache in caches(layout))
    return max(LEAST_CACHE, width * max(runtime.batch) * BLOCK * (ceil(runtime.tokens / BLOCK) + 2))


def needs(engine: Engine, weights: int, cache: int) -> int:
    """Bytes of memory that serving takes."""
    return round(engine.loading * weights) + cache + engine.beside


def host_bytes(spec: CompressionJobSpec) -> int:
    """Of the host's memory that the engine takes beside a GPU; 0 where nothing is served."""
    runtime = runtime_of(spec)
    return ENGINES[runtime.engine].beside if runtime is not None else 0


def engine_bytes(spec: CompressionJobSpec, original: ModelLayout, assigned: Assignment) -> int:
    """What the larger of the two models takes, since one can go after the other; 0 where nothing is served."""
    runtime = runtime_of(spec)
    if runtime is None:
        return 0
    decoded = sum(t.nbytes for stage in original.stages() for t in stage.tensors)  # as a GGUF file has it
    before = decoded if spec.output.format == "gguf" else original.source_bytes
    both = (before, original), (assigned.plan.tensor_bytes, assigned.layout)
    return max(needs(ENGINES[runtime.engine], size, cache_bytes(layout, runtime)) for size, layout in both)
