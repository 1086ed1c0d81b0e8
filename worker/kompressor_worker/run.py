"""One job from spec to published result; reads like a table of contents."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker import gates
from kompressor_worker.assignment import Assignment
from kompressor_worker.calibration import Rows
from kompressor_worker.distillation import open_models
from kompressor_worker.errors import ClaimLost
from kompressor_worker.in_order import refuse_without_spool, spool_bytes
from kompressor_worker.job import Job
from kompressor_worker.journal import refuse_usurped
from kompressor_worker.kv_memory import kv_status
from kompressor_worker.passes.distil import TrainingData
from kompressor_worker.pipeline import Limits
from kompressor_worker.progress import Progress
from kompressor_worker.publish import CONFIG, PAGE, refuse_without_room
from kompressor_worker.results import measured_result
from kompressor_worker.runtime import find_engine
from kompressor_worker.runtime.asked import refuse_unservable, unmeasured
from kompressor_worker.runtime.checkpoints import Files, refuse_without_scratch, scratch_bytes
from kompressor_worker.runtime.job import Bench
from kompressor_worker.sample_warnings import size_warnings
from kompressor_worker.samples import find_samples
from kompressor_worker.storage import JOURNAL
from kompressor_worker.storage.locations import open_output
from kompressor_worker.target.ladder import Ladder, Rung, published_by, standing
from kompressor_worker.tokenizer import ModelTokenizer
from kompressor_worker.training_estimate import room_beside
from kompressor_worker.trying import Trying, fingerprints, gates_of

if TYPE_CHECKING:
    from kompressor_worker.training_process import Together

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


def run(
    job: Job,
    environ: Mapping[str, str],
    progress: Progress,
    stop: threading.Event,
    limits: Limits | None = None,
    together: Together | None = None,
) -> Summary:
    """Compresses one model. Raises what kompressor_worker.errors names; publishes nothing unless it returns. `together`: how it is trained
    where that takes more than this process."""
    began = time.monotonic()
    warnings: list[str] = []
    models = open_models(job.spec, environ, stop)
    job, source = replace(job, spec=models.spec), models.source
    output = open_output(job.spec.output, environ, stop)

    ladder = Ladder.of(job.spec, models.layout)
    for rung in ladder.rungs:
        refuse_unservable(rung.spec, rung.assigned)
    installed = find_engine(job.spec, environ)
    bench = Bench(installed, environ, models.original, output, stop) if installed else None
    tokenizer = ModelTokenizer(source)
    data = find_samples(ladder.samples(), tokenizer, environ, stop)
    prints = fingerprints(ladder, data, models.distillation)
    if (found := published_by(output, prints)) is not None:
        number, report = found
        log.info("%s already holds this result", output.uri)
        if output.read(JOURNAL) is not None:  # who published it was cut off before all was cleared away
            output.cleanup()
        told, warnings = held_again(output.uri, bench, ladder.rungs[number], report, lambda: data["evaluation"].read(tokenizer, stop))
        return Summary(told, time.monotonic() - began, already=True, warnings=tuple(warnings))
    number = standing(output, prints)
    asked = ladder.rungs[number].assigned
    refuse_without_room(output, asked.plan, room_beside(models.distillation, asked))
    refuse_without_spool(max(spool_bytes(rung.assigned.plan) for rung in ladder.rungs))
    if bench is not None:
        refuse_without_scratch(scratch_bytes(job.spec, models.original, [rung.assigned.plan for rung in ladder.rungs], output))
    if not output.probe():
        warnings.append(f"{output.uri}: the store ignores conditional writes; two workers on this output would not notice each other")
    warnings += size_warnings(data)
    for warning in [*ladder.rungs[number].assigned.layout.warnings, *warnings]:
        log.warning("%s", warning)

    rows = {section: found.read(tokenizer, stop) for section, found in data.items() if section != TrainingData.SECTION}
    from kompressor_worker.kernels import build  # torch, only now that the job is known to make sense

    build.library()  # compiled before the clock of the progress starts
    beside = (models.distillation, together, bench)
    trying = Trying(job, ladder, source, output, data, rows, limits or Limits(), progress, stop, *beside)
    journal, assigned = trying.open(number)
    resumed_from = journal.resumed_from
    try:
        while (made := trying.carry_out(number, journal, assigned)) is None:
            number += 1
            assigned = trying.recalled(number, journal.state.surveys)
    except ClaimLost:
        refuse_usurped(output, job.uid)
        if output.read(JOURNAL) is None:  # the other worker is done and gone: what we wrote since then is nobody's
            output.cleanup()
        raise
    return Summary(made, time.monotonic() - began, resumed_from=resumed_from, warnings=tuple(warnings))


def judge_published(spec: CompressionJobSpec, report: Mapping[str, Any], uri: str) -> None:
    """Holds a result that is there already to this job's gates, which may be stricter than those of the job that published it; to those on
    speed and memory where they were measured as this job asks. Raises GateFailed."""
    asked = gates_of(spec)
    if unmeasured(spec, report):
        asked = gates.quality(asked)
    if asked:
        verdicts = gates.check(asked, report["evaluation"], report.get("runtime"))
        gates.enforce(verdicts, measured_result(report), f"{uri}/{PAGE}", published=True)


def held_again(
    uri: str, bench: Bench | None, rung: Rung, report: Mapping[str, Any], rows: Callable[[], Rows]
) -> tuple[Mapping[str, Any], list[str]]:
    """A published result's report, and warnings: held to this job's gates, and measured if it asks for what nobody has measured of it."""
    judge_published(rung.spec, report, uri)
    if bench is None or not unmeasured(rung.spec, report):
        return report, []
    measured, warnings = measured_later(bench, rung.spec, rung.assigned, report, rows())
    judge_published(rung.spec, measured, uri)
    return measured, warnings


def measured_later(
    bench: Bench, spec: CompressionJobSpec, assigned: Assignment, report: Mapping[str, Any], rows: Rows
) -> tuple[dict[str, Any], list[str]]:
    """The report of a published result with what this job measures of it, for the status: what is published stays as it is."""
    sizes = {name: info.size for name, info in bench.output.existing().items() if name in report["files"]}
    refuse_without_scratch(scratch_bytes(spec, bench.original, [assigned.plan], bench.output))
    shards = Files({n: size for n, size in sizes.items() if n.endswith((".safetensors", ".gguf"))}, bench.output.read_published(CONFIG))
    found, warnings = bench.measured(spec, assigned, shards, rows)
    return {**report, "runtime": found}, warnings
