"""The section of report.html on schemes that were chosen under a budget: which, why, and what other budgets would have cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kompressor_worker.report_plots import curve, heat, percent
from kompressor_worker.report_sections import LISTED, NUMBERED, card, folded, number, size, table

__all__ = ["schemes"]


def schemes(found: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """`found`: AutoScheme.described(), nothing where nobody chose; `evaluation`: evaluate.Evaluation.summary()."""
    if not found:
        return ""
    groups: Sequence[Mapping[str, Any]] = found.get("groups", ())
    sub = (
        f"{size(found['bytes'])} of a budget of {size(found['budgetBytes'])}; {len(groups)} groups that loaders hold as one, each "
        f"in the one of {', '.join(found.get('candidates', ()))} that an integer program chose by what it costs."
    )
    return card("Adaptive bits", sub, _curve(found, evaluation) + _plans(found.get("plans", ())) + _map(groups) + _table(groups))


def _curve(found: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """Size against perplexity: what the KL in nats a token, to which costs add up, makes of it in a model that knows its text."""
    points = [(float(nbytes), math.expm1(kl)) for nbytes, kl in found.get("sweep", ())]
    chosen = math.expm1(found["predictedKl"])
    marks = [(float(found["bytes"]), chosen, "second", f"chosen, {size(found['bytes'])}: {percent(chosen)} predicted")]
    says = f"Chosen: {size(found['bytes'])}, predicted to raise perplexity by {percent(chosen)}"
    if "kl" in evaluation and evaluation["kl"] > 0:
        measured = math.expm1(evaluation["kl"])
        after = f", perplexity {number(evaluation['perplexityAfter'])}" if "perplexityAfter" in evaluation else ""
        marks.append((float(found["bytes"]), measured, "bad", f"measured, {size(found['bytes'])}: {percent(measured)}{after}"))
        says += f"; measured KL {number(evaluation['kl'], 3)}, which is {percent(measured)}{after}"
    plot = curve(points, marks, size, percent)
    return f"<h3>Size against perplexity</h3>{plot}<p>{says}.</p>" if plot else ""


def _plans(plans: Sequence[Mapping[str, Any]]) -> str:
    """Whole plans that were tried together, by their KL."""
    tried = sorted((plan for plan in plans if "kl" in plan), key=lambda plan: float(plan["kl"]))
    rows = [(str(p["name"]), size(p["bytes"]), number(p["predictedKl"], 3), number(p["kl"], 3)) for p in tried]
    head = ("Plan", "Size", "Costs add up to", "Measured KL")
    return "<h3>Whole plans, measured on calibration rows</h3>" + table(head, rows, (1, 2, 3)) if rows else ""


def _map(groups: Sequence[Mapping[str, Any]]) -> str:
    cells: dict[tuple[str, str], tuple[float, str]] = {}
    for group in groups:
        if match := NUMBERED.fullmatch(str(group["name"])):
            says = f"{group['name']}: {group['scheme']}, {number(group['bits'])} bits a weight"
            cells[match["kind"], match["block"]] = (float(group["bits"]), says)
    kinds, blocks = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    if len(kinds) > LISTED:  # experts, each by itself
        return ""
    return "<h3>Bits a weight</h3>" + heat(cells, kinds, blocks, lambda bits: f"{bits:.3g}") if cells else ""


def _table(groups: Sequence[Mapping[str, Any]]) -> str:
    """The most sensitive first, by what the smallest candidate would cost."""
    worst = {str(g["name"]): max(g["costs"].values(), default=0.0) for g in groups}
    order = sorted(groups, key=lambda g: -worst[str(g["name"])])[:LISTED]
    rows = [
        (
            str(g["name"]),
            str(g["scheme"]),
            f"{g['bits']:.4g}",
            size(g["bytes"]),
            number(g["costs"][g["scheme"]], 3),
            ", ".join(f"{name} {number(cost, 3)}" for name, cost in g["costs"].items() if name != g["scheme"]),
        )
        for g in order
    ]
    head = ("Group", "Scheme", "Bits", "Size", "Cost", "The others would cost")
    count = f"({len(groups):,})" if len(rows) == len(groups) else f"({len(rows)} of {len(groups):,})"
    return folded(f"Groups, most sensitive first {count}; costs are nats a token", table(head, rows, (2, 3, 4)))
