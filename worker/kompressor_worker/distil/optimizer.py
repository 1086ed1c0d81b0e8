"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) on fp32 masters, its learning rate by the step, gradients clipped by their norm.

It works on each process's own part of every tensor, so it is the same with one process and with many.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kompressor_worker.distil.together import Sums
from kompressor_worker.passes.distil import DistilParams


def learning_rate(params: DistilParams, step: int, steps: int) -> float:
    """Of a step counted from 0."""
    warm = math.ceil(params.warmup * steps)
    if step < warm:
        return params.learning_rate * (step + 1) / (warm + 1)
    done = (step - warm) / max(1, steps - 1 - warm)
    match params.schedule:
        case "cosine":
            share = (1 + math.cos(math.pi * min(1.0, done))) / 2
        case "linear":
            share = 1 - min(1.0, done)
        case _:
            return params.learning_rate
    return params.learning_rate * (params.floor + (1 - params.floor) * share)


def local(x: Tensor) -> Tensor:
    """This process's part of it."""
    part: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return part


class Optimizer:
    def __init__(self, params: DistilParams, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        """`parameters` by name; `masks` by the same, bool [the process's part]: weights that are not pruned, where some are."""
        self.params, self.parameters, self.masks = params, dict(parameters), dict(masks)
        self._parts = {name: nn.Parameter(local(x.detach()), requires_grad=x.requires_grad) for name, x in self.parameters.items()}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self._parts.values() if p.dim() > 1], "weight_decay": params.weight_decay},
            {"params": [p for p in self._parts.values() if p.dim() <= 1], "weight_decay": 0.0},
        ]
        betas = params.betas[0], params.betas[1]
        self._adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=params.learning_rate, betas=betas, eps=1e-8, fused=True)
        for part in self._parts.values():
            self._adam.state[part] = {
                "step": torch.zeros((), dtype=torch.float32, device=part.device),
                "exp_avg": torch.zeros_like(part),
                "exp_avg_sq": torch.zeros_like(part),
            }

    def norm(self, scale: float, sums: Sums) -> float:
        """Of `scale` times the gradients that have gathered, those of pruned weights left out."""
        gradients = self._gradients()
        norms = torch.stack(torch._foreach_norm(gradients)).double() if gradients else torch.zeros(1, dtype=torch.float64)
        return scale * math.sqrt(sums([float(norms.square().sum())])[0])

    def step(self, rate: float, scale: float, norm: float) -> None:
        """One step with `scale` times the gradients, which are used up; `norm` is theirs, and decides whether they are clipped."""
        clip = self.params.gradient_clip
        torch._foreach_mul_(self._gradients(), scale * (min(1.0, clip / norm) if clip and norm else 1.0))
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        for name, parameter in self.parameters.items():
            parameter.grad = self._parts[name].grad = None

    def _gradients(self) -> list[Tensor]:
        found: list[Tensor] = []
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            self._parts[name].grad = gradient = local(parameter.grad)
            if (mask := self.masks.get(name)) is not None:
                gradient.mul_(mask)
            found.append(gradient)
        return found

    def state(self) -> dict[str, Tensor]:
        """The process's parts of its moments, and how many steps each tensor has made, by name; not copied."""
        found: dict[str, Tensor] = {}
        for name, part in self._parts.items():
            found |= {f"{kind}/{name}": self._adam.state[part][kind] for kind in ("exp_avg", "exp_avg_sq", "step")}
        return found
