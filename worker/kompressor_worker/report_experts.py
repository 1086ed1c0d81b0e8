"""Which experts went or became one, by layer, in report.html's section on the shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kompressor_worker.report_plots import heat, percent
from kompressor_worker.report_sections import folded, number, table

MEASURES = {"reap": "mean of gate times norm of the output", "frequency": "share of the routed tokens"}


def experts(structure: Mapping[str, Any]) -> str:
    passes = structure.get("passes", {})
    return _pruned(passes.get("pruneExperts", {})) + _merged(passes.get("mergeExperts", {}))


def _pruned(chosen: Mapping[str, Any]) -> str:
    """A map of blocks by experts, each block on a scale of its own: what it says is which of its experts went."""
    layers: Mapping[str, Mapping[str, Any]] = chosen.get("layers", {})
    if not layers:
        return ""
    cells, gone = dict[tuple[str, str], tuple[float, str]](), set[tuple[str, str]]()
    for layer, found in layers.items():
        most = max(found["scores"]) or 1.0
        for expert, (score, tokens) in enumerate(zip(found["scores"], found["tokens"], strict=True)):
            cells[layer, str(expert)] = (score / most, f"block {layer}, expert {expert}, {tokens} tokens, {number(score, 3)}")
        gone |= {(layer, str(expert)) for expert in found["gone"]}
    few = [(layer, f"{len(found['few'])}: {_list(found['few'])}") for layer, found in layers.items() if found["few"]]
    title = f"<h3>Importance of each expert ({MEASURES[chosen['importance']]}) beside the greatest of its block; framed: gone</h3>"
    plot = heat(cells, list(layers), [str(n) for n in range(max(len(found["scores"]) for found in layers.values()))], percent, framed=gone)
    said = f"Experts that fewer than {chosen['minTokens']} calibration tokens were routed to, in {len(few)} blocks"
    return title + plot + (folded(said, table(("Block", "Experts"), few)) if few else "")


def _merged(chosen: Mapping[str, Any]) -> str:
    """A table, a line for each cluster."""
    layers: Mapping[str, Mapping[str, Any]] = chosen.get("layers", {})
    lines = [
        (layer, _list(members), _list([found["tokens"][member] for member in members]))
        for layer, found in layers.items()
        for members in found["merged"]
    ]
    if not lines:
        return ""
    title = "<h3>Experts that became one, the one with the most calibration tokens first</h3>"
    return title + folded(f"{len(lines)} clusters in {len(layers)} blocks", table(("Block", "Experts", "Tokens routed to each"), lines))


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
