"""The section of report.html on a target: what was tried, what the result takes and gives on its GPU, and the plans there were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kompressor_worker.report_plots import percent
from kompressor_worker.report_sections import card, folded, number, size, table

PARTS = ("weights", "kv", "activations", "overhead", "reserve")
NAMES = dict(zip(PARTS, ("Weights", "KV cache", "Activations", "Overhead, assumed", "Left free"), strict=True))


def target(found: Mapping[str, Any]) -> str:
    """`found`: ladder.Ladder.section."""
    if not found:
        return ""
    sub = (
        f"{found['chosen']} on {found['gpu']} ({size(found['memoryBytes'])}), context {found['context']:,}, concurrency "
        f"{found['concurrency']:,}. Tokens a second are predicted by a roofline, which no server reaches."
    )
    return card("Target", sub, _tries(found["tries"]) + _memory(found) + _decode(found) + _plans(found))


def _tries(tries: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        ("✓ kept" if one["met"] else "✕ missed", one["plan"], percent(one["perplexityIncrease"]), number(one["kl"], 3)) for one in tries
    ]
    return "<h3>Plans that were carried out</h3>" + table(("", "Plan", "Perplexity rose by", "KL"), rows, (2, 3))


def _memory(found: Mapping[str, Any]) -> str:
    need, memory = found["need"], found["memoryBytes"]
    rows = [(NAMES[part], size(need[part]), percent(need[part] / memory)) for part in PARTS]
    rows.append(("Together", size(need["total"]), percent(need["total"] / memory)))
    return "<h3>Memory, by the plan</h3>" + table(("", "Bytes", "Of all"), rows, (1, 2))


def _decode(found: Mapping[str, Any]) -> str:
    before, after = found["before"], found["after"]
    rows = [
        ("Read for a token", size(before["bytesPerToken"]), size(after["bytesPerToken"])),
        ("Tokens a second, predicted", number(before["tokensPerSecond"]), number(after["tokensPerSecond"])),
    ]
    if "costPerMillionTokens" in after:
        price = f"Cost of a million tokens at {number(found['pricePerHour'])} an hour, predicted"
        rows.append((price, number(before["costPerMillionTokens"]), number(after["costPerMillionTokens"])))
    return "<h3>Decoding, all requests together</h3>" + table(("", "Original", "Result"), rows, (1, 2))


def _plans(found: Mapping[str, Any]) -> str:
    rows = []
    for plan in found["plans"]:
        if "refused" in plan:
            rows.append(("", plan["plan"], "", "", "", f"not here: {plan['refused']}"))
            continue
        expected = f"+{percent(plan['expectedIncrease'])}"
        fits = "✓ fits" if plan["fits"] else "✕"
        rows.append((fits, plan["plan"], size(plan["totalBytes"]), number(plan["tokensPerSecond"]), expected, ""))
    head = ("", "Plan", "Memory", "Tokens/s", "Expected loss", "")
    return folded(f"All plans ({len(rows):,})", table(head, rows, (2, 3, 4)))
