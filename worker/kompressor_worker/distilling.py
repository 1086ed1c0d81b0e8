"""A job that trains, in three phases: the student that its passes make, the training, and the stream that publishes what came out.

The student is a checkpoint of its own among the job's working objects, with a journal of its own, published there all at once. Training
leaves an object a unit behind, and a last one that says so. Then the ordinary stream of the result writes these in place of what passes
would make, so evaluation, gates, journal and publishing are those of every job. Whatever is there already is not done again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kompressor_worker.assignment import Assignment
from kompressor_worker.calibration import Rows, read_rows
from kompressor_worker.distil.lesson import DONE, TRAINED, Group, History, Lesson, StoredModel, TrainingStep, finished
from kompressor_worker.distillation import Distillation
from kompressor_worker.event_files import event_file
from kompressor_worker.flow import calibrated, evaluated, evaluated_apart
from kompressor_worker.journal import Journal, open_journal
from kompressor_worker.measured import measured
from kompressor_worker.passes.distil import TrainingData
from kompressor_worker.pipeline import Limits
from kompressor_worker.publish import CONFIG, REPORT, build_report, parse_report, publish
from kompressor_worker.samples import FoundData, facts, flows
from kompressor_worker.storage import JOURNAL, Output, Source
from kompressor_worker.stream import DataFree, Units, Work, stream
from kompressor_worker.streamed_rows import stream_rows
from kompressor_worker.structure import between
from kompressor_worker.tokenizer import ModelTokenizer
from kompressor_worker.trained_units import Trained, Written

if TYPE_CHECKING:
    from kompressor_worker.trying import Trying

STUDENT = "student"
"""Name of the output among the working objects."""
CHECKPOINTS = "checkpoints"
"""Another one."""
FACTS = f"{TRAINED}data.json"
"""What the report says of the training data."""
TRAINING_DATA = TrainingData.SECTION


@dataclass
class Distilling:
    """One job's."""

    job: Trying
    found: Distillation
    journal: Journal
    """Of the job; what is claimed by it is this worker's."""
    assigned: Assignment
    rows: Mapping[str, Rows]
    """Those that the student's passes and the evaluation want."""
    least_tokens: int

    def __post_init__(self) -> None:
        self.output: Output = self.job.output
        self.stands = bool(self.assigned.before_training().passes)
        """Whether passes make the student; else it is a checkpoint that is there."""
        self.report: dict[str, Any] = {}
        """Of the student that they made."""
        self.history = History()

    def before_publishing(self) -> None:
        """The first two phases. Raises whatever `stream` and `train` raise."""
        if self.stands:
            self.report = self._make_student()
        found = finished(self.output)
        self.history = self._train() if found is None else found

    # ---- the student

    def _make_student(self) -> dict[str, Any]:
        """Its report."""
        inner, before = self.output.inner(STUDENT), self.assigned.before_training()
        if CONFIG in inner.existing():
            if inner.read(JOURNAL) is not None:
                inner.cleanup()
            return parse_report(inner.read_published(REPORT))
        self.journal.commit(self.journal.state)  # the fence: whoever has taken over is done with it, or at it
        t = self.job
        fingerprint, spec = self.journal.state.fingerprint, t.job.spec
        own = open_journal(inner, fingerprint, t.job.owner, lambda surveys: before.plan, bool(spec.worker.allow_device_change), t.job.uid)
        t.progress.making(before.layout, own.state.unit)
        work = work_of(before, t.limits)
        flowing = flows(before.spec, before.passes)
        units: Units = calibrated(work, inner, self.rows, self.least_tokens) if flowing else DataFree(work)
        stream(work, units, self.source, inner, own, t.progress.done, t.stop)
        data = {section: found for section, found in t.data.items() if section in self.rows}
        found = measured(before, self.rows, data, own)
        identity = replace(t.job, spec=before.spec).identity
        report = build_report(work, {"student": str(fingerprint["passes"])}, identity, own, self.source.uri, found)
        publish(work, self.source, inner, own, report)
        return report

    @property
    def source(self) -> Source:
        """What the passes read."""
        return self.job.source

    # ---- training

    def _train(self) -> History:
        t = self.job
        rows = read_training(t.data[TRAINING_DATA], self.found, t.stop)
        self.output.write(FACTS, json.dumps(facts({TRAINING_DATA: rows}, t.data)).encode())
        t.progress.training(self.assigned.layout)
        if t.together is not None:
            del rows  # each process has its own
            t.together.train(t.progress.trained, t.stop)
            found = finished(self.output)
            assert found is not None, f"training is over and {DONE} is missing"
            return found
        from kompressor_worker.distil.train import train

        return train(lesson_of(self.found, self.assigned, self.output, rows, t.limits, Group(), t.stop, t.progress.trained))

    # ---- publishing

    def units(self, work: Work) -> Units:
        """For the stream that publishes."""
        trained = Trained(work, self.output, self.report.get("pruned", {}))
        if (rows := self.rows.get("evaluation")) is None:
            return Written(work, trained)
        if self.found.student is not None:
            return evaluated_apart(work, self.output, rows, trained, self.found.source, self.job.stop)
        return evaluated(work, self.output, self.rows, trained)

    def add_to(self, report: dict[str, Any]) -> dict[str, bytes]:
        """Puts what there is to say of the training into the result's report. Returns what goes beside the result, by name."""
        report["distillation"] = self.section(report.get("evaluation"))
        if (found := self.output.read(FACTS)) is not None:
            report["data"] = {**report.get("data", {}), **json.loads(found[0])}
        report["warnings"] = list(dict.fromkeys([*report["warnings"], *self.report.get("warnings", ()), *warnings_of(self.history)]))
        if self.found.student is not None:  # which the stream has read in place of the job's model
            source = self.found.source
            model = {"uri": source.source.uri, "digest": source.layout.source_digest, "tensorBytes": source.layout.source_bytes}
            report["source"], report["structure"] = model, between(source.layout, self.assigned.layout)
        events = event_file(self.history)
        report["files"] = sorted([*report["files"], *events])
        return events

    def section(self, evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
        """The report's. `evaluation`: of the result."""
        history, before = self.history, self.report.get("evaluation")
        if self.found.student is not None or self.assigned.layout.file_format == "gguf":
            before = None  # not the result before it was trained: another model, or one that is not rounded yet
        return {
            "teacher": self.found.teacher.source.uri,
            **({"student": self.found.student.source.uri} if self.found.student is not None else {}),
            "steps": history.steps,
            "tokens": history.tokens,
            "seconds": round(history.seconds, 1),
            "bestStep": history.best_step,
            **({"stopped": history.stopped} if history.stopped else {}),
            "processes": history.processes,
            **({"before": before} if before else {}),
            **({"recovered": recovered(before, evaluation)} if before and evaluation else {}),
            "curve": thinned(history.curve),
            "evaluations": history.evaluations,
        }


def warnings_of(history: History) -> tuple[str, ...]:
    """Where a training has been of no use, with what to change."""
    if history.steps == 0 or history.best_step > 0:
        return ()
    said = f"distil: {history.steps} steps have made the student no better on the rows held out, so it is published as it was before"
    measured = [(int(each["step"]), each["kl"]) for each in history.evaluations if "kl" in each]
    rate = max((each["learningRate"] for each in history.curve), default=0.0)
    if len(measured) < 2 or measured[1][1] <= measured[0][1]:
        return (f"{said}; set another learningRate, more rows or more steps",)
    (_, before), (step, behind) = measured[:2]
    return (
        f"{said}: steps at a learning rate of {rate:.2g} undo more than they teach (KL {before:.3g} at first, {behind:.3g} behind step "
        f"{step}, {measured[-1][1]:.3g} at the end); set learningRate to {rate / 3:.1g}, or many more steps",
    )


def work_of(assigned: Assignment, limits: Limits) -> Work:
    return Work(assigned.layout, assigned.passes, assigned.schemes, assigned.plan, limits)


def lesson_of(
    found: Distillation,
    assigned: Assignment,
    output: Output,
    rows: Rows,
    limits: Limits,
    group: Group,
    stop: threading.Event,
    tell: Callable[[TrainingStep], None],
) -> Lesson:
    """For one of the processes, once the student is there. Checkpoints have an output of their own, which the process that leads the
    others claims for itself."""
    student = student_of(output, found, bool(assigned.before_training().passes))
    work, checkpoints = work_of(assigned, limits), output.inner(CHECKPOINTS)
    return Lesson(found.params, found.teacher, student, work, rows.tokens, None, output, checkpoints, group, stop, tell, found.logits)


def student_of(output: Output, found: Distillation, stands: bool) -> StoredModel:
    """What is trained, once it is there."""
    if stands:
        return StoredModel.read(output.inner(STUDENT).as_source())
    return found.student or found.source


def read_training(data: FoundData, found: Distillation, stop: threading.Event) -> Rows:
    """Raises UserError where there is nothing."""
    tokenizer = ModelTokenizer(found.source.source)
    if found.params.rows is None:  # all there are, which may be more than memory holds
        return stream_rows(data.source, data.sample, tokenizer, stop)
    return read_rows(data.source, data.sample, tokenizer, stop, at_least=1)


POINTS = 400
"""Of a curve in the report, at most; TensorBoard's files have all."""


def thinned(curve: list[dict[str, float]]) -> list[dict[str, float]]:
    """At most POINTS of it: neighbours become their mean, each under its last step."""
    bunch = -(-len(curve) // POINTS)
    if bunch <= 1:
        return curve
    groups = [curve[start : start + bunch] for start in range(0, len(curve), bunch)]
    return [{**{key: sum(p[key] for p in group) / len(group) for key in group[0]}, "step": group[-1]["step"]} for group in groups]


def recovered(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """Shares of what the student had lost that training has brought back: 1 is all of it, less than 0 a further loss."""
    from math import log as ln

    found = {}
    if before["kl"] > 0:
        found["kl"] = 1 - after["kl"] / before["kl"]
    lost = ln(before["perplexityAfter"] / before["perplexityBefore"])
    if lost > 0:
        found["perplexity"] = 1 - ln(after["perplexityAfter"] / after["perplexityBefore"]) / lost
    return {name: float(f"{share:.4g}") for name, share in found.items()}
