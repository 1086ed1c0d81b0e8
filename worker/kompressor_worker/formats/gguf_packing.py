"""Codes and scales of GGUF's blocks, taken out of their bytes and put there. Plain torch, the specification of the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kompressor_worker.formats.gguf_types import GgufType


@dataclass(frozen=True)
class Scales:
    """All that blocks hold but their codes. value = scale * small * level - minimum * small_minimum; without groups' integers and without
    a minimum those factors are missing."""

    scale: Tensor
    """[blocks]: fp16, or uint8 exponents (MXFP4)."""
    minimum: Tensor | None = None
    """fp16 [blocks]; Q5_1's is added, not taken away."""
    small: Tensor | None = None
    """int16 [blocks, groups]."""
    small_minimum: Tensor | None = None


def read_codes(blocks: Tensor, kind: GgufType) -> Tensor:
    """uint8 [blocks, columns of a block]: the places in `kind.levels` of uint8 [blocks, bytes]."""
    codes = torch.zeros((len(blocks), kind.block), dtype=torch.uint8, device=blocks.device)
    position = 0
    for plane in kind.planes:
        held = blocks[:, plane.at : plane.at + kind.block * plane.bits // 8].reshape(len(blocks), -1, 1, plane.width)
        shifts = torch.arange(0, 8, plane.bits, dtype=torch.uint8, device=blocks.device).view(1, 1, -1, 1)
        codes |= ((held >> shifts & ((1 << plane.bits) - 1)) << position).reshape(len(blocks), kind.block)
        position += plane.bits
    return codes ^ 0x80 if kind.bits == 8 else codes  # a byte is a signed number, of whose places the first is -128


def write_codes(blocks: Tensor, codes: Tensor, kind: GgufType) -> None:
    """The inverse: into `blocks`."""
    if kind.bits == 8:
        codes = codes ^ 0x80
    for plane in kind.planes:
        part = (codes & ((1 << plane.bits) - 1)).view(len(blocks), -1, 8 // plane.bits, plane.width)
        held = torch.zeros_like(part[:, :, 0])
        for place in range(part.shape[2]):
            held |= part[:, :, place] << (place * plane.bits)
        blocks[:, plane.at : plane.at + kind.block * plane.bits // 8] = held.flatten(1)
        codes = codes >> plane.bits


def read_scales(blocks: Tensor, kind: GgufType) -> Scales:
    if kind.name == "MXFP4":
        return Scales(blocks[:, 0].clone())
    halves = [_half(blocks, at) for at in (kind.scale, kind.minimum) if at is not None]
    if kind.small is None:
        return Scales(*halves)
    held = blocks[:, kind.small_at : kind.small_at + _small_bytes(kind)]
    scale, minimum = halves[0], halves[1] if len(halves) > 1 else None
    match kind.small:
        case "nibbles":
            return Scales(scale, minimum, (held & 15).short(), (held >> 4).short())
        case "bytes":
            return Scales(scale, minimum, held.view(torch.int8).short())
        case "signed six":
            low = torch.cat([held[:, :8] & 15, held[:, :8] >> 4], dim=1)
            high = torch.cat([held[:, 8:] >> shift & 3 for shift in (0, 2, 4, 6)], dim=1)
            return Scales(scale, minimum, (low | high << 4).short() - 32)
        case "six":
            first, second, rest = held[:, :4], held[:, 4:8], held[:, 8:]
            small = torch.cat([first & 63, rest & 15 | first >> 6 << 4], dim=1)
            return Scales(scale, minimum, small.short(), torch.cat([second & 63, rest >> 4 | second >> 6 << 4], dim=1).short())


def write_scales(blocks: Tensor, scales: Scales, kind: GgufType) -> None:
    """The inverse: into `blocks`."""
    if kind.name == "MXFP4":
        blocks[:, 0] = scales.scale
        return
    for at, half in ((kind.scale, scales.scale), (kind.minimum, scales.minimum)):
        if at is not None:
            assert half is not None and half.dtype is torch.float16, kind.name
            blocks[:, at : at + 2] = half.contiguous().view(torch.uint8).view(-1, 2)
    if kind.small is None:
        return
    assert scales.small is not None
    small = scales.small
    match kind.small:
        case "nibbles":
            assert scales.small_minimum is not None
            held = small | scales.small_minimum << 4
        case "bytes":
            held = small & 255
        case "signed six":
            lifted = small + 32
            low, high = lifted & 15, lifted >> 4
            held = torch.cat(
                [low[:, :8] | low[:, 8:] << 4, high[:, :4] | high[:, 4:8] << 2 | high[:, 8:12] << 4 | high[:, 12:] << 6], dim=1
            )
        case "six":
            assert scales.small_minimum is not None
            least = scales.small_minimum
            a, b, c, d = small[:, :4], small[:, 4:], least[:, :4], least[:, 4:]
            held = torch.cat([a | b >> 4 << 6, c | d >> 4 << 6, b & 15 | (d & 15) << 4], dim=1)
    blocks[:, kind.small_at : kind.small_at + _small_bytes(kind)] = held.to(torch.uint8)


def levels_of(kind: GgufType, device: torch.device) -> Tensor:
    """fp32 [codes]."""
    return torch.tensor(kind.levels, dtype=torch.float32, device=device)


def exponent_scale(exponent: Tensor) -> Tensor:
    """fp32 2^(exponent - 128) of uint8: half of what E8M0 says, since MXFP4's levels are doubled."""
    wide = exponent.to(torch.int32)
    return torch.where(wide < 2, 0x00200000 << wide, (wide - 1) << 23).view(torch.float32)


def group_scales(scales: Scales, kind: GgufType) -> tuple[Tensor, Tensor | None]:
    """fp32 [blocks, groups]: the width of a step, and what is taken away from every value; None: nothing."""
    if kind.name == "MXFP4":
        return exponent_scale(scales.scale)[:, None], None
    scale, minimum = scales.scale.float()[:, None], None if scales.minimum is None else scales.minimum.float()[:, None]
    if scales.small is None:
        return scale, None if minimum is None else -minimum
    scale = scale * scales.small.float()
    if minimum is None:
        return scale, None
    assert scales.small_minimum is not None
    return scale, minimum * scales.small_minimum.float()


def _half(blocks: Tensor, at: int) -> Tensor:
    return blocks[:, at : at + 2].contiguous().view(torch.float16).view(-1)


def _small_bytes(kind: GgufType) -> int:
    return 12 if kind.small in ("six", "signed six") else 16
