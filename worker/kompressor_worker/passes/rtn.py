"""Round to nearest: each weight on the grid of its own range, without data.

The baseline of every paper on quantisation, and near lossless at 8 bits. What it may quantise is decided from headers,
where every request that a loader could not read is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints, field_validator

from kompressor_api.v1alpha1 import Model
from kompressor_worker.errors import BadNumerics, UserError
from kompressor_worker.passes import Pass
from kompressor_worker.passes.selection import select
from kompressor_worker.passes.shapes import check_shapes
from kompressor_worker.schemes import SCHEMES, Scheme

if TYPE_CHECKING:
    import torch

    from kompressor_worker.block import Stage
    from kompressor_worker.layout import LinearLayout, ModelLayout

SchemeName = Literal["W8A8", "W8A16", "W4A16", "W4A16_ASYM", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4", "NVFP4A16"]
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=512)]


class RtnParams(Model):
    """Round to nearest: quantises weights without calibration data."""

    scheme: SchemeName = Field(
        description=(
            "W8A8 (INT8, activations per token at run time), W8A16, W4A16 and W4A16_ASYM (packed integers, weights "
            "only), FP8_DYNAMIC (per channel, activations per token), FP8_BLOCK (128x128), MXFP4 (groups of 32, weights"
            " only) or NVFP4A16 (groups of 16, weights only)."
        )
    )
    group_size: int | None = Field(
        default=None,
        ge=-1,
        le=65536,
        description=(
            "Columns that share a scale, -1 for one scale a channel; W8A16, W4A16 and W4A16_ASYM only. Must divide the "
            "columns of every targeted weight. Default: 128 for W4A16 and W4A16_ASYM, -1 for W8A16."
        ),
    )
    targets: list[Pattern] = Field(
        default=["Linear"],
        min_length=1,
        max_length=256,
        description=(
            "What to quantise: module names, regular expressions as re:<pattern> (matched from the start of the name), "
            "or Linear for every linear layer of the decoder. Layers that an earlier pass has quantised are left out. "
            "A head is quantised only if its full name is listed here."
        ),
    )
    ignore: list[Pattern] = Field(
        default_factory=list,
        max_length=1024,
        description=(
            "What to leave exact, in the same form as targets. Embeddings, the head (lm_head) and the routers of a "
            "mixture of experts are left exact without being listed here."
        ),
    )

    @field_validator("group_size")
    @classmethod
    def _not_zero(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("a group has at least one column; use -1 for one scale a channel")
        return value

    @field_validator("targets", "ignore")
    @classmethod
    def _compiles(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return patterns


class Rtn(Pass):
    """The pass `rtn`."""

    Params: ClassVar[type[Model]] = RtnParams

    def __init__(self, params: RtnParams) -> None:
        self.params = params
        self._assigned: dict[str, Scheme] = {}

    def assign(self, layout: ModelLayout, taken: Mapping[str, Scheme]) -> dict[str, Scheme]:
        """Linear name to scheme, from headers alone. Raises UserError that names the tensor, the value and the
        remedy."""
        scheme = self._scheme()
        chosen = select(layout, taken, self.params.targets, self.params.ignore)
        check_shapes(layout, chosen, scheme)
        self._assigned = {linear.name: scheme for linear in chosen}
        return dict(self._assigned)

    def apply(self, stage: Stage) -> None:
        """Encodes this stage's linears in `assign`'s answer. Raises BadNumerics that names the tensor and counts its
        NaN and Inf."""
        linears = [linear for linear in stage.layout.linears if linear.name in self._assigned]
        shared = _global_scales(stage, [linear for linear in linears if self._assigned[linear.name].strategy == "tensor_group"])
        for linear in linears:
            _encode(stage, linear, self._assigned[linear.name], shared.get(linear.name))

    def _scheme(self) -> Scheme:
        scheme = SCHEMES[self.params.scheme]
        if self.params.group_size is None:
            return scheme
        if not scheme.choosable_groups:
            raise UserError(
                f"rtn: groupSize {self.params.group_size} with scheme {scheme.name}, whose groups are fixed; "
                "leave groupSize out, or choose W4A16, W4A16_ASYM or W8A16"
            )
        return scheme.with_group_size(self.params.group_size)


def _encode(stage: Stage, linear: LinearLayout, scheme: Scheme, global_scale: torch.Tensor | None) -> None:
    from kompressor_worker import kernels
    from kompressor_worker.block import Encoded
    from kompressor_worker.formats.compressed_tensors import named_tensors

    weight = stage.weights[linear.weight]
    result = kernels.quantize(weight, scheme, global_scale)
    if result.nonfinite:
        raise _not_finite(linear, result.nonfinite, weight.numel())
    tensors = named_tensors(linear.name, linear.shape, scheme, result.codes, result.scale, result.zero_point, global_scale)
    if not _scales_usable(result.scale):
        raise BadNumerics(
            f"{linear.weight}: its values span too wide a range for {scheme.name}, a scale overflows; "
            "look for a corrupted weight, or list the layer under ignore"
        )
    stage.encoded[linear.name] = Encoded(tensors, result.squared_error, result.squared_norm)


def _scales_usable(scale: torch.Tensor) -> bool:
    import torch

    from kompressor_worker import kernels

    if scale.dtype == torch.uint8:
        return not bool((scale == 255).any())
    if scale.dtype == torch.float8_e4m3fn:
        return True
    return kernels.nonfinite(scale) == 0


def _global_scales(stage: Stage, linears: list[LinearLayout]) -> dict[str, torch.Tensor]:
    """NVFP4 global scale by linear: one for all that a loader fuses (q/k/v; gate/up)."""
    import torch

    from kompressor_worker import grid, kernels

    largest: dict[str, float] = {}
    for linear in linears:
        weight = stage.weights[linear.weight]
        value, bad = kernels.amax(weight)
        if bad:
            raise _not_finite(linear, bad, weight.numel())
        key = linear.shared or linear.name
        largest[key] = max(largest.get(key, 0.0), value)
    return {linear.name: grid.global_scale(torch.tensor(largest[linear.shared or linear.name])) for linear in linears}


def _not_finite(linear: LinearLayout, bad: int, total: int) -> BadNumerics:
    return BadNumerics(
        f"{linear.weight}: {bad} of {total} values are NaN or Inf; the checkpoint is damaged or its training diverged, "
        "fetch it again, or list the layer under ignore"
    )
