"""Where products of bf16 matrices are faster than those of fp32: a GPU with tensor cores for them, a CPU with instructions for them."""

from __future__ import annotations

from functools import cache

import torch

from kompressor_worker.processor import multiplies_bf16


@cache
def fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return multiplies_bf16()
