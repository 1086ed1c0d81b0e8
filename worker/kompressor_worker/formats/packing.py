"""Codes of less than a byte, packed as compressed-tensors stores them: densely, first element in the lowest bits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kompressor_worker.grid import FP4_VALUES


def pack_int32(codes: Tensor, bits: int, dim: Literal[0, 1] = 1) -> Tensor:
    """int8 codes [r, c] as int32 words along `dim`, ceil(n * bits / 32) of them; stored with an offset of 2^(bits-1).

    Element i starts at bit `bits` * i, and goes on in the next word where it does not fit.
    """
    if dim == 0:
        # a clone, not contiguous(): that keeps odd strides where there is one word, and such a tensor cannot be viewed as bytes
        return pack_int32(codes.t(), bits).t().clone(memory_format=torch.contiguous_format)
    rows, columns = codes.shape
    # the offset first: what fills the last word up is zero bits, not zero codes
    stored = torch.nn.functional.pad(codes.to(torch.int64) + (1 << (bits - 1)), (0, -columns % 32))
    stored = stored.reshape(rows, stored.shape[1] // 32, 32)
    words = stored.new_zeros((rows, stored.shape[1], bits))
    for element in range(32):
        word, shift = divmod(element * bits, 32)
        words[..., word] |= stored[..., element] << shift
        if shift + bits > 32:
            words[..., word + 1] |= stored[..., element] >> (32 - shift)
    low = words.flatten(1)[:, : -(-columns * bits // 32)] & 0xFFFFFFFF
    return torch.where(low < 1 << 31, low, low - (1 << 32)).to(torch.int32)


def unpack_int32(words: Tensor, bits: int, count: int, dim: Literal[0, 1] = 1) -> Tensor:
    """The inverse: `count` int8 codes along `dim`."""
    if dim == 0:
        return unpack_int32(words.t(), bits, count).t().contiguous()
    held = torch.nn.functional.pad(words.to(torch.int64) & 0xFFFFFFFF, (0, -words.shape[1] % bits))
    held = held.reshape(words.shape[0], held.shape[1] // bits, bits)
    codes = torch.empty((*held.shape[:2], 32), dtype=torch.int8, device=words.device)
    for element in range(32):
        word, shift = divmod(element * bits, 32)
        stored = held[..., word] >> shift
        if shift + bits > 32:
            stored = stored | held[..., word + 1] << (32 - shift)
        codes[..., element] = (stored & ((1 << bits) - 1)) - (1 << (bits - 1))
    return codes.flatten(1)[:, :count].contiguous()


def pack_fp4(values: Tensor) -> Tensor:
    """fp32 E2M1 values [r, c], c even, as uint8 [r, c / 2]: first element in the low nibble, bit 3 of a nibble is the
    sign."""
    magnitude = torch.bucketize(values.abs(), torch.tensor(FP4_VALUES, device=values.device)).to(torch.uint8)
    nibbles = magnitude | (torch.signbit(values).to(torch.uint8) << 3)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_fp4(packed: Tensor) -> Tensor:
    """The inverse: uint8 [..., c] to fp32 [..., 2 c]."""
    table = torch.tensor([*FP4_VALUES, *(-v for v in FP4_VALUES)], device=packed.device)
    return table[torch.stack((packed & 15, packed >> 4), dim=-1).long()].flatten(-2)
