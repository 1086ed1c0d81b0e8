"""The section of report.html on serving: how fast and in how much memory an engine ran both models, and what a target had predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from kompressor_worker.report_plots import pairs, percent
from kompressor_worker.report_sections import card, number, size, table

FIGURES = (
    ("firstToken", "Time to first token", lambda x: f"{number(1000 * x)} ms"),
    ("latency", "Request, to its last token", lambda x: f"{number(x)} s"),
    ("tokensPerSecond", "Tokens a second while decoding", number),
    ("costPerMillionTokens", "A million generated tokens", number),
)

PRICED = ("costPerMillionTokens",)


def runtime(found: Mapping[str, Any], target: Mapping[str, Any]) -> str:
    """`found`: the report's `runtime`; `target`: ladder.Ladder.section, of a job that has one."""
    if not found:
        return ""
    if "failed" in found:
        return card("Serving", f"{found['engine']} measured nothing.", f"<p>{escape(found['failed'])}</p>")
    before, after = ({each["batch"]: each for each in found[when]["batches"]} for when in ("before", "after"))
    turns = "in turns" if found["inTurns"] else "one after the other"
    sub = (
        f"Measured with {found['engine']} on {found['device']}: prompts of {found['prompt']:,} tokens, {found['generate']:,} generated, "
        f"medians of {found['rounds']} rounds after a warm-up, original and result {turns}. All requests of a batch come at once."
    )
    body = _pictures(before, after) + _figures(found, before, after) + _memory(found)
    return card("Serving", sub, body + _predicted(found, target.get("predicted", ()), target, before, after))


def _pictures(before: Mapping[int, Any], after: Mapping[int, Any]) -> str:
    plots = ""
    for key, title, say in FIGURES[:3:2]:
        points = [(f"batch {batch}", before[batch][key], after[batch][key]) for batch in after]
        plots += f"<h3>{title}: original, result</h3>" + pairs(points, say)
    return plots


def _figures(found: Mapping[str, Any], before: Mapping[int, Any], after: Mapping[int, Any]) -> str:
    rows = []
    for key, title, say in FIGURES:
        words = (
            f"{title}, at {number(found['pricePerHour'])} an hour" if key == "costPerMillionTokens" and "pricePerHour" in found else title
        )
        rows += [
            (words, str(batch), say(before[batch][key]), say(after[batch][key]), _change(before[batch][key], after[batch][key]))
            for batch in after
            if key in after[batch]
        ]
    return table(("", "Batch", "Original", "Result", "Change"), rows, (1, 2, 3, 4))


def _memory(found: Mapping[str, Any]) -> str:
    rows = [
        (words, size(found["before"][key]), size(found["after"][key]), _change(found["before"][key], found["after"][key]))
        for key, words in (
            ("weightBytes", "Tensors"),
            ("peakBytes", f"Peak of the {found['memoryOf']}'s memory, engine and cache included"),
        )
    ]
    return "<h3>Size and memory</h3>" + table(("", "Original", "Result", "Change"), rows, (1, 2, 3))


def _predicted(
    found: Mapping[str, Any],
    predicted: Sequence[Mapping[str, Any]],
    target: Mapping[str, Any],
    before: Mapping[int, Any],
    after: Mapping[int, Any],
) -> str:
    rows = [
        (when, str(each["batch"]), number(each[key]), number(sides[each["batch"]]["tokensPerSecond"]))
        for when, key, sides in (("Original", "before", before), ("Result", "after", after))
        for each in predicted
        if each["batch"] in sides
    ]
    if not rows:
        return ""
    head = ("Tokens a second", "Batch", f"Predicted for {target['gpu']}, by roofline", f"Measured on {found['device']}")
    return "<h3>Predicted and measured</h3>" + table(head, rows, (1, 2, 3))


def _change(before: float, after: float) -> str:
    if not before:
        return ""
    return f"{'+' if after >= before else '-'}{percent(abs(after / before - 1))}"
