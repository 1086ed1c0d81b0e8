"""The kernels in plain torch that make GGUF's blocks and read them: what the compiled ones must equal bit for bit.

Decoding reads a block once and writes its values once; it and putting codes in their places are bound by memory. Quantising is bound by the
search (`gguf_search`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kompressor_worker.formats import gguf_packing
from kompressor_worker.formats.gguf_types import TYPES, GgufType
from kompressor_worker.kernels import gguf_search

HALVES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
CHUNK = 1 << 18
"""Elements worked on at once."""


def quantize(weight: Tensor, importance: Tensor | None, name: str, unbiased: bool) -> tuple[Tensor, Tensor]:
    """weight [rows, columns], importance fp32 [columns], above zero, to uint8 [rows, bytes] and fp64 [3] on the CPU: sums of (value -
    weight)^2 and of weight^2, and how much is NaN or Inf; if anything is, the weight is taken for zeros."""
    kind, (rows, columns) = TYPES[name], weight.shape
    bad = weight.numel() - int(weight.isfinite().sum())
    if bad:
        weight = torch.zeros_like(weight)
    if name in HALVES:
        data = weight.to(HALVES[name]).contiguous().view(torch.uint8).view(rows, -1)
    else:
        together = max(1, CHUNK // columns)
        parts = [_blocks(weight[at : at + together], importance, kind, unbiased) for at in range(0, rows, together)]
        data = torch.cat(parts) if parts else weight.new_empty((0, columns // kind.block * kind.nbytes), dtype=torch.uint8)
    return data, torch.cat([errors(weight, data, name), torch.tensor([float(bad)], dtype=torch.float64)])


def _blocks(weight: Tensor, importance: Tensor | None, kind: GgufType, unbiased: bool) -> Tensor:
    x = weight.float().reshape(-1, kind.block)
    w = None if importance is None else importance.expand(weight.shape).reshape(x.shape)
    found = gguf_search.search(x, w, kind, unbiased)
    blocks = torch.zeros((len(x), kind.nbytes), dtype=torch.uint8, device=x.device)
    gguf_packing.write_scales(blocks, found.scales, kind)
    gguf_packing.write_codes(blocks, found.codes, kind)
    return blocks.view(len(weight), -1)


def errors(weight: Tensor, data: Tensor, name: str) -> Tensor:
    """fp64 [2] on the CPU: sums of (value - weight)^2 and of weight^2; differences in fp32, squares and sums in fp64."""
    source = weight.float()
    off = dequantize(data, weight.shape[1], name, torch.float32) - source
    return torch.stack([off.double().square().sum(), source.double().square().sum()]).cpu()


def dequantize(data: Tensor, columns: int, name: str, dtype: torch.dtype) -> Tensor:
    """data uint8 [rows, bytes] to [rows, columns] in `dtype`; reckoned in fp32."""
    if name in HALVES:
        return data.contiguous().view(HALVES[name]).view(len(data), columns).to(dtype)
    kind = TYPES[name]
    blocks = data.reshape(-1, kind.nbytes)
    step, low = gguf_packing.group_scales(gguf_packing.read_scales(blocks, kind), kind)
    levels = gguf_packing.levels_of(kind, data.device)[gguf_packing.read_codes(blocks, kind).long()]
    made = levels.view(len(blocks), -1, kind.group) * step[..., None]
    if low is not None:
        made = made - low[..., None]
    return made.to(dtype).view(len(data), columns)


def codes(data: Tensor, columns: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 [rows, columns] with zero in the middle of their range, and fp32 [rows, groups] scale and centre: value = scale * code +
    centre. For types whose levels are even."""
    kind, rows = TYPES[name], len(data)
    blocks = data.reshape(-1, kind.nbytes)
    step, low = gguf_packing.group_scales(gguf_packing.read_scales(blocks, kind), kind)
    middle = 1 << (kind.bits - 1)
    centre = step * float(middle + kind.levels[0])
    if low is not None:
        centre = centre - low
    found = (gguf_packing.read_codes(blocks, kind).to(torch.int16) - middle).to(torch.int8)
    groups = columns // kind.group
    return found.view(rows, columns), step.reshape(rows, groups).contiguous(), centre.reshape(rows, groups).contiguous()


def pack(data: Tensor, codes: Tensor, name: str) -> Tensor:
    """A copy of `data` with these codes, int8 [rows, columns] as `codes` has them."""
    kind = TYPES[name]
    blocks = data.reshape(-1, kind.nbytes).clone()
    places = (codes.to(torch.int16) + (1 << (kind.bits - 1))).to(torch.uint8)
    gguf_packing.write_codes(blocks, places.reshape(-1, kind.block), kind)
    return blocks.view(data.shape)
