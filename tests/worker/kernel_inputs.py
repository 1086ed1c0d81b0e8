"""Weights, Hessians and activations that kernels are tried on."""

from __future__ import annotations

import torch

from kompressor_worker import grid
from kompressor_worker.grid import Grid
from kompressor_worker.schemes import Scheme


def layer(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, U of its input's Hessian and the input: correlated, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    weight[:, :: max(1, columns // 3)] *= 6  # so that clamping has something to do where the grid does not reach
    x = torch.randn(2 * columns + 8, columns, generator=generator, dtype=torch.float64)
    x = x @ (torch.randn(columns, columns, generator=generator, dtype=torch.float64) * 0.3 + torch.eye(columns, dtype=torch.float64))
    hessian = x.T @ x
    hessian += torch.eye(columns, dtype=torch.float64) * hessian.diagonal().mean() * 0.01
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    return weight, factor.float().contiguous(), x


def of_range(weight: torch.Tensor, scheme: Scheme) -> Grid:
    return grid.grid_of(weight, scheme, grid.global_scale(weight.abs().max()) if scheme.strategy == "tensor_group" else None)


def inputs(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Activations with outliers, zeros of both signs and a token of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.randn(shape[-1], generator=generator).exp()
    x.view(-1)[:: max(1, x.numel() // 3)] *= 50
    x.view(-1)[::7] *= 0
    if len(x) > 1:
        x[-1] = 0
    return x


def constants(kind: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    made = {"scale": x.abs().max().reshape(1) / 300 + 1e-6} if "tensor" in kind else {}
    if kind == "int8_tensor_asym":
        made["zero_point"] = torch.tensor([-37], dtype=torch.int8)
    if kind == "fp4_local":
        made["global_scale"] = grid.global_scale(x.abs().max() / 2)
    return made
