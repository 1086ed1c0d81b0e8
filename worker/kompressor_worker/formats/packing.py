"""Codes of less than a byte, packed as compressed-tensors stores them: densely, first element in the lowest bits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kompressor_worker.grid import FP4_VALUES


def pack_int32(codes: Tensor, bits: int, dim: Literal[0, 1] = 1) -> Tensor:
    """int8 codes [r, c] as int32 words along `dim`, ceil(n * bits / 32) of them; stored with an offset of 2^(bits-1).

    Element i starts at bit `bits` * i. `bits` is 4 or 8, so that no element straddles a word.
    """
    if dim == 0:
        # a clone, not contiguous(): that keeps odd strides where there is one word, and such a tensor cannot be viewed as bytes
        return pack_int32(codes.t(), bits).t().clone(memory_format=torch.contiguous_format)
    per_word = _per_word(bits)
    # the offset first: what fills the last word up is zero bits, not zero codes
    stored = torch.nn.functional.pad(codes.to(torch.int32) + (1 << (bits - 1)), (0, -codes.shape[1] % per_word))
    words = stored.reshape(codes.shape[0], stored.shape[1] // per_word, per_word) << _shifts(bits, codes)
    return words.sum(dim=-1, dtype=torch.int32)


def unpack_int32(words: Tensor, bits: int, count: int, dim: Literal[0, 1] = 1) -> Tensor:
    """The inverse: `count` int8 codes along `dim`."""
    if dim == 0:
        return unpack_int32(words.t(), bits, count).t().contiguous()
    per_word = _per_word(bits)
    stored = (words[..., None] >> _shifts(bits, words)) & ((1 << bits) - 1)
    codes = stored.reshape(words.shape[0], words.shape[1] * per_word) - (1 << (bits - 1))
    return codes[:, :count].to(torch.int8)


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


def _shifts(bits: int, like: Tensor) -> Tensor:
    return torch.arange(0, 32, bits, dtype=torch.int32, device=like.device)


def _per_word(bits: int) -> int:
    assert bits in (4, 8), f"packing of {bits}-bit codes"
    return 32 // bits
