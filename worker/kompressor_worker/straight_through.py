"""Quantisation that gradients pass through: the forward sees what will be published, the backward takes rounding for the identity.

The straight-through estimator (Bengio et al. 2013, arXiv 1308.3432): a value inside its grid's range has the gradient of what it is rounded
to, one that is clipped has none. Steps of integer grids are learned with the weights (LSQ, Esser et al. 2019, arXiv 1902.08153), each as a
share of itself, so that one learning rate suits all. What is rounded is the model's dtype on both sides of the grid, as in the files, so
`FakeQuantized.encode` makes the very bytes whose decoding the forward has used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kompressor_worker import grid, kernels
from kompressor_worker.block import Encoded
from kompressor_worker.formats.stored import codes_and_grid
from kompressor_worker.forward import ROWS
from kompressor_worker.gguf_straight_through import INSIDE, FakeBlocks
from kompressor_worker.grid import Grid
from kompressor_worker.layout import LinearLayout
from kompressor_worker.passes.encoding import encode
from kompressor_worker.schemes import Scheme
from kompressor_worker.tensors import DTYPES

LEAST = 1 / 16
"""A step never shrinks below this share of what it began as."""

LAST = {8: 464.0, 4: 7.0}
"""By bits of a float: the largest code that is rounded to an end no further than others are to theirs, half a step beyond it."""


class FakeQuantized(nn.Module):
    """One linear's weight on the grid that it has been encoded on."""

    stretch: nn.Parameter | None
    """fp32 [out tiles, in tiles]: a step is (1 + stretch) times what it began as. None: the grid is fixed, as FP8's and FP4's are, whose
    steps grow with the values anyway."""
    scale: Tensor
    zero_point: Tensor | None
    global_scale: Tensor | None

    def __init__(self, linear: LinearLayout, scheme: Scheme, tensors: Mapping[str, Tensor], device: torch.device | None = None) -> None:
        """`tensors` by full name: those that the linear is published as, of which the grid and the input's scales are kept."""
        super().__init__()
        self.linear, self.scheme, self.dtype = linear, scheme, DTYPES[linear.dtype]
        _, _, found = codes_and_grid(linear.name, tensors, scheme)
        self.inputs = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{linear.name}.input_")}
        self.register_buffer("scale", found.scale.to(device), persistent=False)
        self.register_buffer("zero_point", None if found.zero_point is None else found.zero_point.to(device), persistent=False)
        self.register_buffer("global_scale", None if found.global_scale is None else found.global_scale.to(device), persistent=False)
        self.stretch = nn.Parameter(torch.zeros_like(self.scale)) if scheme.type == "int" else None

    def grid(self) -> Grid:
        """As it would be stored now."""
        if self.stretch is None:
            return Grid(self.scale, self.zero_point, self.global_scale)
        stretched = self.scale * (1 + self.stretch.detach().float()).clamp(min=LEAST)
        return Grid(stretched.to(self.dtype).float(), self.zero_point)

    def weight(self, weight: Tensor) -> Tensor:
        """What a reader sees of weight [out, in], in the model's dtype; differentiable by it and by `stretch`. It is rounded to the grid in
        the dtype that it comes in."""
        rounded: Tensor = Rounding.apply(weight, self.stretch, self)  # type: ignore[no-untyped-call]
        return rounded

    def forward(self, weight: Tensor) -> Tensor:
        return self.weight(weight)

    @torch.no_grad()
    def begins(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """For weight [out, in], encoded as `tensors` (by full name), both fp32 [out, in]: from where it is rounded to its code, which is
        the weight itself unless a pass has chosen another than the nearest; and how far the next value is."""
        codes, columns, found = codes_and_grid(self.linear.name, tensors, self.scheme)
        rounded = kernels.dequantize(codes, columns, found, self.scheme, torch.float32).to(weight.device)
        own, weight = self.grid(), weight.float()
        step = per_weight(own.step, weight, self.scheme)
        unit = step if self.scheme.type == "int" else step * spacing(rounded / step, self.scheme)
        nearest = grid.dequantize(grid.quantize(weight, own, self.scheme), own, self.scheme)
        within = weight.clamp(rounded - INSIDE * unit, rounded + INSIDE * unit) if self.scheme.type == "int" else rounded
        return torch.where(nearest == rounded, weight, within), unit

    @torch.no_grad()
    def encode(self, weight: Tensor, stands_for: Tensor | None = None) -> Encoded:
        """What decodes to `weight(weight)`, bit for bit. Errors are against `stands_for` [out, in], the weight itself where it is None.

        Raises BadNumerics: a scale overflows the dtype that it is stored in."""
        found = self.grid()
        codes = grid.quantize(weight, found, self.scheme)
        encoded = encode(self.linear, (weight if stands_for is None else stands_for).to(self.dtype), codes, found, self.scheme)
        encoded.tensors.update(self.inputs)
        return encoded


Fake = FakeQuantized | FakeBlocks


def fake_of(linear: LinearLayout, scheme: Scheme, tensors: Mapping[str, Tensor], device: torch.device | None = None) -> Fake:
    """For a linear that is encoded as `tensors` (by full name), in whichever format."""
    if scheme.format == "gguf":
        return FakeBlocks(linear, scheme, tensors[linear.weight], device)
    return FakeQuantized(linear, scheme, tensors, device)


class Rounding(torch.autograd.Function):
    """weight [out, in], stretch [out tiles, in tiles] or None, and whose they are."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, stretch: Tensor | None, of: FakeQuantized) -> Tensor:
        found = of.grid()
        ctx.save_for_backward(weight)
        ctx.found, ctx.of = found, of
        return grid.dequantize(grid.quantize(weight, found, of.scheme), found, of.scheme).to(of.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (weight,), found, of = ctx.saved_tensors, ctx.found, ctx.of
        scheme: Scheme = of.scheme
        steps = per_weight(found.step, weight, scheme)
        codes = weight.float() / steps
        if scheme.type == "float":
            return (gradient * (codes.abs() <= LAST[scheme.bits])).to(weight.dtype), None, None
        points = 0.0 if found.zero_point is None else per_weight(found.zero_point.float(), weight, scheme)
        bottom, top = grid.integer_range(scheme)
        places = codes + points
        inside = (places >= bottom - 0.5) & (places <= top + 0.5)  # what is beyond by less is rounded to an end, no worse than elsewhere
        by_step = None
        if ctx.needs_input_grad[1]:
            by_code = places.clamp(bottom, top).round() - points - codes * inside
            by_step = per_tile(gradient.float() * by_code, scheme) * of.scale
        return (gradient * inside).to(weight.dtype), by_step, None


def per_weight(values: Tensor, weight: Tensor, scheme: Scheme) -> Tensor:
    """[out tiles, in tiles] as [out, in], shaped as the weight."""
    height, width = scheme.tile((weight.shape[0], weight.shape[1]))
    wide = values.repeat_interleave(height, 0)[: weight.shape[0]] if height > 1 else values
    return wide.repeat_interleave(width, 1)[:, : weight.shape[1]] if width > 1 else wide


def spacing(codes: Tensor, scheme: Scheme) -> Tensor:
    """How far the next value is from each of these values of E4M3 or E2M1, fp32."""
    mantissa, least = (3, -6) if scheme.bits == 8 else (1, 0)
    exponent = codes.abs().clamp(min=2.0**least).log2().floor()
    return torch.exp2(exponent - mantissa)


def per_tile(values: Tensor, scheme: Scheme) -> Tensor:
    """Sums of [out, in] by tile, [out tiles, in tiles]."""
    height, width = scheme.tile((values.shape[0], values.shape[1]))
    padded = F.pad(values, (0, -values.shape[1] % width, 0, -values.shape[0] % height))
    return padded.view(len(padded) // height, height, -1, width).sum((1, 3))


class RoundedInput(torch.autograd.Function):
    """What `kernels` makes of an input; the gradient passes where the magnitude is within `reach` (None: everywhere) of `centre`."""

    LIMITS: ClassVar[dict[str, float]] = {"int8_tensor": 127.5, "int8_tensor_asym": 127.5, "fp8_tensor": grid.FP8_MAX}

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor, reach: Tensor | None, centre: Tensor | None) -> Tensor:
        ctx.save_for_backward(None if reach is None else ((x.float() if centre is None else x.float() - centre).abs() <= reach))
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradient if inside is None else gradient * inside, None, None, None


def fake_input(name: str, x: Tensor, scheme: Scheme, tensors: Mapping[str, Tensor]) -> Tensor:
    """x [..., columns] as the linear `name` meets it at a runtime that reads `tensors` (by full name), in x's dtype; differentiable."""
    if scheme.inputs == "none":
        return x
    scale, zero_point, global_scale = (tensors.get(f"{name}.input_{each}") for each in ("scale", "zero_point", "global_scale"))
    rounded = kernels.fake_quantize_input(x.detach(), scheme.inputs, scale, zero_point, global_scale)
    reach = centre = None
    if scale is not None:
        step = scale.to(x.device, torch.float32)
        reach = step * RoundedInput.LIMITS[scheme.inputs]
        if zero_point is not None:  # codes reach from -128.5 to 127.5, half a step beyond their ends
            centre = step * (-0.5 - zero_point.to(x.device, torch.float32))
            reach = step * 128.0
    elif global_scale is not None:
        reach = grid.FP8_MAX * grid.FP4_MAX / global_scale.to(x.device, torch.float32)
    passed: Tensor = RoundedInput.apply(x, rounded, reach, centre)  # type: ignore[no-untyped-call]
    return passed


def fake_kv(x: Tensor, scale: Tensor) -> Tensor:
    """Keys or values [rows, KV heads, length, head dim] through an FP8 cache, as `kernels.fake_quantize_kv`; differentiable."""
    rounded = kernels.fake_quantize_kv(x.detach(), scale)
    reach = scale.to(x.device, torch.float32).reshape(-1, 1, 1) * grid.FP8_MAX
    passed: Tensor = RoundedInput.apply(x, rounded, reach, None)  # type: ignore[no-untyped-call]
    return passed


class Learning:
    """A block's linears over weights that are learned: the counterpart of `forward.Published`, for gradients."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        fakes: Mapping[str, Fake],
        dtype: torch.dtype = torch.float32,
        masks: Mapping[str, Tensor] | None = None,
        round_inputs: bool = True,
    ) -> None:
        """`weights` by full name; `fakes` by linear, for those that are quantised; `masks` by linear, bool [out, in]: which weights are not
        pruned. `dtype`: what products are computed in. `round_inputs`: whether inputs are rounded as a runtime does it."""
        self.weights, self.fakes, self.dtype, self.masks = weights, fakes, dtype, masks or {}
        self.round_inputs = round_inputs

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """x [..., columns] W^T + b, in `dtype`."""
        fake = self.fakes.get(name)
        if fake is not None and self.round_inputs:
            x = fake_input(name, x, fake.scheme, fake.inputs)
        bias, rows = self.weights.get(f"{name}.bias"), len(x)
        flat = x.dim() == 2
        if flat and self.dtype is torch.bfloat16 and x.device.type == "cpu":
            x = F.pad(x, (0, 0, 0, -rows % ROWS))
        y = F.linear(x.to(self.dtype), self.weight(name).to(self.dtype), None if bias is None else bias.to(self.dtype))
        return y[:rows] if flat else y

    def weight(self, name: str) -> Tensor:
        """[out, in] of a linear as it is published, in the dtype that it has there if it is quantised."""
        weight = self.weights[f"{name}.weight"]
        if (mask := self.masks.get(name)) is not None:
            weight = weight * mask
        fake = self.fakes.get(name)
        return weight if fake is None else fake.weight(weight)
