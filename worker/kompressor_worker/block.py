"""What a pass works on: the materialised tensors of one stage, and what has become of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kompressor_worker.layout import StageLayout
from kompressor_worker.schemes import Scheme

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Encoded:
    """A quantised linear, as the file will hold it."""

    tensors: dict[str, torch.Tensor]
    """Full tensor name (`<linear>.weight_packed` ...) to contiguous CPU tensor."""
    squared_error: float
    """Sum over all elements of (dequantised - original)^2, fp64."""
    squared_norm: float
    """Sum over all elements of original^2, fp64."""
    saturated: int = 0
    """Elements that met the end of the grid though a finer value existed; 0 where the scheme cannot clip."""


@dataclass
class Stage:
    layout: StageLayout
    weights: dict[str, torch.Tensor]
    """Decoded source tensors by full name. A pass that encodes a linear leaves its weight here; the stream drops it
    afterwards."""
    schemes: dict[str, Scheme] = field(default_factory=dict)
    """Linear name to scheme, decided from headers before the stream began."""
    encoded: dict[str, Encoded] = field(default_factory=dict)
    """Linear name to its encoding."""
