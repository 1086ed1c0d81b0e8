"""Round to nearest: each weight on the grid of its own range, without data.

The baseline of every paper on quantisation, and near lossless at 8 bits. What it may quantise is decided from headers,
where every request that a loader could not read is refused. Only where inputs are to have a static scale is there something to calibrate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from kompressor_api.v1alpha1 import Model
from kompressor_worker.errors import BadNumerics, UserError
from kompressor_worker.formats.gguf_mixes import MIXES
from kompressor_worker.passes import Pass
from kompressor_worker.passes.asked_scheme import asked_schemes
from kompressor_worker.passes.inputs import InputParams, input_tensors, needed_statistics
from kompressor_worker.passes.linear_params import GgufMix, LinearParams
from kompressor_worker.passes.selection import select
from kompressor_worker.schemes import SCHEMES, Scheme

if TYPE_CHECKING:
    import torch

    from kompressor_worker.block import Encoded, Stage
    from kompressor_worker.kernels import Quantized
    from kompressor_worker.kernels.pieces import Heard
    from kompressor_worker.layout import LinearLayout, ModelLayout

SchemeName = Literal[
    "W8A8", "W8A8_STATIC", "W8A8_STATIC_ASYM", "W8A16", "W4A16", "W4A16_ASYM", "W3A16", "W2A16", "W2A16_ASYM",
    "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4", "NVFP4A16", "NVFP4",
    "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q4_0", "BF16", "F16",
]  # fmt: skip


class RtnParams(LinearParams, InputParams):
    """Round to nearest: quantises weights as they are; calibration data only where inputs get a static scale."""

    scheme: Literal[SchemeName, GgufMix, "MXFP4_MOE"] = Field(
        description=(
            "W8A16 to W2A16: packed integers, weights only; behind 2 bits belongs a recover. W8A8: INT8, activations per token; _STATIC: "
            "by one calibrated scale, _ASYM: with a zero point. FP8: one scale each; _DYNAMIC: per channel and token; _BLOCK: 128x128. "
            "MXFP4, NVFP4A16: weights only; NVFP4: activations too. GGUF: MXFP4, Q8_0 to F16, weighted with the calibration, if any."
        )
    )
    observer: Literal["minmax", "mse"] = Field(
        default="minmax",
        description=(
            "Range of weights: their own, or (integers) the part of it with the least squared rounding error, at twenty times the work."
        ),
    )


class Rtn(Pass):
    """The pass `rtn`."""

    Params: ClassVar[type[Model]] = RtnParams

    def __init__(self, params: RtnParams) -> None:
        self.params = params
        scheme = SCHEMES.get(params.scheme)
        self.statistics = frozenset() if scheme is None else needed_statistics(scheme, params)
        self.welcomes = frozenset({"norms", "means"}) if params.scheme in MIXES and params.scheme not in ("F16", "BF16") else frozenset()
        self._assigned: dict[str, Scheme] = {}

    def assign(self, layout: ModelLayout, taken: Mapping[str, Scheme]) -> dict[str, Scheme]:
        """Linear name to scheme, from headers alone. Raises UserError that names the tensor, the value and the
        remedy."""
        chosen = select(layout, taken, self.params.targets, self.params.ignore)
        schemes = asked_schemes(layout, chosen, self.params.scheme, self.params.group_size, "rtn")
        steady = all(scheme.type == "int" and scheme.format != "gguf" for scheme in schemes.values())
        if self.params.observer == "mse" and not steady:
            raise UserError(f"rtn: observer mse with scheme {self.params.scheme}, whose steps grow with the values; leave observer out")
        return self.take(schemes)

    def take(self, schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
        """These linears, by name, each in its scheme: what `assign` answers where nobody else decides them."""
        self._assigned = dict(schemes)
        return dict(self._assigned)

    def apply(self, stage: Stage) -> None:
        """Encodes this stage's linears in `assign`'s answer. Raises BadNumerics that names the tensor and counts its
        NaN and Inf."""
        linears = [linear for linear in stage.layout.linears if linear.name in self._assigned]
        shared = _shared(stage, linears, self._assigned)
        inputs = input_tensors(stage, self._assigned, self.params)
        for linear in linears:
            scheme, common = self._assigned[linear.name], shared.get(linear.name)
            stage.heard()
            if scheme.format == "gguf":
                stage.encoded[linear.name] = self._blocks(stage, linear, scheme)
                continue
            result = self._quantize(stage.weights[linear.weight], scheme, common, stage.heard)
            stage.encoded[linear.name] = _encoded(linear, result, scheme, common, inputs[linear.name])

    def _blocks(self, stage: Stage, linear: LinearLayout, scheme: Scheme) -> Encoded:
        """As a GGUF file has it; errors weighted with the moments of the input where these are measured."""
        from kompressor_worker.passes.gguf_encoding import keeping_mean, to_nearest

        weight, measured = stage.weights[linear.weight], next((site.statistics for site in stage.sites if linear in site.linears), None)
        nearest = to_nearest(linear, weight, scheme, None if measured is None else measured.squares, stage.heard)
        return nearest if measured is None else keeping_mean(linear, weight, scheme, nearest, measured, stage.heard)

    def _quantize(self, weight: torch.Tensor, scheme: Scheme, shared: torch.Tensor | None, heard: Heard) -> Quantized:
        from kompressor_worker import kernels

        if self.params.observer == "minmax":
            return kernels.quantize(weight, scheme, shared)
        from kompressor_worker.passes.clipping import best_shares, grid_at

        return kernels.eager.quantize(weight, scheme, shared, lambda w, s, _: grid_at(w, s, w.dtype, best_shares(w, s, w.dtype, heard)))


def _encoded(
    linear: LinearLayout, result: Quantized, scheme: Scheme, shared: torch.Tensor | None, inputs: dict[str, torch.Tensor]
) -> Encoded:
    from kompressor_worker.block import Encoded
    from kompressor_worker.formats.stored import named_tensors

    if result.nonfinite:
        raise _not_finite(linear, result.nonfinite)
    tensors = named_tensors(linear.name, linear.shape, scheme, result.codes, result.scale, result.zero_point, shared)
    if not _scales_usable(result.scale):
        raise BadNumerics(
            f"{linear.weight}: its values span too wide a range for {scheme.name}, a scale overflows; "
            "look for a corrupted weight, or list the layer under ignore"
        )
    stored = {name: tensor.cpu() for name, tensor in tensors.items()}
    return Encoded(stored | inputs, result.squared_error, result.squared_norm)


def _scales_usable(scale: torch.Tensor) -> bool:
    import torch

    from kompressor_worker import kernels

    if scale.dtype == torch.uint8:
        return not bool((scale == 255).any())
    if scale.dtype == torch.float8_e4m3fn:
        return True
    return kernels.nonfinite(scale) == 0


def _shared(stage: Stage, linears: Sequence[LinearLayout], schemes: Mapping[str, Scheme]) -> dict[str, torch.Tensor]:
    """What all that a loader fuses (q/k/v; gate/up) must have in common, fp32 [1] by linear: NVFP4's global scale; the largest magnitude
    where a weight has one scale, since a loader would else round all but one of them a second time."""
    import torch

    from kompressor_worker import grid, kernels

    linears = [linear for linear in linears if schemes[linear.name].strategy in ("tensor", "tensor_group")]
    largest: dict[str, float] = {}
    for linear in linears:
        value, bad = kernels.amax(stage.weights[linear.weight])
        if bad:
            raise _not_finite(linear, bad)
        key = linear.shared or linear.name
        largest[key] = max(largest.get(key, 0.0), value)
    amax = {linear.name: torch.tensor([largest[linear.shared or linear.name]]) for linear in linears}
    return {name: grid.global_scale(value) if schemes[name].strategy == "tensor_group" else value for name, value in amax.items()}


def _not_finite(linear: LinearLayout, bad: int) -> BadNumerics:
    return BadNumerics(
        f"{linear.weight}: {bad} of {prod(linear.shape)} values are NaN or Inf; the checkpoint is damaged or its training diverged, "
        "fetch it again, or list the layer under ignore"
    )
