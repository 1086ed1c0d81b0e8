"""GPTQ's column loop in plain torch: what the compiled one and the Triton one must equal within the rounding of their sums.

Frantar et al. 2022, arXiv 2210.17323. Columns are rounded one after the other, and what rounding one has cost is made good by those that
come after it. With H = X^T X the Hessian of the layer's squared output error and H^-1 = U^T U (U upper triangular), column j leaves the
error e_j = (w_j - q_j) / U_jj in every row, of which column k > j takes -e_j U_jk. The sum of all e_j^2 is by how much the output error
||(W - Q) X||^2 has grown.

out * in^2 operations, half of them multiplications and all but a fraction block / in of them in matrix products. Weight and factor are
read once, 4 bytes each: 450 operations for each byte at out = in = 4096. The limit is a product in fp32, of which the compiled one reaches
0.89 to 0.94, four to six times the rate of this (`benchmarks/kernels.py`, two EPYC cores).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kompressor_worker import grid
from kompressor_worker.grid import Grid
from kompressor_worker.schemes import Scheme


def gptq(
    weight: Tensor,
    factor: Tensor,
    step: Tensor,
    zero_point: Tensor | None,
    group_of: Tensor,
    floating: bool,
    bits: int,
    block: int,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes [out, in] (int8, or float8_e4m3fn for FP8 and FP4) and the loss, fp64 [], for a grid that is given.

    weight fp32 [out, in]; factor fp32 [in, in], U; step fp32 and zero_point int8 [out, groups]; group_of int32 [in]; mask uint8 [out, in],
    1 where a pruned weight is to stay zero, whatever the others' errors make of it.
    """
    one_column = _scheme_of_a_column(floating, bits, zero_point is None)

    def grid_of(work: Tensor, column: int) -> Grid:
        group = slice(groups[column], groups[column] + 1)
        return Grid(step[:, group], None if zero_point is None else zero_point[:, group])

    groups = group_of.tolist()
    return _loop(weight, factor, one_column, grid_of, block, mask)


def gptq_groups(
    weight: Tensor, factor: Tensor, group_size: int, bits: int, symmetric: bool, dtype: torch.dtype, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scale, zero point and loss: the grid of each group of columns comes from its weights when the first one is reached.

    Integers only. scale fp32 as rounded to `dtype`, zero_point int8 (empty if symmetric), both [out, groups].
    """
    one_column = _scheme_of_a_column(False, bits, symmetric)
    made: list[Grid] = []

    def grid_of(work: Tensor, column: int) -> Grid:
        if column % group_size == 0:
            part = work[:, column : column + group_size]
            low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
            made.append(grid.grid_of_range(low, high, one_column, dtype))
        return made[-1]

    codes, loss = _loop(weight, factor, one_column, grid_of, block_of_groups(group_size), mask)
    zero_points = [g.zero_point for g in made if g.zero_point is not None]
    scale = torch.cat([g.scale for g in made], dim=1)
    return codes, scale, torch.cat(zero_points, dim=1) if zero_points else scale.new_empty(0, dtype=torch.int8), loss


def block_of_groups(group_size: int) -> int:
    """Columns of a block of about 128 that no group straddles."""
    return max(1, 128 // group_size) * group_size


def _loop(
    weight: Tensor, factor: Tensor, scheme: Scheme, grid_of: Callable[[Tensor, int], Grid], block: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    work = weight.clone()
    codes = torch.empty((rows, columns), dtype=torch.int8 if scheme.type == "int" else torch.float8_e4m3fn, device=weight.device)
    loss = torch.zeros((), dtype=torch.float64, device=weight.device)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty((rows, stop - start), device=weight.device)
        for j in range(start, stop):
            here = grid_of(work[:, :stop], j)
            column = work[:, j : j + 1] if mask is None else work[:, j : j + 1].masked_fill(mask[:, j : j + 1].bool(), 0.0)
            code = grid.quantize(column, here, scheme)
            codes[:, j : j + 1] = code
            error = (work[:, j : j + 1] - grid.dequantize(code, here, scheme)) / factor[j, j]
            work[:, j + 1 : stop] -= error * factor[j, j + 1 : stop]
            errors[:, j - start : j - start + 1] = error
        work[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
        loss += errors.double().square().sum()
    return codes, loss


def _scheme_of_a_column(floating: bool, bits: int, symmetric: bool) -> Scheme:
    return Scheme("", "", bits, "float" if floating else "int", "channel", symmetric)
