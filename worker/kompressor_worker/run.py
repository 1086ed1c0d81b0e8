"""One job from spec to published result; reads like a table of contents."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker import gates
from kompressor_worker.distillation import open_models
from kompressor_worker.errors import ClaimLost
from kompressor_worker.job import Job
from kompressor_worker.journal import refuse_usurped
from kompressor_worker.kv_memory import kv_status
from kompressor_worker.passes.distil import TrainingData
from kompressor_worker.pipeline import Limits
from kompressor_worker.progress import Progress
from kompressor_worker.publish import PAGE, refuse_without_room
from kompressor_worker.results import measured_result
from kompressor_worker.sample_warnings import size_warnings
from kompressor_worker.samples import find_samples
from kompressor_worker.storage import JOURNAL
from kompressor_worker.storage.locations import open_output
from kompressor_worker.target.ladder import Ladder, published_by, standing
from kompressor_worker.tokenizer import ModelTokenizer
from kompressor_worker.trying import Trying, fingerprints

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
    tokenizer = ModelTokenizer(source)
    data = find_samples(ladder.samples(), tokenizer, environ, stop)
    prints = fingerprints(ladder, data, models.distillation)
    if (found := published_by(output, prints)) is not None:
        number, report = found
        log.info("%s already holds this result", output.uri)
        if output.read(JOURNAL) is not None:  # who published it was cut off before all was cleared away
            output.cleanup()
        judge_published(ladder.rungs[number].spec, report, output.uri)
        return Summary(report, time.monotonic() - began, already=True)
    number = standing(output, prints)
    refuse_without_room(output, ladder.rungs[number].assigned.plan)
    if not output.probe():
        warnings.append(f"{output.uri}: the store ignores conditional writes; two workers on this output would not notice each other")
    warnings += size_warnings(data)
    for warning in [*ladder.rungs[number].assigned.layout.warnings, *warnings]:
        log.warning("%s", warning)

    rows = {section: found.read(tokenizer, stop) for section, found in data.items() if section != TrainingData.SECTION}
    from kompressor_worker.kernels import build  # torch, only now that the job is known to make sense

    build.library()  # compiled before the clock of the progress starts
    trying = Trying(job, ladder, source, output, data, rows, limits or Limits(), progress, stop, models.distillation, together)
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
    """Holds a result that is there already to this job's gates, which may be stricter than those of the job that published it.
    Raises GateFailed."""
    if spec.evaluation is not None:
        verdicts = gates.check(spec.evaluation.gates, report["evaluation"])
        gates.enforce(verdicts, measured_result(report), f"{uri}/{PAGE}", published=True)
