"""Is the result good enough? `spec.evaluation.gates` against what evaluation measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from kompressor_api.datasets import RUNTIME_METRICS, Gate
from kompressor_api.quantity import readable
from kompressor_worker.errors import GateFailed

REMEDY = "choose a scheme with more bits or smaller groups, a calibrated pass (gptq, awq) or more calibration samples, "
RUNTIME_REMEDY = "choose a scheme with fewer bits, a pass that makes the model smaller, other hardware or smaller batches, "
WIDER = "or a wider limit in spec.evaluation.gates; "


class Verdict(TypedDict):
    metric: str
    """perplexity: by how much it rose, 0.03 for 3 %; kl: nats a token; latency: seconds; memory: bytes."""
    value: float
    limit: float
    met: bool
    says: str
    """The verdict in words."""


def quality(gates: Sequence[Gate]) -> list[Gate]:
    """Those that are judged by evaluation alone, before an engine is started."""
    return [gate for gate in gates if gate.metric not in RUNTIME_METRICS]


def check(gates: Sequence[Gate], evaluation: Mapping[str, Any], runtime: Mapping[str, Any] | None = None) -> list[Verdict]:
    """One verdict a gate, in order. `evaluation` is evaluate.Evaluation.summary(), `runtime` runtime.measure.timed(). A value at its limit
    is met, NaN never."""
    return [_verdict(gate, evaluation, runtime or {}) for gate in gates]


def enforce(
    verdicts: Sequence[Verdict],
    result: Mapping[str, Any] | None = None,
    report: str | None = None,
    published: bool = False,
    tried: Sequence[str] = (),
) -> None:
    """Raises GateFailed, one line for all gates that are not met, with what was measured (`result`) and where more stands (`report`).
    `published`: the output holds this result from an earlier job. `tried`: a target's plans, and what was measured of each."""
    missed = [v for v in verdicts if not v["met"]]
    if missed:
        after = "the result of an earlier job with other gates stays published" if published else "nothing was published"
        where = f"; all that was measured: {report}" if report else ""
        slow = [v for v in missed if v["metric"] in RUNTIME_METRICS]
        if tried and len(slow) < len(missed):
            remedy = "no safer plan that fits is left to try; raise target.maxPerplexityIncrease, or ask for less context or a larger GPU"
            raise GateFailed(f"target: every plan missed: {' | '.join(tried)}: {remedy}; {after}{where}", result)
        remedy = (REMEDY if len(slow) < len(missed) else RUNTIME_REMEDY) + WIDER
        raise GateFailed(f"evaluation: {'; '.join(v['says'] for v in missed)}: {remedy}{after}{where}", result)


def status(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """`check`'s answer as `status.result` has it."""
    written: dict[str, Callable[[float], str]] = {
        "perplexity": lambda x: f"{100 * x:.4g}%",
        "kl": lambda x: f"{x:.4g}",
        "latency": lambda x: f"{x:.4g}s",
        "memory": lambda x: f"{x:.0f}",
    }
    return [
        {"metric": v["metric"], "value": written[v["metric"]](v["value"]), "limit": written[v["metric"]](v["limit"]), "met": v["met"]}
        for v in verdicts
    ]


def _verdict(gate: Gate, evaluation: Mapping[str, Any], runtime: Mapping[str, Any]) -> Verdict:
    if gate.metric == "perplexity":
        value, before, after = (float(evaluation[f"perplexity{k}"]) for k in ("Increase", "Before", "After"))
        says = f"perplexity rises by {_percent(value)} (from {before:.5g} to {after:.5g})"
        allowed = _percent(gate.limit)
    elif gate.metric == "kl":
        value = float(evaluation["kl"])
        says, allowed = f"the logits' mean KL divergence is {value:.4g} nats a token", f"{gate.limit:.4g}"
    elif gate.metric == "latency":
        slowest = max(runtime["after"]["batches"], key=lambda each: each["latency"])
        value, allowed = float(slowest["latency"]), f"{gate.limit:.4g} s"
        says = f"a request takes {value:.4g} s in a batch of {slowest['batch']}, served by {runtime['engine']}"
    else:
        value, allowed = float(runtime["after"]["peakBytes"]), readable(round(gate.limit))
        says = f"{runtime['engine']} takes {readable(round(value))} of the {runtime['memoryOf']}'s memory"
    return Verdict(metric=gate.metric, value=value, limit=gate.limit, met=value <= gate.limit, says=f"{says}, allowed are {allowed}")


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
