"""The section of report.html on a result of another shape: what went, why, and what that cost. Experts: report_experts.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kompressor_worker.architectures import EXPERT_COUNTS
from kompressor_worker.report_experts import experts
from kompressor_worker.report_plots import columns, heat, percent
from kompressor_worker.report_sections import card, number, table

COUNTED = {
    "num_hidden_layers": "Blocks",
    "num_attention_heads": "Query heads",
    "num_key_value_heads": "KV heads",
    "hidden_size": "Channels",
    **dict.fromkeys(EXPERT_COUNTS, "Experts of a layer"),
    "num_experts_per_tok": "Experts that a token is routed to",
}
WIDTHS = {"intermediate_size": "Neurons of a feed-forward", "moe_intermediate_size": "Neurons of an expert"}
MEASURES = {"influence": "1 - cosine of a block's input and output", "divergence": "KL of the logits without the block"}


def shape(structure: Mapping[str, Any]) -> str:
    if not structure:
        return ""
    return card(
        "Shape",
        "The result is an ordinary model of other sizes.",
        _sizes(structure) + _layers(structure) + experts(structure) + _blocks(structure),
    )


def _sizes(structure: Mapping[str, Any]) -> str:
    named = {**COUNTED, **WIDTHS}
    pairs = [(named.get(name, name), *pair) for name, pair in structure.get("sizes", {}).items()]
    pairs += [
        (name, *structure[key])
        for name, key in (("Parameters", "parameters"), ("Multiply-adds a token", "multiplyAddsPerToken"))
        if key in structure
    ]
    rows = [(name, f"{before:,}", f"{after:,}", percent(1 - after / before)) for name, before, after in pairs if before]
    return table(("", "Before", "After", "Less by"), rows, (1, 2, 3))


def _layers(structure: Mapping[str, Any]) -> str:
    chosen = structure.get("passes", {}).get("pruneLayers")
    if not chosen:
        return ""
    gone = [str(layer) for layer in chosen["layers"]]
    points = [(str(layer), max(0.0, score)) for layer, score in enumerate(chosen["scores"])]
    mapped = f" A linear map in block {', '.join(map(str, chosen['mapped']))} stands in for those after it." if chosen["mapped"] else ""
    title = f"<h3>Blocks that went: {', '.join(gone)}. {MEASURES.get(chosen['measure'], '')}.{mapped}</h3>"
    return title + columns(points, lambda x: number(x, 3), over=gone, height=130)


def _blocks(structure: Mapping[str, Any]) -> str:
    """What taking columns away cost each linear that read them: a map of linears by blocks."""
    cells, blocks = {}, list(structure.get("blocks", {}))
    rows: list[str] = []
    for block in blocks:
        for linear, note in structure["blocks"][block].items():
            row = linear.removeprefix(f"{block}.")
            rows += [] if row in rows or ".experts." in row else [row]
            cells[row, block] = (float(note["error"]), _says(linear, note))
    if not rows:
        return ""
    return "<h3>Relative error of the output of linears that lost columns or rows, on the calibration data</h3>" + heat(
        cells, rows, blocks, percent
    )


def _says(linear: str, note: Mapping[str, Any]) -> str:
    words: Sequence[str] = [f"{linear}, {note.get('by', '')}"]
    if "kept" in note:
        words = [*words, f"{note['kept']} of {note['of']} kept"]
    if "uncorrected" in note:
        words = [*words, f"{percent(note['uncorrected'])} without the correction"]
    return ", ".join(words)
