"""The section of report.html on a training: loss curves, evaluations on the way, and how much of what was lost has come back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kompressor_worker.report_plots import lines, percent
from kompressor_worker.report_sections import card, duration, folded, number, table

__all__ = ["training"]

CURVES = (("loss", "Loss of a step"), ("divergence", "divergence from the teacher"), ("crossEntropy", "cross-entropy"))


def training(found: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """`found`: Distilling.section(), nothing without a training; `evaluation`: evaluate.Evaluation.summary() of the result."""
    if not found:
        return ""
    best = f"; the student of step {found['bestStep']:,} is published" if found["bestStep"] != found["steps"] else ""
    stopped = f", stopped early ({found['stopped']})" if found.get("stopped") else ""
    many = max(found.get("processes") or [1])
    together = f" by {many} processes" if many > 1 else ""
    sub = (
        f"{found['steps']:,} steps on {found['tokens']:,} tokens in {duration(found['seconds'])}{together}{stopped}{best}. "
        f"Teacher: {found['teacher']}"
    )
    return card("Training", sub, _gained(found, evaluation) + _curves(found) + _evaluations(found.get("evaluations", ())))


def _gained(found: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    before, shares = found.get("before"), found.get("recovered", {})
    if not before or not after:
        return ""
    original = number(before["perplexityBefore"])
    rows = [
        ("Perplexity", original, number(before["perplexityAfter"]), number(after["perplexityAfter"]), _share(shares.get("perplexity"))),
        ("KL divergence", "0", number(before["kl"], 3), number(after["kl"], 3), _share(shares.get("kl"))),
        ("Same next token", percent(1.0), percent(before["topOneAgreement"]), percent(after["topOneAgreement"]), ""),
    ]
    return table(("", "Original", "Before training", "After", "Recovered"), rows, (1, 2, 3, 4))


def _share(share: float | None) -> str:
    return "" if share is None else percent(share)


def _curves(found: Mapping[str, Any]) -> str:
    curve: Sequence[Mapping[str, float]] = found.get("curve", ())
    drawn = {says: [(point["step"], point[key]) for point in curve if key in point] for key, says in CURVES}
    losses = lines({says: points for says, points in drawn.items() if points}, _step, lambda y: number(y, 3))
    held = {"on rows held out, KL": [(e["step"], e["kl"]) for e in found.get("evaluations", ()) if "kl" in e]}
    watched = lines(held, _step, lambda y: number(y, 3), marked=found["bestStep"])
    rates = lines({"learning rate": [(p["step"], p["learningRate"]) for p in curve if "learningRate" in p]}, _step, lambda y: number(y, 2))
    return (
        (f"<h3>Loss by step, nats a token</h3>{losses}" if losses else "")
        + (f"<h3>Divergence from the teacher on rows held out, nats a token</h3>{watched}" if watched else "")
        + folded("Learning rate", rates)
    )


def _step(step: float) -> str:
    return f"{step:,.0f}"


def _evaluations(evaluations: Sequence[Mapping[str, float]]) -> str:
    rows = [(f"{e['step']:,}", number(e["kl"], 3), number(e["crossEntropy"], 4), percent(e["agreement"])) for e in evaluations if "kl" in e]
    head = ("Step", "KL", "Cross-entropy", "Same next token")
    return folded(f"Evaluations on rows held out ({len(rows)})", table(head, rows, (0, 1, 2, 3)))
