"""The plans that a job carries out, one after the other until one keeps what it was asked to keep: of an ordinary job one, its own passes.

Which one is under way is in the journal: the fingerprint is that of its passes, and the plans that were missed are listed. A miss is
committed before anything of it is taken away, the step to the next plan after: cut off in between, a restart does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker.assignment import Assignment
from kompressor_worker.errors import OutputOccupied
from kompressor_worker.gates import Verdict
from kompressor_worker.journal import Journal, State, decode, differing
from kompressor_worker.layout import ModelLayout
from kompressor_worker.publish import already_published
from kompressor_worker.runtime.asked import runtime_of
from kompressor_worker.samples import wanted_samples
from kompressor_worker.storage import JOURNAL, Output
from kompressor_worker.target.planner import Fit, fit
from kompressor_worker.target.serving import Served
from kompressor_worker.target.weighing import Row, rounded


@dataclass(frozen=True)
class Rung:
    """One plan, as the job that it makes."""

    spec: CompressionJobSpec
    """With the plan's passes, and the target's limit among the gates."""
    assigned: Assignment
    row: Row | None = None
    """What the target's planner says of it; None: the job's own passes."""

    @property
    def name(self) -> str:
        return self.row.name if self.row else ""


@dataclass(frozen=True)
class Ladder:
    rungs: tuple[Rung, ...]
    fit: Fit | None = None

    @classmethod
    def of(cls, spec: CompressionJobSpec, source: ModelLayout) -> Ladder:
        """Raises UserError: of passes that this model does not take, and where nothing fits the target."""
        if spec.target is None:
            return cls((Rung(spec, Assignment.of(spec, source)),))
        found = fit(spec, source)
        found.refuse_if_nothing_fits()
        return cls(tuple(Rung(told, Assignment.of(told, source), row) for row in found.ladder for told in [as_told(spec, row)]), found)

    def samples(self) -> list[Any]:
        """What any of them wants to read. Raises UserError."""
        wanted = {sample.SECTION: sample for rung in self.rungs for sample in wanted_samples(rung.spec, rung.assigned.passes)}
        return list(wanted.values())

    def section(self, number: int, assigned: Assignment, tries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The report's: plans, what was tried, and what the result takes and gives. Empty without a target."""
        if self.fit is None:
            return {}
        on, target, served = self.fit.on, self.fit.target, Served.of(assigned)
        asked = (on, target.context, target.requests)
        before = self.fit.original.served
        assert before is not None
        speeds = {"before": before.speed(*asked), "after": served.speed(*asked)}
        found: dict[str, Any] = {
            **self.fit.as_json(),
            "chosen": self.rungs[number].name,
            "tries": [dict(sorted(each.items())) for each in tries],  # as a journal gives them back
            "need": asdict(served.need(*asked)) | {"total": served.need(*asked).total},
        }
        for when, speed in speeds.items():
            found[when] = {"bytesPerToken": speed.bytes_per_token, "tokensPerSecond": rounded(speed.tokens_per_second)}
            if target.price_per_hour is not None:
                found[when]["costPerMillionTokens"] = rounded(speed.cost_per_million(target.price_per_hour))
        if runtime := runtime_of(self.rungs[number].spec):  # what is measured, predicted for the target's GPU
            found["predicted"] = [
                {
                    "batch": batch,
                    "before": rounded(before.speed(on, runtime.tokens, batch).tokens_per_second),
                    "after": rounded(served.speed(on, runtime.tokens, batch).tokens_per_second),
                }
                for batch in runtime.batch
            ]
        return {"target": found}


def as_told(spec: CompressionJobSpec, row: Row) -> CompressionJobSpec:
    """The job that a plan makes of the target's."""
    assert spec.target is not None and spec.evaluation is not None
    evaluation = spec.evaluation.model_copy(update={"gates": [*spec.evaluation.gates, spec.target.gate]})
    return spec.model_copy(update={"passes": [dict(entry) for entry in row.passes], "evaluation": evaluation})


def published_by(output: Output, fingerprints: Sequence[Mapping[str, str]]) -> tuple[int, dict[str, Any]] | None:
    """Which plan's result is there already, and its report. Raises OutputOccupied where it is none of them."""
    refused: OutputOccupied | None = None
    for number, fingerprint in enumerate(fingerprints):
        try:
            report = already_published(output, fingerprint)
        except OutputOccupied as error:
            refused = refused or error
            continue
        if report is None:
            return None
        return number, report
    assert refused is not None
    raise refused


def standing(output: Output, fingerprints: Sequence[Mapping[str, str]]) -> int:
    """Which plan's unfinished work is at the output; the first where there is none, or something else's, which opening it refuses."""
    if (found := output.read(JOURNAL)) is not None:
        state = decode(found[0], output.uri)
        for number, fingerprint in enumerate(fingerprints):
            if set(differing(state.fingerprint, fingerprint)) <= {"device"}:
                return number
    return 0


def missed(rung: Rung, verdicts: Sequence[Verdict], evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What is remembered of a plan that did not keep what it should."""
    return {
        "plan": rung.name,
        "perplexityIncrease": evaluation["perplexityIncrease"],
        "kl": evaluation["kl"],
        "met": all(v["met"] for v in verdicts),
        "says": "; ".join(v["says"] for v in verdicts),
    }


def step(journal: Journal, before: Rung, after: Rung, bound: Mapping[str, str], left: Sequence[str] = ()) -> None:
    """From a plan that was missed, which the journal says, to the next. Findings of surveys that both make of the same are kept.
    `left`: working objects that nothing needs any more."""
    state = journal.state
    for upload in state.uploads:
        journal.output.abort(upload.name, upload.id)
    journal.output.delete([*left, *journal.records(len(before.assigned.layout.units))])
    kept = state.surveys if same_surveys(before.assigned, after.assigned) else 0
    journal.commit(State(dict(bound), state.owner, surveys=kept, tries=state.tries, job=state.job))
    journal.resumed_from = None


def same_surveys(before: Assignment, after: Assignment) -> bool:
    """Whether all that the second's surveys would find was found for the first: by the same passes at the same places, on the same rows
    through the same source."""
    old = list(before.spec.passes)
    wanted = [(i, entry) for i, (entry, p) in enumerate(zip(after.spec.passes, after.passes, strict=True)) if p.surveys]
    return all(i < len(old) and old[i] == entry for i, entry in wanted)


def with_miss(journal: Journal, miss: Mapping[str, Any]) -> None:
    journal.commit(replace(journal.state, tries=(*journal.state.tries, dict(miss)), publishing=False))
