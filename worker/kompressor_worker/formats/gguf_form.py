"""GGUF: what becomes of a tensor's value on its way into the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["FLOATS", "Form", "formed"]

FLOATS = {"F32": 4, "F16": 2, "BF16": 2}
"""Types without blocks, and bytes a value."""


@dataclass(frozen=True)
class Form:
    """What becomes of a tensor on its way into the file: its rows are put into order, then it is (value + offset) * factor in fp32."""

    tensor: str
    """The file's tensor: one of its own, or the stack of which it is an expert."""
    type: str
    """Of the file: F32, F16, BF16 or a type of blocks. What passes have encoded comes as the file's bytes already (U8)."""
    heads: int = 0
    """Heads whose rows are put into the order of paired rotary embeddings; 0: rows stay."""
    offset: float = 0.0
    factor: float = 1.0
    expert: int | None = None
    """Its number in the stack."""


def formed(value: torch.Tensor, form: Form) -> torch.Tensor:
    """The value as the file has it: contiguous, in the file's dtype; what is bytes already (U8) stays so, row by row."""
    import torch

    if form.heads:
        value = value.reshape(form.heads, 2, -1, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
    if form.offset or form.factor != 1.0:
        value = (value.float() + form.offset) * form.factor
    if value.dtype != torch.uint8:
        value = value.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[form.type])
    return value.contiguous()
