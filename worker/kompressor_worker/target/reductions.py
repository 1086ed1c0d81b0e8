"""Plans that change the model before its weights are quantised, where this model and this release know them."""

from __future__ import annotations

from kompressor_worker.architectures import text_config
from kompressor_worker.layout import ModelLayout
from kompressor_worker.passes import REGISTRY
from kompressor_worker.target.candidates import Reduction

WINDOW = 4096
"""Tokens that a windowed layer looks back."""
FULL_SHARES = ((2, 0.01), (4, 0.02))
"""One layer of so many keeps full attention, and the expected loss."""
EXPERTS = ((0.25, 0.05), (0.5, 0.15))
"""Share of the experts that goes, and the expected loss."""


def reductions(source: ModelLayout, context: int) -> list[Reduction]:
    return [*_windows(source, context), *_experts(source)]


def _windows(source: ModelLayout, context: int) -> list[Reduction]:
    layers = text_config(source.config).get("num_hidden_layers")
    if "hybridAttention" not in REGISTRY or type(layers) is not int or context <= 2 * WINDOW:
        return []
    return [
        Reduction(
            f"windows of {WINDOW:,} in {layers - layers // every} of {layers} layers",
            ({"hybridAttention": {"window": WINDOW, "fullLayers": layers // every}},),
            loss,
        )
        for every, loss in FULL_SHARES
        if layers // every
    ]


def _experts(source: ModelLayout) -> list[Reduction]:
    routed = any(x.kind == "router" for stage in source.stages() for x in stage.linears)
    if "pruneExperts" not in REGISTRY or not routed:
        return []
    return [Reduction(f"{ratio:.0%} of the experts less", ({"pruneExperts": {"ratio": ratio}},), loss) for ratio, loss in EXPERTS]
