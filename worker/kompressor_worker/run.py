"""One job from spec to published result; reads like a table of contents."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker.errors import ClaimLost
from kompressor_worker.formats.readers import reader_warnings
from kompressor_worker.job import Job
from kompressor_worker.journal import JOURNAL, open_journal
from kompressor_worker.layout import ModelLayout
from kompressor_worker.passes import Pass, build_passes
from kompressor_worker.pipeline import Limits
from kompressor_worker.progress import Progress
from kompressor_worker.publish import already_published, build_report, publish
from kompressor_worker.reading import read_layout
from kompressor_worker.schemes import Scheme
from kompressor_worker.shards import plan_output
from kompressor_worker.storage.locations import open_output, open_source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What a finished job has to say; becomes `status.result`."""

    report: Mapping[str, Any]
    seconds: float
    already: bool = False
    resumed_from: int | None = None
    warnings: tuple[str, ...] = field(default=())

    def result(self, uri: str) -> dict[str, Any]:
        source, made = self.report["source"], self.report["result"]
        result: dict[str, Any] = {
            "uri": uri,
            "sourceBytes": source["tensorBytes"],
            "outputBytes": made["tensorBytes"],
            "ratio": f"{source['tensorBytes'] / max(1, made['tensorBytes']):.2f}x",
            "quantizedTensors": made["quantizedLinears"],
            "relativeError": f"{made['relativeError']:.4g}",
            "sourceDigest": source["digest"],
            "resultDigest": made["digest"],
            "seconds": round(self.seconds),
        }
        if self.resumed_from is not None:
            result["resumedFromUnit"] = self.resumed_from
        if warnings := [*self.report["warnings"], *self.warnings]:
            result["warnings"] = warnings
        return result


def run(job: Job, environ: Mapping[str, str], progress: Progress, stop: threading.Event, limits: Limits | None = None) -> Summary:
    """Compresses one model. Raises what kompressor_worker.errors names; publishes nothing unless it returns."""
    began = time.monotonic()
    warnings: list[str] = []
    source = open_source(job.spec.model.source, environ, stop)
    output = open_output(job.spec.output, environ, stop)

    layout = read_layout(source)
    passes, schemes = assign(job.spec, layout)
    layout = replace(layout, warnings=(*layout.warnings, *reader_warnings(layout, schemes)))
    plan = plan_output(layout, schemes)
    fingerprint = make_fingerprint(job.spec, layout)
    if (report := already_published(output, fingerprint)) is not None:
        log.info("%s already holds this result", output.uri)
        return Summary(report, time.monotonic() - began, already=True)
    if not output.probe():
        warnings.append(f"{output.uri}: the store ignores conditional writes; two workers on this output would not notice each other")
    for warning in [*layout.warnings, *warnings]:
        log.warning("%s", warning)

    from kompressor_worker.kernels import build  # torch, only now that the job is known to make sense
    from kompressor_worker.stream import Work, stream

    build.library()  # compiled before the clock of the progress starts

    work = Work(layout, passes, schemes, plan, limits or Limits())
    journal = open_journal(output, fingerprint, job.owner, plan)
    if journal.resumed_from is not None:
        log.info("going on at unit %d of %d", journal.resumed_from, len(layout.units))
    progress.start(layout, journal.state.unit)
    try:
        stream(work, source, output, journal, progress.done, stop)
        progress.publishing()
        report = build_report(work, fingerprint, job.identity, journal, source.uri)
        publish(work, source, output, journal, report)
    except ClaimLost:
        if output.read(JOURNAL) is None:  # the other worker is done and gone: what we wrote since then is nobody's
            output.cleanup()
        raise
    return Summary(report, time.monotonic() - began, resumed_from=journal.resumed_from, warnings=tuple(warnings))


def assign(spec: CompressionJobSpec, layout: ModelLayout) -> tuple[list[Pass], dict[str, Scheme]]:
    """Which linear gets which scheme; the first pass that wants a linear has it. Raises UserError. Reads no weight, imports no torch."""
    passes = build_passes(spec.passes)
    schemes: dict[str, Scheme] = {}
    for p in passes:
        schemes |= p.assign(layout, schemes)
    return passes, schemes


def make_fingerprint(spec: CompressionJobSpec, layout: ModelLayout) -> dict[str, str]:
    """What must be equal for a job to go on where another stopped, or to count as done already. Passes that compute from weights alone make
    the same bytes on every machine, so no device is in it."""
    return {
        "source": layout.source_digest,
        "passes": digest(spec.passes),
        "format": spec.output.format,
        "kompressor": version("kompressor"),
    }


def digest(value: Any) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
