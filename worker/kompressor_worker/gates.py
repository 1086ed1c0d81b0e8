"""Is the result good enough? `spec.evaluation.gates` against what evaluation measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from kompressor_api.datasets import Gate
from kompressor_worker.errors import GateFailed

REMEDY = (
    "choose a scheme with more bits or smaller groups, a calibrated pass (gptq, awq) or more calibration samples, "
    "or a wider limit in spec.evaluation.gates; "
)


class Verdict(TypedDict):
    metric: str
    """perplexity: by how much it rose, 0.03 for 3 %; kl: nats a token."""
    value: float
    limit: float
    met: bool
    says: str
    """The verdict in words."""


def check(gates: Sequence[Gate], evaluation: Mapping[str, Any]) -> list[Verdict]:
    """One verdict a gate, in order. `evaluation` is evaluate.Evaluation.summary(). A value at its limit is met, NaN never."""
    return [_verdict(gate, evaluation) for gate in gates]


def enforce(
    verdicts: Sequence[Verdict],
    result: Mapping[str, Any] | None = None,
    report: str | None = None,
    published: bool = False,
    tried: Sequence[str] = (),
) -> None:
    """Raises GateFailed, one line for all gates that are not met, with what was measured (`result`) and where more stands (`report`).
    `published`: the output holds this result from an earlier job. `tried`: a target's plans, and what was measured of each."""
    if failed := [v["says"] for v in verdicts if not v["met"]]:
        after = "the result of an earlier job with other gates stays published" if published else "nothing was published"
        where = f"; all that was measured: {report}" if report else ""
        if tried:
            remedy = "no safer plan that fits is left to try; raise target.maxPerplexityIncrease, or ask for less context or a larger GPU"
            raise GateFailed(f"target: every plan missed: {' | '.join(tried)}: {remedy}; {after}{where}", result)
        raise GateFailed(f"evaluation: {'; '.join(failed)}: {REMEDY}{after}{where}", result)


def status(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """`check`'s answer as `status.result` has it."""
    written: dict[str, Callable[[float], str]] = {"perplexity": lambda x: f"{100 * x:.4g}%", "kl": lambda x: f"{x:.4g}"}
    return [
        {"metric": v["metric"], "value": written[v["metric"]](v["value"]), "limit": written[v["metric"]](v["limit"]), "met": v["met"]}
        for v in verdicts
    ]


def _verdict(gate: Gate, evaluation: Mapping[str, Any]) -> Verdict:
    if gate.metric == "perplexity":
        value, before, after = (float(evaluation[f"perplexity{k}"]) for k in ("Increase", "Before", "After"))
        says = f"perplexity rises by {_percent(value)} (from {before:.5g} to {after:.5g})"
        allowed = _percent(gate.limit)
    else:
        value = float(evaluation["kl"])
        says, allowed = f"the logits' mean KL divergence is {value:.4g} nats a token", f"{gate.limit:.4g}"
    return Verdict(metric=gate.metric, value=value, limit=gate.limit, met=value <= gate.limit, says=f"{says}, allowed are {allowed}")


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
