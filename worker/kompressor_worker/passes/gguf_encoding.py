"""Linears as a GGUF file holds them: rounded to the nearest codes, or by GPTQ on the same grids."""

from __future__ import annotations

import torch
from torch import Tensor

from kompressor_worker import kernels
from kompressor_worker.block import Encoded
from kompressor_worker.errors import BadNumerics
from kompressor_worker.formats.gguf_types import GgufType, type_of
from kompressor_worker.grid import Grid
from kompressor_worker.kernels.gguf_search import DEAD_STEP, MOST_GAIN
from kompressor_worker.kernels.pieces import Heard, unheard
from kompressor_worker.layout import LinearLayout
from kompressor_worker.passes.hessian import Factor
from kompressor_worker.schemes import Scheme
from kompressor_worker.statistics import Statistics

SAMPLED = 256
"""Rows of a weight, about, of which its output's length is reckoned."""


def to_nearest(linear: LinearLayout, weight: Tensor, scheme: Scheme, importance: Tensor | None = None, heard: Heard = unheard) -> Encoded:
    """The encoding of `linear` with the least squared error, weighted with `importance` fp32 [in] if that is given. Raises BadNumerics."""
    data, error, norm, bad = kernels.gguf_quantize(weight, type_of(scheme).name, importance, heard)
    if bad:
        raise BadNumerics(
            f"{linear.weight}: {bad} of {weight.numel()} values are NaN or Inf; the checkpoint is damaged or its training diverged, "
            "fetch it again, or list the layer under ignore"
        )
    return Encoded({linear.weight: data.cpu()}, error, norm)


def keeping_mean(
    linear: LinearLayout, weight: Tensor, scheme: Scheme, nearest: Encoded, measured: Statistics, heard: Heard = unheard
) -> Encoded:
    """The encoding `nearest` of `linear` with codes by which its output is right on average too, where the input's moments are known and
    the type's levels are even; else as it is."""
    kind = type_of(scheme)
    if measured.squares is None or measured.sums is None or not kind.even:
        return nearest
    data = nearest.tensors[linear.weight].to(weight.device)
    squares, mean = (sums / measured.rows for sums in (measured.squares, measured.sums))
    data = kernels.gguf_keep_mean(weight, data, kind.name, squares, mean, heard)
    error, norm = kernels.gguf_errors(weight, data, kind.name)
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
    with the least error of its output, on scales by which that is as long along itself as it was. For finite weights and types whose
    levels are even.

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
    data = kernels.gguf_scaled(data, _gain(weight, data, kind, factor), kind.name)
    error, norm = kernels.gguf_errors(weight, data, kind.name)
    return Encoded({linear.weight: data.cpu()}, error, norm)


def _gain(weight: Tensor, data: Tensor, kind: GgufType, factor: Factor) -> float:
    """What makes sum w^T H value what sum w^T H w is, of some rows: least squares leave the output shorter (`kernels.gguf_search`), though
    by less than weights that are rounded each for itself. H = U^-1 U^-T, so both are products of U^-T w."""
    rows = slice(None, None, max(1, len(weight) // SAMPLED))
    values = kernels.gguf_dequantize(data[rows], kind.name, weight.shape[1], torch.float32)
    whole, kept = (
        torch.linalg.solve_triangular(factor.inverse.T, factor.ordered(x.float()).T, upper=False) for x in (weight[rows], values)
    )
    along, left = (float((whole * x).sum(dtype=torch.float64)) for x in (whole, kept))
    return min(max(along / left, 1 / MOST_GAIN), MOST_GAIN) if left > 0 else 1.0
