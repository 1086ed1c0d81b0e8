"""From codes on a grid to what the file holds, and round to nearest where a pass has nothing better to say."""

from __future__ import annotations

import torch
from torch import Tensor

from kompressor_worker import grid, kernels
from kompressor_worker.block import Encoded
from kompressor_worker.errors import BadNumerics
from kompressor_worker.formats.stored import named_tensors
from kompressor_worker.layout import LinearLayout
from kompressor_worker.schemes import Scheme


def encode(linear: LinearLayout, weight: Tensor, codes: Tensor, found: grid.Grid, scheme: Scheme, saturated: int = 0) -> Encoded:
    """The encoding of `linear` by codes [out, in] as `grid.quantize` makes them; errors against weight [out, in], the one they stand for.

    Raises BadNumerics: a scale overflows the dtype that it is stored in."""
    packed, scale, zero_point = kernels.stored(codes, found, scheme, weight.dtype)
    if kernels.nonfinite(scale):
        raise BadNumerics(
            f"{linear.weight}: its values span too wide a range for {scheme.name}, a scale overflows; "
            "look for a corrupted weight, or list the layer under ignore"
        )
    error, norm = kernels.code_errors(weight, codes, found, scheme)
    tensors = named_tensors(linear.name, linear.shape, scheme, packed, scale, zero_point, found.global_scale)
    stored = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    return Encoded(stored, error, norm, saturated)


def round_to_nearest(linear: LinearLayout, weight: Tensor, scheme: Scheme) -> Encoded:
    """Without data. Raises BadNumerics."""
    refuse_nonfinite(linear, weight)
    found = grid.grid_of(weight, scheme)
    return encode(linear, weight, grid.quantize(weight, found, scheme), found, scheme)


def refuse_nonfinite(linear: LinearLayout, weight: Tensor) -> None:
    """Raises BadNumerics that names the tensor and counts its NaN and Inf."""
    bad = kernels.nonfinite(weight)
    if bad:
        raise BadNumerics(
            f"{linear.weight}: {bad} of {weight.numel()} values are NaN or Inf; the checkpoint is damaged or its training diverged, "
            "fetch it again, or list the layer under ignore"
        )


def finite(statistic: Tensor, site: str) -> Tensor:
    """`statistic` as it is. Raises BadNumerics that names the site if it has NaN or Inf."""
    if not bool(torch.isfinite(statistic).all()):
        raise BadNumerics(f"{site}: the statistics of its input overflow fp32; look for corrupted weights in the blocks before it")
    return statistic
