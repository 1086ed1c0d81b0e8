"""Plans that change the model before its weights are quantised, where this model and this release know them."""

from __future__ import annotations

from kompressor_api.v1alpha1 import CompressionJobSpec
from kompressor_worker.architectures import FAMILIES, text_config
from kompressor_worker.layout import ModelLayout
from kompressor_worker.passes import REGISTRY
from kompressor_worker.target.candidates import Reduction
from kompressor_worker.windows import windows_of

WINDOW = 4096
"""Tokens that a layer with a window sees, at most; half of a calibration row and a quarter of the context, if that is less."""
SMALLEST_WINDOW = 64
FULL_SHARES = ((2, 0.01), (4, 0.02))
"""Of the layers that see everything one of so many goes on to, and the expected loss."""
EXPERTS = ((0.25, 0.05), (0.5, 0.15))
"""Share of the experts that goes, and the expected loss."""


def reductions(source: ModelLayout, spec: CompressionJobSpec) -> list[Reduction]:
    return [*_windows(source, spec), *_experts(source)]


def _windows(source: ModelLayout, spec: CompressionJobSpec) -> list[Reduction]:
    """For contexts of several windows. A model that has windows already keeps their size, since config.json has one for all."""
    layers = text_config(source.config).get("num_hidden_layers")
    if "hybridAttention" not in REGISTRY or type(layers) is not int or source.family is None:
        return []
    assert spec.target is not None
    now = windows_of(source.config, FAMILIES[source.family], layers)
    full, there = now.count(None), {window for window in now if window is not None}
    shown = spec.calibration.sequence_length if spec.calibration is not None else 2 * WINDOW
    window = next(iter(there), None) or min(WINDOW, _power_below(min(shown // 2, spec.target.context // 4)))
    if window < SMALLEST_WINDOW or 2 * window > spec.target.context:
        return []
    return [
        Reduction(
            f"windows of {window} in {full - full // every} layers",
            ({"hybridAttention": {"window": window, "fullLayers": full // every, "context": spec.target.context}},),
            loss,
        )
        for every, loss in FULL_SHARES
        if full // every
    ]


def _experts(source: ModelLayout) -> list[Reduction]:
    routed = any(x.kind == "router" for stage in source.stages() for x in stage.linears)
    if "pruneExperts" not in REGISTRY or not routed:
        return []
    return [Reduction(f"{ratio:.0%} of the experts less", ({"pruneExperts": {"ratio": ratio}},), loss) for ratio, loss in EXPERTS]


def _power_below(tokens: int) -> int:
    return 1 << (tokens.bit_length() - 1) if tokens > 0 else 0
