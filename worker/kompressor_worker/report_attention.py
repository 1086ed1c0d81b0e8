"""The section of report.html on attention: what each layer would lose by a window, which of them keep seeing everything, and the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kompressor_worker.report_plots import columns, percent
from kompressor_worker.report_sections import card, folded, number, size, table

MEASURES = {
    "divergence": "KL of the logits, in nats a token, with a window in this layer alone",
    "blockError": "relative error of the block's output with a window in it",
}


def attention(found: Mapping[str, Any]) -> str:
    """`found`: kv_memory.section()."""
    return card("Attention and its cache", "", _cache(found.get("kvCache", {})) + _layers(found.get("windows", {})))


def _cache(kv: Mapping[str, Any]) -> str:
    if not kv:
        return ""
    (before, after), (full_before, full_after) = kv["bytes"], kv["fullLayers"]
    each = [size(x) for x in kv["bytesPerToken"]]
    rows = [
        ("KV cache a token", *each, percent(1 - after / before)),
        (f"KV cache of {kv['context']:,} tokens", size(before), size(after), percent(1 - after / before)),
        ("Layers with full attention", str(full_before), str(full_after), percent(1 - full_after / max(1, full_before))),
    ]
    return table(("", "Before", "After", "Less by"), rows, (1, 2, 3))


def _layers(chosen: Mapping[str, Any]) -> str:
    """A column a layer of the source, for both measures; those that keep full attention stand out."""
    plots, kept = "", [str(layer) for layer in chosen.get("sourceLayers", ())]
    for measure in (name for name in MEASURES if name in chosen.get("scores", {})):
        points = [(str(layer), max(0.0, score)) for layer, score in enumerate(chosen["scores"][measure])]
        decided = ", by which was chosen" if measure == chosen["measure"] else ""
        say = percent if measure == "blockError" else lambda x: number(x, 3)
        plots += f"<h3>By layer: {MEASURES[measure]}{decided}</h3>" + columns(points, say, over=kept, height=130)
    if not plots:
        return ""
    return (
        f"<h3>Full attention stays in layers {', '.join(kept)} (in the other colour); the others see {chosen['window']:,} tokens</h3>"
        + plots
        + _tried(chosen.get("tried", ()))
    )


def _tried(sets: Sequence[Mapping[str, Any]]) -> str:
    """Sets of layers that were tried together, the one that stays first."""
    rows = [(", ".join(map(str, each["sourceLayers"])), number(each["kl"], 3)) for each in sorted(sets, key=lambda each: float(each["kl"]))]
    head = ("Full attention in", "KL, nats a token")
    return folded(f"Sets of layers that were tried together ({len(rows)})", table(head, rows, (1,))) if rows else ""
