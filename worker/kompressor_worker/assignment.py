"""What each part of a model becomes, decided from headers before a weight is read; and again once surveys have found what only they can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker.architectures import refuse_unknown_forward
from kompressor_worker.formats import bitmask
from kompressor_worker.formats.readers import reader_warnings, storage_warnings
from kompressor_worker.gguf_result import gguf_plan, gguf_warnings, quantises, refuse_impossible
from kompressor_worker.layout import ModelLayout
from kompressor_worker.parts import mixture_warnings
from kompressor_worker.passes import Pass, build_passes
from kompressor_worker.resizing import loadable
from kompressor_worker.sample_warnings import shape_warnings
from kompressor_worker.samples import flows, refuse_short_rows, unused_samples
from kompressor_worker.schemes import Scheme
from kompressor_worker.segments import refuse_order
from kompressor_worker.shards import OutputPlan, plan_output


@dataclass(frozen=True)
class Assignment:
    spec: CompressionJobSpec
    source: ModelLayout
    passes: Sequence[Pass]
    layout: ModelLayout
    """As the passes leave it."""
    schemes: Mapping[str, Scheme]
    """Which linear gets which; the first pass that wants a linear has it."""

    @cached_property
    def plan(self) -> OutputPlan:
        gguf = self.layout.file_format == "gguf"
        return gguf_plan(self.spec, self.layout, self.schemes) if gguf else plan_output(self.layout, self.schemes)

    def before_training(self) -> Assignment:
        """The student's: the job as if it ended before the training. What is to become a GGUF file is trained as safetensors hold it, on
        blocks that the training finds by itself, so no pass has quantised it before."""
        gguf = self.layout.file_format == "gguf"
        kept = [
            (entry, p) for entry, p in zip(self.spec.passes, self.passes, strict=True) if not p.trains and not (gguf and quantises(entry))
        ]
        entries, passes = [entry for entry, _ in kept], [p for _, p in kept]
        update: dict[str, Any] = {"passes": entries}
        if not gguf:
            return replace(self, spec=self.spec.model_copy(update=update), passes=passes)
        update["output"] = self.spec.output.model_copy(update={"format": "compressed-tensors"})
        layout = replace(self.layout, file_format="compressed-tensors", tokenizer=None)
        return replace(self, spec=self.spec.model_copy(update=update), passes=passes, layout=layout, schemes={})

    @classmethod
    def of(cls, spec: CompressionJobSpec, source: ModelLayout) -> Assignment:
        """Raises UserError. Reads no weight, imports no torch."""
        return cls._made(spec, source, build_passes(spec.passes, spec.output.format == "gguf" and spec.calibration is not None))

    def renewed(self) -> Assignment:
        """By what passes know now."""
        return self._made(self.spec, self.source, self.passes)

    @classmethod
    def _made(cls, spec: CompressionJobSpec, source: ModelLayout, passes: Sequence[Pass]) -> Assignment:
        layout, assigned = source, dict[str, Scheme]()
        refuse_order(passes)
        for p in passes:
            layout = p.prepare(layout)
            assigned |= p.assign(layout, assigned)
        refuse_short_rows(spec, passes)
        layout, schemes = loadable(layout), dict(assigned)
        for p in passes:
            schemes = dict(p.settle(layout, schemes))
        if spec.output.sparse_storage == "bitmask":
            layout = bitmask.marked(layout, schemes)
        if flows(spec, passes):
            refuse_unknown_forward(layout.family, layout.config)
        gguf = layout.file_format == "gguf"
        if gguf:
            refuse_impossible(spec, passes, layout)
        warnings = (
            *layout.warnings,
            *(gguf_warnings(layout, schemes) if gguf else reader_warnings(layout, schemes)),
            *(storage_warnings(layout, schemes) if spec.output.sparse_storage == "bitmask" else ()),
            *unused_samples(spec, passes),
            *(shape_warnings(spec, layout, passes, schemes) if flows(spec, passes) else ()),
            *(mixture_warnings(layout, passes, schemes) if flows(spec, passes) else ()),
        )
        layout = replace(layout, warnings=warnings)
        return cls(spec, source, passes, layout, schemes)
