"""One plan of a job, from where the journal stands to the published result, or to the next plan where it was missed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from kompressor_api.datasets import MIN_TOKENS_PER_EXPERT, Gate
from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker import gates
from kompressor_worker.assignment import Assignment
from kompressor_worker.calibration import Rows
from kompressor_worker.digests import digest
from kompressor_worker.distillation import Distillation
from kompressor_worker.job import Job, of_the_file
from kompressor_worker.journal import RELEASE, Journal, open_journal
from kompressor_worker.layout import ModelLayout
from kompressor_worker.measured import measured
from kompressor_worker.pipeline import Limits
from kompressor_worker.progress import Progress
from kompressor_worker.publish import PAGE, REPORT, build_report, complete_shards, dumps, publish, published_config
from kompressor_worker.report_html import render
from kompressor_worker.results import measured_result
from kompressor_worker.samples import FoundData, flows, wanted_samples
from kompressor_worker.shards import OutputPlan
from kompressor_worker.storage import WORK, Output, Source
from kompressor_worker.target.ladder import Ladder, Rung, missed, step, with_miss

if TYPE_CHECKING:
    from kompressor_worker.distilling import Distilling
    from kompressor_worker.runtime.job import Bench
    from kompressor_worker.stream import Units, Work
    from kompressor_worker.training_process import Together

log = logging.getLogger(__name__)


@dataclass
class Trying:
    """What the plans of one job share: places, data, and how far each of them is told."""

    job: Job
    ladder: Ladder
    source: Source
    output: Output
    data: Mapping[str, FoundData]
    rows: Mapping[str, Rows]
    limits: Limits
    progress: Progress
    stop: threading.Event
    distillation: Distillation | None = None
    together: Together | None = None
    """How it is trained where that takes more than this process."""
    bench: Bench | None = None
    """Where evaluation.runtime is measured, if it is asked for."""

    def fingerprint(self, number: int) -> dict[str, str]:
        return fingerprints(self.ladder, self.data, self.distillation)[number]

    def bound(self, number: int) -> dict[str, str]:
        """The fingerprint, and on what it must be gone on with."""
        from kompressor_worker.flow import device_fingerprint

        rung = self.ladder.rungs[number]
        flowing = flows(rung.spec, rung.assigned.passes)
        return {**self.fingerprint(number), **({"device": device_fingerprint()} if flowing else {})}

    def open(self, number: int) -> tuple[Journal, Assignment]:
        from kompressor_worker import survey

        assigned = self.ladder.rungs[number].assigned

        def plan_after(surveys: int) -> OutputPlan:
            nonlocal assigned
            assigned = survey.recalled(self.output, surveys, assigned)
            return assigned.plan

        spec = self.job.spec
        journal = open_journal(
            self.output, self.bound(number), self.job.owner, plan_after, bool(spec.worker.allow_device_change), self.job.uid
        )
        if journal.resumed_from is not None:
            log.info("going on at unit %d of %d", journal.resumed_from, len(assigned.layout.units))
        return journal, assigned

    def recalled(self, number: int, surveys: int) -> Assignment:
        from kompressor_worker import survey

        return survey.recalled(self.output, surveys, self.ladder.rungs[number].assigned)

    def carry_out(self, number: int, journal: Journal, assigned: Assignment) -> dict[str, Any] | None:
        """One plan from where the journal stands to the published result: its report; None where it was missed and another one follows."""
        from kompressor_worker import survey
        from kompressor_worker.flow import surveyed
        from kompressor_worker.stream import stream

        rung, rows = self.ladder.rungs[number], chosen(self.rows, self.ladder.rungs[number])
        if number < len(journal.state.tries):  # missed, and cut off before the step
            self._step(number, journal)
            return None
        surveys = survey.rounds(assigned.passes)
        self.progress.trying(number + 1, rung.name)
        trains, makes_student = self._trains(assigned)
        self.progress.start(assigned.layout, journal.state.unit, surveys, journal.state.surveys, makes_student, trains)
        for each in range(journal.state.surveys, surveys):
            self.progress.surveying(each, assigned.source)
            surveyed(each, assigned, journal, rows, self.limits).run(self.source, self.progress.done, self.stop)
            assigned = assigned.renewed()
        work, units, distilling = self._units(rung, assigned, journal, rows)
        self.progress.streaming(assigned.layout)
        stream(work, units, self.source, self.output, journal, self.progress.done, self.stop)
        left = units.left
        del units  # what flowed is let go of
        self.progress.publishing()
        found = measured(assigned, rows, chosen(self.data, rung), journal)
        job = replace(self.job, spec=rung.spec)
        report = build_report(work, self.fingerprint(number), job.identity, journal, self.source.uri, found)
        beside = distilling.add_to(report) if distilling is not None else {}
        if self.ladder.fit is not None:
            verdicts = gates.check(gates.quality(gates_of(rung.spec)), report["evaluation"])
            miss = missed(rung, verdicts, report["evaluation"])
            if not miss["met"] and number + 1 < len(self.ladder.rungs):
                log.warning("%s: %s; the next safer plan is tried: %s", rung.name, miss["says"], self.ladder.rungs[number + 1].name)
                with_miss(journal, miss)
                self._step(number, journal, left)
                return None
            report |= self.ladder.section(number, assigned, [*journal.state.tries, miss])
        judge(gates.quality(gates_of(rung.spec)), report, self.output, journal)
        if self.bench is not None:
            self._measure(self.bench, rung.spec, assigned, work, journal, report)
        publish(work, self.source, self.output, journal, report, beside)
        return report

    def _measure(
        self, bench: Bench, spec: CompressionJobSpec, assigned: Assignment, work: Work, journal: Journal, report: dict[str, Any]
    ) -> None:
        """Serves what would be published, which nobody sees yet. Raises GateFailed, EngineFailed."""
        from kompressor_worker.runtime.checkpoints import Files

        self.progress.measuring()
        complete_shards(self.output, journal, report["files"])
        shards = Files({shard.name: shard.size for shard in work.plan.shards}, dumps(published_config(work)))
        report["runtime"], warnings = bench.measured(spec, assigned, shards, self.rows["evaluation"])
        report["warnings"] = [*report["warnings"], *warnings]
        judge(gates_of(spec), report, self.output, journal)
        self.progress.publishing()

    def _trains(self, assigned: Assignment) -> tuple[bool, bool]:
        """Whether there is a training, and a student to be made for it."""
        trains = self.distillation is not None
        return trains, trains and bool(assigned.before_training().passes)

    def _units(self, rung: Rung, assigned: Assignment, journal: Journal, rows: Mapping[str, Rows]) -> tuple[Work, Units, Distilling | None]:
        """How the result's units are worked on; where it is trained, all that comes before is done here."""
        from kompressor_worker.flow import calibrated
        from kompressor_worker.stream import DataFree, Work

        work = Work(assigned.layout, assigned.passes, assigned.schemes, assigned.plan, self.limits)
        least = least_tokens(rung.spec)
        if self.distillation is None:
            flowing = flows(rung.spec, assigned.passes)
            return work, calibrated(work, self.output, rows, least) if flowing else DataFree(work), None
        from kompressor_worker.distilling import Distilling

        distilling = Distilling(self, self.distillation, journal, assigned, rows, least)
        distilling.before_publishing()
        return work, distilling.units(work), distilling

    def _step(self, number: int, journal: Journal, left: Sequence[str] = ()) -> None:
        before, after = self.ladder.rungs[number : number + 2]
        step(journal, before, after, self.bound(number + 1), left)


def gates_of(spec: CompressionJobSpec) -> Sequence[Gate]:
    return spec.evaluation.gates if spec.evaluation is not None else ()


def judge(asked: Sequence[Gate], report: dict[str, Any], output: Output, journal: Journal) -> None:
    """Checks the gates. Raises GateFailed, with nothing left of the result but the report of why."""
    if not asked:
        return
    report["gates"] = verdicts = gates.check(asked, report["evaluation"], report.get("runtime"))
    if all(v["met"] for v in verdicts):
        return
    kept = {f"{WORK}{REPORT}": dumps(report), f"{WORK}{PAGE}": render(report)}
    for name, data in kept.items():
        output.write(name, data)
    for upload in journal.state.uploads:
        output.abort(upload.name, upload.id)
    if journal.state.publishing:  # whole already, to be measured
        output.unpublish([upload.name for upload in journal.state.uploads])
    output.cleanup(keep=list(kept))
    tried = [f"{each['plan']}: {each['says']}" for each in report.get("target", {}).get("tries", ())]
    gates.enforce(verdicts, measured_result(report), output.place(f"{WORK}{PAGE}"), tried=tried)


def chosen(sections: Mapping[str, Any], rung: Rung) -> dict[str, Any]:
    """Of what is there by section of the spec, what this plan reads."""
    wanted = {sample.SECTION for sample in wanted_samples(rung.spec, rung.assigned.passes)}
    return {section: found for section, found in sections.items() if section in wanted}


def fingerprints(ladder: Ladder, data: Mapping[str, FoundData], distillation: Distillation | None = None) -> list[dict[str, str]]:
    beside = distillation.fingerprint if distillation is not None else {}
    return [make_fingerprint(rung.spec, rung.assigned.source, chosen(data, rung)) | beside for rung in ladder.rungs]


def make_fingerprint(spec: CompressionJobSpec, layout: ModelLayout, data: Mapping[str, FoundData]) -> dict[str, str]:
    """What must be equal for a job to go on where another stopped, or to count as done already. Passes that compute from weights alone make
    the same bytes on every machine, so no device is in it; to go on with a calibrated job the device must be the same too."""
    return {
        "source": layout.source_digest,
        "passes": digest(spec.passes),
        "format": spec.output.format,
        **{key: str(value) for key, value in of_the_file(spec).items()},
        **({} if spec.target is None else {"target": digest(spec.target.model_dump(by_alias=True, exclude_none=True))}),
        **({} if spec.output.sparse_storage == "dense" else {"sparseStorage": spec.output.sparse_storage}),
        **({"minTokensPerExpert": str(least)} if (least := least_tokens(spec)) != MIN_TOKENS_PER_EXPERT and has_experts(layout) else {}),
        RELEASE: version("kompressor"),
        **{section: found.fingerprint for section, found in data.items()},
    }


def least_tokens(spec: CompressionJobSpec) -> int:
    """Experts that fewer calibration tokens are routed to are measured on all of them."""
    return MIN_TOKENS_PER_EXPERT if spec.calibration is None else spec.calibration.min_tokens_per_expert


def has_experts(layout: ModelLayout) -> bool:
    return any(stage.expert is not None for stage in layout.stages())
