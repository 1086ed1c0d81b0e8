"""What a job would do, from headers alone: sizes, memory, time, and every error that can be known. Imports no torch."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kompressor_api.names import Reason
from kompressor_api.pod import accelerators
from kompressor_api.v1alpha1 import WorkerSpec
from kompressor_worker.distillation import Distillation, open_models
from kompressor_worker.estimate import FlowBytes, FlowOperations, flow_bytes, flow_operations
from kompressor_worker.in_order import spool_bytes
from kompressor_worker.job import Job
from kompressor_worker.journal import refuse_unusable_journal
from kompressor_worker.kv_memory import kv_change, kv_status
from kompressor_worker.layout import ModelLayout
from kompressor_worker.passes.distil import TrainingData
from kompressor_worker.pipeline import Limits
from kompressor_worker.processor import multiplies_bf16
from kompressor_worker.publish import bitmask_result, refuse_without_room
from kompressor_worker.report_sections import duration, size
from kompressor_worker.run import Summary, judge_published
from kompressor_worker.runtime import find_engine
from kompressor_worker.runtime.asked import engine_bytes, host_bytes, refuse_unservable, unmeasured
from kompressor_worker.runtime.checkpoints import scratch_bytes
from kompressor_worker.sample_warnings import size_warnings
from kompressor_worker.samples import FoundData, find_samples, flows
from kompressor_worker.schemes import Scheme
from kompressor_worker.shards import OutputPlan, row_by_row
from kompressor_worker.storage.locations import open_output
from kompressor_worker.structure import structure
from kompressor_worker.target.ladder import Ladder, Rung, published_by, standing
from kompressor_worker.target.planner import Fit
from kompressor_worker.tokenizer import ModelTokenizer
from kompressor_worker.training_estimate import TrainingEstimate, room_beside, training_estimate
from kompressor_worker.trying import fingerprints

IDLE_BYTES = 560 << 20
"""A worker after its imports, torch's CPU build; measured by benchmarks/data_free.py."""
SCRATCH_BYTES = 60 << 20
"""What kernels, the allocator and connections hold beside what is counted; up to 41 MiB were seen."""
BYTES_PER_SECOND = 300e6
"""Source bytes a second that the time estimate assumes: a gigabit and a half to and from object storage, two cores."""
START_SECONDS = 3
"""Until the stream begins: imports, headers, the claim."""
FLOW_IDLE_BYTES = 700 << 20
"""The same worker with transformers' config and rotary classes, and the compiled kernels."""
FLOW_START_SECONDS = 6
"""Until activations begin to flow, beside: transformers' imports, the data."""
CORE_RATE = 30e9
"""Multiply-adds a second of one AVX-512 core in fp32, all that happens between the matrix products included."""
BF16_CORE_RATE = 70e9
"""Of one that multiplies bf16 faster, while a model in bf16 is trained: 60e9 were seen at a hidden size of 512 beside other work, 89e9
with a vocabulary of 32,768 (benchmarks/README.md)."""
GPU_RATE = 10e12
"""The same of a GPU: assumed, not measured."""
GPU_IDLE_BYTES = 2 << 30
"""Of the host's memory, a worker whose torch has opened a GPU: assumed, not measured."""
GPU_CONTEXT_BYTES = 768 << 20
"""Of the GPU's memory, what its driver and libraries hold beside the tensors: assumed, not measured."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the worst moment."""

    host: int
    gpu: int | None = None
    """None where no GPU is asked for."""


@dataclass(frozen=True)
class Plan:
    layout: ModelLayout
    schemes: Mapping[str, Scheme]
    output: OutputPlan
    memory: Memory
    published: Mapping[str, Any] | None = None
    """kompressor.json of the output, where it holds this result already."""
    flow: FlowBytes | None = None
    """Where activations flow: what they take."""
    operations: FlowOperations | None = None
    warnings: tuple[str, ...] = ()
    kv: Mapping[str, Any] = field(default_factory=dict)
    """kv_memory.kv_change(), where a pass makes the cache smaller."""
    target: Fit | None = None
    """Where the passes are chosen for a target: what there was to choose from. The rest is of the plan that is carried out."""
    outlook: Mapping[str, Any] = field(default_factory=dict)
    """By pass: what it says of what only a survey can decide."""
    training: TrainingEstimate | None = None
    scratch: int | None = None
    """Bytes of copies that an engine opens, or before it of experts on their way into a GGUF file; None where there is neither."""

    @property
    def rate(self) -> float:
        """Multiply-adds a second."""
        return CORE_RATE * cores() if self.memory.gpu is None else GPU_RATE

    @property
    def seconds(self) -> int:
        if self.published is not None:
            return 0
        products = self.operations.total / self.rate if self.operations else 0.0
        started = START_SECONDS + (FLOW_START_SECONDS if self.operations else 0)
        streamed = round(self.layout.source_bytes / BYTES_PER_SECOND + products)
        return started + (streamed if self.training is None else 2 * streamed + self.training.seconds)  # the student, and what comes of it

    def as_json(self) -> dict[str, Any]:
        return {
            "family": self.layout.family,
            "units": len(self.layout.units),
            "sourceBytes": self.layout.source_bytes,
            "outputBytes": self.output.tensor_bytes,
            "ratio": round(self.layout.source_bytes / max(1, self.output.tensor_bytes), 3),
            "shards": len(self.output.shards),
            "schemes": dict(Counter(s.name for s in self.schemes.values())),
            **structure(self.layout),
            **({"kvCache": self.kv} if self.kv else {}),
            **({"pruned": dict(pruned)} if (pruned := Counter(str(x.pruned) for x in self.layout.linears() if x.pruned)) else {}),
            **bitmask_result(self.layout),
            "exact": sum(1 for x in self.layout.linears() if x.name not in self.schemes and x.pruned is None),
            "peakMemoryBytes": self.memory.host,
            **({} if self.memory.gpu is None else {"gpuMemoryBytes": self.memory.gpu}),
            "estimatedSeconds": self.seconds,
            **self._flow_as_json(),
            **self.outlook,
            **({"training": self.training.as_json()} if self.training else {}),
            **({} if self.scratch is None else {"scratchBytes": self.scratch}),
            "alreadyCompressed": self.published is not None,
            **({"target": self.target.as_json()} if self.target else {}),
            "warnings": [*self.layout.warnings, *self.warnings],
        }

    def status(self) -> dict[str, Any]:
        """As `status.plan` has it."""
        plan = {
            "sourceBytes": self.layout.source_bytes,
            "outputBytes": self.output.tensor_bytes,
            "ratio": f"{self.layout.source_bytes / max(1, self.output.tensor_bytes):.2f}x",
            "hostMemoryBytes": self.memory.host,
            "gpuMemoryBytes": self.memory.gpu,
            "scratchBytes": self.scratch,
            "seconds": self.seconds,
            "units": len(self.layout.units),
            **dict(zip(("parametersBefore", "parametersAfter"), structure(self.layout).get("parameters", ()), strict=False)),
            **kv_status(self.kv),
            **(self.training.status() if self.training else {}),
            "target": self.target.status() if self.target else None,
            "warnings": [*self.layout.warnings, *self.warnings],
        }
        return {name: value for name, value in plan.items() if value is not None}

    def message(self, uri: str) -> dict[str, Any]:
        """What the preflight's pod leaves in its termination message. `uri`: of the output."""
        if self.published is not None:
            result = Summary(self.published, 0, already=True).result(uri)
            return {"reason": Reason.ALREADY_COMPRESSED, "message": f"{uri} already holds this result", "exitCode": 0, "summary": result}
        status = self.status()
        needs = size(self.memory.host) + ("" if self.memory.gpu is None else f" and {size(self.memory.gpu)} on the GPU")
        chosen = f"{self.target.ladder[0].name}: " if self.target else ""
        writes = f"writes {size(self.output.tensor_bytes)} ({status['ratio']} smaller)"
        says = f"{chosen}{writes}, needs {needs}, takes about {duration(self.seconds)}"
        return {"reason": Reason.VALID, "message": says, "exitCode": 0, "summary": status}

    def _flow_as_json(self) -> dict[str, Any]:
        if self.flow is None or self.operations is None:
            return {}
        return {
            "activationBytes": self.flow.activations,
            "spilledBytes": self.flow.spilled,
            "blockBytes": self.flow.block,
            "stepBytes": self.flow.step,
            "statisticsBytes": self.flow.statistics,
            "headBytes": self.flow.head,
            "multiplyAdds": {k: round(v) for k, v in asdict(self.operations).items()},
            "multiplyAddsPerSecond": round(self.rate),
        }


def make_plan(job: Job, environ: Mapping[str, str], limits: Limits | None = None, stop: threading.Event | None = None) -> Plan:
    """Raises whatever `run` would raise before it reads a weight; Terminated once `stop` is set."""
    stop = stop or threading.Event()
    models = open_models(job.spec, environ, stop)
    output = open_output(job.spec.output, environ, stop)
    ladder = Ladder.of(models.spec, models.layout)
    for rung in ladder.rungs:
        refuse_unservable(rung.spec, rung.assigned)
    serving = find_engine(job.spec, environ) is not None
    data = find_samples(ladder.samples(), ModelTokenizer(models.source), environ, stop)
    prints = fingerprints(ladder, data, models.distillation)
    found = published_by(output, prints)
    number, published = found or (standing(output, prints), None)
    notes: tuple[str, ...] = ()
    if published is not None:
        judge_published(ladder.rungs[number].spec, published, output.uri)
        if unmeasured(ladder.rungs[number].spec, published):  # which takes the worker
            published, notes = (
                None,
                (f"{output.uri} already holds this result: it is measured as it is, and the status alone says how fast",),
            )
    else:
        refuse_unusable_journal(output, prints[number])
        assigned = ladder.rungs[number].assigned
        refuse_without_room(output, assigned.plan, room_beside(models.distillation, assigned))
    plans = [_trained(_planned(rung, models.original.layout, limits or Limits()), rung, models.distillation, data) for rung in ladder.rungs]
    memory = Memory(max(plan.memory.host for plan in plans), max(plan.memory.gpu or 0 for plan in plans) or None)
    copies = scratch_bytes(job.spec, models.original, [rung.assigned.plan for rung in ladder.rungs], output) if serving else 0
    scratch = max(copies, *(spool_bytes(rung.assigned.plan) for rung in ladder.rungs)) or (0 if serving else None)
    warnings = (*notes, *size_warnings(data), *plans[number].warnings)
    return replace(plans[number], memory=memory, published=published, warnings=warnings, target=ladder.fit, scratch=scratch)


def _trained(plan: Plan, rung: Rung, found: Distillation | None, data: Mapping[str, FoundData]) -> Plan:
    """With its training, where there is one."""
    if found is None:
        return plan
    worker, gpus = rung.spec.worker, plan.memory.gpu is not None
    each = processes_per_pod(worker)
    core = BF16_CORE_RATE if plan.layout.dtype == "BF16" and multiplies_bf16() else CORE_RATE
    rate = GPU_RATE if gpus else core * max(1, cores() // each)
    asked = data[TrainingData.SECTION]
    estimate = training_estimate(found, plan.layout, asked.files.bytes, each * (worker.parallelism or 1), rate, gpus)
    if gpus:
        memory = Memory(plan.memory.host, max(plan.memory.gpu or 0, GPU_CONTEXT_BYTES + estimate.memory))
    else:
        memory = Memory(max(plan.memory.host, each * estimate.memory))
    return replace(plan, memory=memory, training=estimate)


def processes_per_pod(worker: WorkerSpec) -> int:
    return worker.processes_per_pod or max(1, accelerators(worker.model_dump(by_alias=True, exclude_none=True)))


def _planned(rung: Rung, original: ModelLayout, limits: Limits) -> Plan:
    spec, assigned = rung.spec, rung.assigned
    layout, passes, schemes, planned = assigned.layout, assigned.passes, assigned.schemes, assigned.plan
    gpus = accelerators(spec.worker.model_dump(by_alias=True, exclude_none=True))
    if not flows(spec, passes):
        unused = "the worker asks for a GPU that it will not use: no pass or evaluation lets activations flow; leave it out"
        return Plan(layout, schemes, planned, Memory(peak_memory(layout, planned, schemes, limits)), warnings=(unused,) if gpus else ())
    engine = engine_bytes(spec, original, assigned)
    flow = flow_bytes(spec, layout, passes, schemes, planned, limits)
    operations = flow_operations(spec, layout, passes, schemes)
    around = SCRATCH_BYTES + ahead_and_behind(layout, planned, limits)
    if gpus:
        host = GPU_IDLE_BYTES + max(around + flow.beside_gpu, host_bytes(spec))
        memory = Memory(host, GPU_CONTEXT_BYTES + max(flow.on_gpu, engine))
    else:
        memory = Memory(FLOW_IDLE_BYTES + max(around + flow.peak, engine))
    outlook = {p.section: said for p in passes if (said := p.outlook())}
    return Plan(layout, schemes, planned, memory, None, flow, operations, kv=kv_change(layout, passes), outlook=outlook)


def ahead_and_behind(layout: ModelLayout, planned: OutputPlan, limits: Limits) -> int:
    """What is read ahead and what waits to be uploaded; a small model has less than the limits."""
    largest = max(s.source_bytes for s in layout.stages())
    return min(layout.source_bytes, max(limits.lookahead, largest)) + min(planned.tensor_bytes, limits.pending)


def cores() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or 0) or len(os.sched_getaffinity(0))


def peak_memory(layout: ModelLayout, planned: OutputPlan, schemes: Mapping[str, Scheme], limits: Limits) -> int:
    """Bytes at the worst moment: the largest stage as stored, decoded and encoded, what is read ahead, and what waits to be uploaded.
    Plain stages pass through in slices. It does not depend on the number of blocks."""
    largest = 2 * limits.slice
    for unit, stages in zip(layout.units, planned.stages, strict=True):
        for stage, placed in zip(unit.stages, stages, strict=True):
            if row_by_row(stage, schemes):
                continue
            if any(x.name in schemes or x.pruned for x in stage.linears) or any(t.encoding != "plain" for t in stage.tensors):
                decoded = sum(t.nbytes for t in stage.tensors if t.encoding != "plain")
                largest = max(largest, stage.source_bytes + decoded + sum(t.stop - t.start for t in placed))
    changed = [
        s.source_bytes for s in layout.stages() if not row_by_row(s, schemes) and any(x.name in schemes or x.pruned for x in s.linears)
    ]
    ahead = max([limits.lookahead, *changed])
    return IDLE_BYTES + SCRATCH_BYTES + largest + ahead + limits.pending
