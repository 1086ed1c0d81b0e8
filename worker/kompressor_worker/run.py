"""One job from spec to published result; reads like a table of contents."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker import devices, gates
from kompressor_worker.architectures import refuse_unknown_forward
from kompressor_worker.calibration import Rows
from kompressor_worker.digests import digest
from kompressor_worker.errors import ClaimLost
from kompressor_worker.formats.readers import reader_warnings
from kompressor_worker.job import Job
from kompressor_worker.journal import RELEASE, Journal, open_journal, refuse_usurped
from kompressor_worker.layout import ModelLayout
from kompressor_worker.passes import Pass, build_passes
from kompressor_worker.pipeline import Limits
from kompressor_worker.progress import Progress
from kompressor_worker.publish import PAGE, REPORT, already_published, build_report, dumps, publish, refuse_without_room
from kompressor_worker.reading import read_layout
from kompressor_worker.report_html import render
from kompressor_worker.results import measured_result
from kompressor_worker.sample_warnings import shape_warnings, size_warnings
from kompressor_worker.samples import FoundData, facts, find_samples, flows, unused_samples, wanted_samples
from kompressor_worker.schemes import Scheme
from kompressor_worker.shards import OutputPlan, plan_output
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

    source_layout = read_layout(source)
    passes = build_passes(job.spec.passes)
    layout, schemes = assign(job.spec, source_layout, passes)
    plan = plan_output(layout, schemes)
    tokenizer = ModelTokenizer(source)
    data = find_samples(wanted_samples(job.spec, passes), tokenizer, environ, stop)
    fingerprint = make_fingerprint(job.spec, layout, data)
    if (report := already_published(output, fingerprint)) is not None:
        log.info("%s already holds this result", output.uri)
        if output.read(JOURNAL) is not None:  # who published it was cut off before all was cleared away
            output.cleanup()
        judge_published(job.spec, report, output.uri)
        return Summary(report, time.monotonic() - began, already=True)
    refuse_without_room(output, plan)
    if not output.probe():
        warnings.append(f"{output.uri}: the store ignores conditional writes; two workers on this output would not notice each other")
    warnings += size_warnings(data)
    for warning in [*layout.warnings, *warnings]:
        log.warning("%s", warning)

    rows = {section: found.read(tokenizer, stop) for section, found in data.items()}
    from kompressor_worker import survey  # torch, only now that the job is known to make sense
    from kompressor_worker.flow import calibrated, device_fingerprint, surveyed
    from kompressor_worker.kernels import build
    from kompressor_worker.stream import DataFree, Work, stream

    build.library()  # compiled before the clock of the progress starts

    def decided(surveys: int) -> OutputPlan:
        """The output's plan by what so many surveys have found."""
        nonlocal layout, schemes, plan
        survey.recall(output, surveys, passes)
        if surveys:
            layout, schemes = assign(job.spec, source_layout, passes)
            plan = plan_output(layout, schemes)
        return plan

    limits, flowing = limits or Limits(), flows(job.spec, passes)
    bound = {**fingerprint, "device": device_fingerprint()} if flowing else fingerprint
    journal = open_journal(output, bound, job.owner, decided, bool(job.spec.worker.allow_device_change), job.uid)
    if journal.resumed_from is not None:
        log.info("going on at unit %d of %d", journal.resumed_from, len(layout.units))
    surveys = survey.rounds(passes)
    progress.start(layout, journal.state.unit, surveys, journal.state.surveys)
    try:
        for number in range(journal.state.surveys, surveys):
            progress.surveying(number, source_layout)
            surveyed(number, source_layout, passes, journal, rows, limits).run(source, progress.done, stop)
            layout, schemes = assign(job.spec, source_layout, passes)
            plan = plan_output(layout, schemes)
        work = Work(layout, passes, schemes, plan, limits)
        units = calibrated(work, output, rows) if flowing else DataFree(work)
        progress.streaming(layout, surveys)
        stream(work, units, source, output, journal, progress.done, stop)
        progress.publishing()
        report = build_report(work, fingerprint, job.identity, journal, source.uri, measured(job.spec, rows, data, journal, layout))
        judge(job.spec, report, output, journal)
        publish(work, source, output, journal, report)
    except ClaimLost:
        refuse_usurped(output, job.uid)
        if output.read(JOURNAL) is None:  # the other worker is done and gone: what we wrote since then is nobody's
            output.cleanup()
        raise
    return Summary(report, time.monotonic() - began, resumed_from=journal.resumed_from, warnings=tuple(warnings))


def measured(
    spec: CompressionJobSpec, rows: Mapping[str, Rows], data: Mapping[str, FoundData], journal: Journal, layout: ModelLayout
) -> dict[str, Any]:
    """What calibration and evaluation have to say, from the units' records, and all warnings."""
    records = {unit.name: journal.read_record(number) for number, unit in enumerate(layout.units)}
    found: dict[str, Any] = {"data": facts(rows, data)} if rows else {}
    warnings: list[str] = []
    if blocks := {name: record["block"] for name, record in records.items() if "block" in record}:
        found["blocks"] = [
            {"name": name, **{k: v for k, v in block.items() if k not in ("cost", "drift")}} for name, block in blocks.items()
        ]
        if spec.drift is not None and "drift" in rows:
            from kompressor_worker import drift

            found["drift"] = drift.summarise({name: block.get("drift", {}) for name, block in blocks.items()}, spec.drift.threshold)
            warnings += drift.warnings(found["drift"])
    if evaluation := next((record["evaluation"] for record in records.values() if "evaluation" in record), None):
        found["evaluation"] = {**evaluation, "bos": rows["evaluation"].bos}
    if journal.state.devices:
        found["devices"] = devices.facts(journal.state.devices, list(records))
        warnings.append(devices.warning(found["devices"]))
    return {**found, "warnings": [*layout.warnings, *warnings]}


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


def assign(spec: CompressionJobSpec, layout: ModelLayout, passes: Sequence[Pass]) -> tuple[ModelLayout, dict[str, Scheme]]:
    """The source's layout as the passes leave it, and which linear gets which scheme; the first pass that wants a linear has it. Raises
    UserError. Reads no weight, imports no torch."""
    schemes: dict[str, Scheme] = {}
    for p in passes:
        layout = p.prepare(layout)
        schemes |= p.assign(layout, schemes)
    if flows(spec, passes):
        refuse_unknown_forward(layout.family, layout.config)
    warnings = (
        *layout.warnings,
        *reader_warnings(layout, schemes),
        *unused_samples(spec, passes),
        *(shape_warnings(spec, layout, passes, schemes) if flows(spec, passes) else ()),
    )
    return replace(layout, warnings=warnings), schemes


def make_fingerprint(spec: CompressionJobSpec, layout: ModelLayout, data: Mapping[str, FoundData]) -> dict[str, str]:
    """What must be equal for a job to go on where another stopped, or to count as done already. Passes that compute from weights alone make
    the same bytes on every machine, so no device is in it; to go on with a calibrated job the device must be the same too."""
    return {
        "source": layout.source_digest,
        "passes": digest(spec.passes),
        "format": spec.output.format,
        RELEASE: version("kompressor"),
        **{section: found.fingerprint for section, found in data.items()},
    }
