"""The scales of inputs that are quantised statically, from what was measured of them: the same for every pass that encodes linears.

Linears that share an input share its scale. Routed experts share one for each of their two inputs, over the tokens of all of them: loaders
have one for the fused experts, and take the largest if there are several (vLLM's FP8 and NVFP4 mixtures).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kompressor_api.fields import Number
from kompressor_api.v1alpha1 import Model
from kompressor_worker.errors import BadNumerics, UserError
from kompressor_worker.passes.shapes import is_routed_expert
from kompressor_worker.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from kompressor_worker.block import Stage
    from kompressor_worker.layout import LinearLayout
    from kompressor_worker.statistics import Statistic, Statistics


class InputParams(Model):
    """Base of the parameters of a pass that can give inputs a static scale."""

    input_observer: Literal["minmax", "percentile", "mse", "entropy"] = Field(
        default="minmax",
        description=(
            "Range of a static input scale (W8A8_STATIC, FP8; NVFP4's is minmax): all values seen, a percentile, the least squared "
            "error, or the nearest distribution (KL), for rare outliers."
        ),
    )
    input_percentile: Number = Field(
        default=99.99, gt=50.0, le=100.0, description="How many in a hundred input values are inside, where inputObserver is percentile."
    )


def needed_statistics(scheme: Scheme, params: InputParams) -> frozenset[Statistic]:
    """What must be measured of the inputs of linears in `scheme`; nothing: it needs no calibration data."""
    if scheme.calibrated is None:
        return frozenset()
    return frozenset({"range" if scheme.calibrated == "range" or params.input_observer == "minmax" else "histogram"})


def input_tensors(stage: Stage, schemes: Mapping[str, Scheme], params: InputParams) -> dict[str, dict[str, torch.Tensor]]:
    """For each of the stage's linears that has a scheme in `schemes`: what its encoding holds beside the weight, by full tensor name.

    `input_scale` [1] in the weight's dtype (+ `input_zero_point` int8 [1]), or `input_global_scale` fp32 [1]; nothing where inputs are
    quantised as they come, or not. Raises UserError (no calibration row reached a linear), BadNumerics (a scale overflows its dtype).
    """
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    together: dict[tuple[str, bool, Scheme], list[LinearLayout]] = {}
    for linear in stage.layout.linears:
        scheme = schemes.get(linear.name)
        if scheme is None:
            continue
        tensors[linear.name] = {}
        if scheme.calibrated is not None:
            expert = is_routed_expert(linear.name)
            # gate and up share their NVFP4 scale and their input; down has neither in common with them
            key = (linear.fused or linear.name, linear.shared is None, scheme) if expert else (linear.name, False, scheme)
            together.setdefault(key, []).append(linear)
    for (_, _, scheme), linears in together.items():
        statistics = {id(s): s for s in (stage.statistics_of(linear.name) for linear in linears)}
        made = _input_tensors(linears[0], scheme, list(statistics.values()), params)
        for linear in linears:
            tensors[linear.name] = {f"{linear.name}.{suffix}": tensor.clone() for suffix, tensor in made.items()}
    return tensors


def _input_tensors(linear: LinearLayout, scheme: Scheme, inputs: Sequence[Statistics], params: InputParams) -> dict[str, torch.Tensor]:
    """By suffix. `inputs`: those whose rows the scale is for."""
    import torch

    from kompressor_worker import grid
    from kompressor_worker.observers import input_grid, range_of
    from kompressor_worker.tensors import DTYPES

    (wanted,) = needed_statistics(scheme, params)
    assert not any(wanted in s.stale for s in inputs), f"{linear.name}: the {wanted} of its input is of an input that has changed since"
    seen = [s for s in inputs if s.rows]
    if not seen:
        raise UserError(
            f"{linear.name}: no calibration row reached it, so {scheme.name} has nothing to take its input's range from; "
            "raise calibration.samples, or list it under ignore"
        )
    dtype = DTYPES[linear.dtype]
    if wanted == "range":
        low = torch.stack([_present(s.low).min() for s in seen]).min()
        high = torch.stack([_present(s.high).max() for s in seen]).max()
    else:
        histogram = torch.stack([_present(s.histogram) for s in seen]).sum(0)
        low, high = range_of(histogram, input_grid(scheme), params.input_observer, dtype, params.input_percentile)
    low, high = low.cpu(), high.cpu()
    if scheme.inputs == "fp4_local":
        return {"input_global_scale": grid.global_scale(torch.maximum(low.abs(), high.abs()))}
    found = grid.grid_of_range(low, high, input_grid(scheme), dtype)
    scale = found.scale.reshape(1).to(dtype)
    if not bool(scale.isfinite().all()):
        raise BadNumerics(
            f"{linear.name}: its input spans [{float(low):g}, {float(high):g}], and the scale overflows {linear.dtype}; "
            "look for corrupted weights before it, or list it under ignore"
        )
    return {"input_scale": scale} | ({} if found.zero_point is None else {"input_zero_point": found.zero_point.reshape(1)})


def _present(statistic: torch.Tensor | None) -> torch.Tensor:
    assert statistic is not None, "a pass declares what it needs in `statistics`"
    return statistic
