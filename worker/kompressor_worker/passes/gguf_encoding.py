"""Linears as a GGUF file holds them: rounded to the nearest codes, or by GPTQ on the same grids."""

from __future__ import annotations

import torch
from torch import Tensor

from kompressor_worker import kernels
from kompressor_worker.block import Encoded
from kompressor_worker.errors import BadNumerics
from kompressor_worker.formats.gguf_types import type_of
from kompressor_worker.grid import Grid
from kompressor_worker.kernels.pieces import Heard, unheard
from kompressor_worker.layout import LinearLayout
from kompressor_worker.passes.hessian import Factor
from kompressor_worker.schemes import Scheme

DEAD_STEP = 2.0**-100
"""In place of a step of zero: whatever the code, its value is the group's centre."""


def to_nearest(linear: LinearLayout, weight: Tensor, scheme: Scheme, importance: Tensor | None = None, heard: Heard = unheard) -> Encoded:
    """The encoding of `linear` with the least squared error, weighted with `importance` fp32 [in] if that is given. Raises BadNumerics."""
    data, error, norm, bad = kernels.gguf_quantize(weight, type_of(scheme).name, importance, heard)
    if bad:
        raise BadNumerics(
            f"{linear.weight}: {bad} of {weight.numel()} values are NaN or Inf; the checkpoint is damaged or its training diverged, "
            "fetch it again, or list the layer under ignore"
        )
    return Encoded({linear.weight: data.cpu()}, error, norm)


def by_gptq(
    linear: LinearLayout,
    weight: Tensor,
    scheme: Scheme,
    factor: Factor,
    diagonal: Tensor,
    heard: Heard = unheard,
    zeros: Tensor | None = None,
) -> Encoded:
    """The encoding of `linear` on the grid that rounding to nearest has with the Hessian's diagonal fp32 [in] for importance; the codes
    with the least error of its output. For finite weights and types whose levels are even.

    With `zeros` bool [out, in] those weights stay zero, if the type has no minima: else no code need stand for zero."""
    kind = type_of(scheme)
    found = kernels.gguf_grid(weight, kind.name, diagonal, heard)
    # A centre taken away from a weight changes no error, and leaves a grid that is symmetric.
    shifted = weight.float() - found.centre.repeat_interleave(kind.group, 1)
    grid = Grid(torch.where(found.scale == 0, DEAD_STEP, found.scale))
    mask = None if zeros is None or kind.minimum is not None else factor.ordered(zeros)
    columns = factor.columns // kind.group
    ordered, _ = kernels.gptq(factor.ordered(shifted), factor.inverse, grid, scheme, columns, heard, mask=mask)
    data = kernels.gguf_pack(factor.as_they_lay(ordered), found, kind.name)
    error, norm = kernels.gguf_errors(weight, data, kind.name)
    return Encoded({linear.weight: data.cpu()}, error, norm)
