"""One job from spec to published result; reads like a table of contents."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker import gates
from kompressor_worker.assignment import Assignment
from kompressor_worker.digests import digest
from kompressor_worker.errors import ClaimLost
from kompressor_worker.job import Job
from kompressor_worker.journal import RELEASE, Journal, open_journal, refuse_usurped
from kompressor_worker.kv_memory import kv_status
from kompressor_worker.layout import ModelLayout
from kompressor_worker.measured import measured
from kompressor_worker.pipeline import Limits
from kompressor_worker.progress import Progress
from kompressor_worker.publish import PAGE, REPORT, already_published, build_report, dumps, publish, refuse_without_room
from kompressor_worker.reading import read_layout
from kompressor_worker.report_html import render
from kompressor_worker.results import measured_result
from kompressor_worker.sample_warnings import size_warnings
from kompressor_worker.samples import FoundData, find_samples, flows, wanted_samples
from kompressor_worker.shards import OutputPlan
from kompressor_worker.storage import JOURNAL, WORK, Output
from kompressor_worker.storage.locations import open_output, open_source
from kompressor_worker.tokenizer import ModelTokenizer

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
        if "sparsity" in made:
            result |= {"prunedTensors": made["prunedLinears"], "sparsity": f"{100 * made['sparsity']:.4g}%"}
        if parameters := self.report.get("structure", {}).get("parameters"):
            result |= {"parametersBefore": parameters[0], "parametersAfter": parameters[1]}
        if "bitmaskLinears" in made:
            result |= {"bitmaskTensors": made["bitmaskLinears"], "bitmaskSavedBytes": made["bitmaskSavedBytes"]}
        result |= kv_status(self.report.get("attention", {}).get("kvCache", {}))
        result |= measured_result(self.report)
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

    assigned = Assignment.of(job.spec, read_layout(source))
    tokenizer = ModelTokenizer(source)
    data = find_samples(wanted_samples(job.spec, assigned.passes), tokenizer, environ, stop)
    fingerprint = make_fingerprint(job.spec, assigned.source, data)
    if (report := already_published(output, fingerprint)) is not None:
        log.info("%s already holds this result", output.uri)
        if output.read(JOURNAL) is not None:  # who published it was cut off before all was cleared away
            output.cleanup()
        judge_published(job.spec, report, output.uri)
        return Summary(report, time.monotonic() - began, already=True)
    refuse_without_room(output, assigned.plan)
    if not output.probe():
        warnings.append(f"{output.uri}: the store ignores conditional writes; two workers on this output would not notice each other")
    warnings += size_warnings(data)
    for warning in [*assigned.layout.warnings, *warnings]:
        log.warning("%s", warning)

    rows = {section: found.read(tokenizer, stop) for section, found in data.items()}
    from kompressor_worker import survey  # torch, only now that the job is known to make sense
    from kompressor_worker.flow import calibrated, device_fingerprint, surveyed
    from kompressor_worker.kernels import build
    from kompressor_worker.stream import DataFree, Work, stream

    build.library()  # compiled before the clock of the progress starts

    def plan_after(surveys: int) -> OutputPlan:
        nonlocal assigned
        assigned = survey.recalled(output, surveys, assigned)
        return assigned.plan

    limits, flowing = limits or Limits(), flows(job.spec, assigned.passes)
    bound = {**fingerprint, "device": device_fingerprint()} if flowing else fingerprint
    journal = open_journal(output, bound, job.owner, plan_after, bool(job.spec.worker.allow_device_change), job.uid)
    if journal.resumed_from is not None:
        log.info("going on at unit %d of %d", journal.resumed_from, len(assigned.layout.units))
    surveys = survey.rounds(assigned.passes)
    progress.start(assigned.layout, journal.state.unit, surveys, journal.state.surveys)
    try:
        for number in range(journal.state.surveys, surveys):
            progress.surveying(number, assigned.source)
            surveyed(number, assigned, journal, rows, limits).run(source, progress.done, stop)
            assigned = assigned.renewed()
        progress.streaming(assigned.layout, surveys)
        work = Work(assigned.layout, assigned.passes, assigned.schemes, assigned.plan, limits)
        units = calibrated(work, output, rows) if flowing else DataFree(work)
        stream(work, units, source, output, journal, progress.done, stop)
        progress.publishing()
        report = build_report(work, fingerprint, job.identity, journal, source.uri, measured(assigned, rows, data, journal))
        judge(job.spec, report, output, journal)
        publish(work, source, output, journal, report)
    except ClaimLost:
        refuse_usurped(output, job.uid)
        if output.read(JOURNAL) is None:  # the other worker is done and gone: what we wrote since then is nobody's
            output.cleanup()
        raise
    return Summary(report, time.monotonic() - began, resumed_from=journal.resumed_from, warnings=tuple(warnings))


def judge_published(spec: CompressionJobSpec, report: Mapping[str, Any], uri: str) -> None:
    """Holds a result that is there already to this job's gates, which may be stricter than those of the job that published it.
    Raises GateFailed."""
    if spec.evaluation is not None:
        verdicts = gates.check(spec.evaluation.gates, report["evaluation"])
        gates.enforce(verdicts, measured_result(report), f"{uri}/{PAGE}", published=True)


def judge(spec: CompressionJobSpec, report: dict[str, Any], output: Output, journal: Journal) -> None:
    """Checks the gates. Raises GateFailed, with nothing left of the result but the report of why."""
    if spec.evaluation is None or not spec.evaluation.gates:
        return
    report["gates"] = verdicts = gates.check(spec.evaluation.gates, report["evaluation"])
    if all(v["met"] for v in verdicts):
        return
    kept = {f"{WORK}{REPORT}": dumps(report), f"{WORK}{PAGE}": render(report)}
    for name, data in kept.items():
        output.write(name, data)
    for upload in journal.state.uploads:
        output.abort(upload.name, upload.id)
    output.cleanup(keep=list(kept))
    gates.enforce(verdicts, measured_result(report), output.place(f"{WORK}{PAGE}"))


def make_fingerprint(spec: CompressionJobSpec, layout: ModelLayout, data: Mapping[str, FoundData]) -> dict[str, str]:
    """What must be equal for a job to go on where another stopped, or to count as done already. Passes that compute from weights alone make
    the same bytes on every machine, so no device is in it; to go on with a calibrated job the device must be the same too."""
    return {
        "source": layout.source_digest,
        "passes": digest(spec.passes),
        "format": spec.output.format,
        **({} if spec.output.sparse_storage == "dense" else {"sparseStorage": spec.output.sparse_storage}),
        RELEASE: version("kompressor"),
        **{section: found.fingerprint for section, found in data.items()},
    }
