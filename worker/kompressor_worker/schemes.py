"""Quantisation schemes as data, under the names that vLLM's users know."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Inputs = Literal["none", "int8_token", "fp8_token", "fp8_group", "int8_tensor", "int8_tensor_asym", "fp8_tensor", "fp4_local"]
"""Activation quantisation at run time: none; dynamic per token; FP8 dynamic per 128 columns; by one calibrated scale (INT8 symmetric, INT8
with a zero point, FP8); FP4 in groups of 16 whose scales are dynamic, below one calibrated scale."""


@dataclass(frozen=True)
class Scheme:
    """How a linear's weight and input are represented; one entry of compressed-tensors' `config_groups`."""

    name: str
    format: str
    bits: int
    type: Literal["int", "float"]
    strategy: Literal["tensor", "channel", "group", "block", "tensor_group"]
    symmetric: bool = True
    group_size: int | None = None
    block: tuple[int, int] | None = None
    inputs: Inputs = "none"
    actorder: bool = False
    """Whether GPTQ took the columns in the order of their activations; groups are of neighbouring columns all the same ("static")."""
    instead_of: str = ""
    """In a GGUF file, what was asked for, where a row is not made of whole blocks of that."""

    @property
    def calibrated(self) -> Literal["histogram", "range"] | None:
        """What must be measured of an input before its scale can be chosen: all of it, or its largest magnitude alone; None: nothing."""
        if self.inputs == "fp4_local":
            return "range"
        return "histogram" if self.inputs in ("int8_tensor", "int8_tensor_asym", "fp8_tensor") else None

    @property
    def choosable_groups(self) -> bool:
        """Whether its readers take other groups than its own: integer weights that are packed."""
        return self.format == "pack-quantized"

    def with_group_size(self, group_size: int) -> Scheme:
        """The same scheme in groups of `group_size` columns; -1: one scale a channel."""
        if group_size == -1:
            return replace(self, strategy="channel", group_size=None)
        return replace(self, strategy="group", group_size=group_size)

    def tile(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of a weight [out, in] that share a scale."""
        if self.strategy == "tensor":
            return max(shape[0], 1), max(shape[1], 1)
        if self.block is not None:
            return self.block
        return 1, self.group_size or max(shape[1], 1)

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scales of a weight [out, in]; tiles at the edges may be partial."""
        rows, columns = self.tile(shape)
        return -(-shape[0] // rows), -(-shape[1] // columns)


COMPRESSED_TENSORS: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("W8A8", "int-quantized", 8, "int", "channel", inputs="int8_token"),
        Scheme("W8A8_STATIC", "int-quantized", 8, "int", "channel", inputs="int8_tensor"),
        Scheme("W8A8_STATIC_ASYM", "int-quantized", 8, "int", "channel", inputs="int8_tensor_asym"),
        Scheme("W8A16", "pack-quantized", 8, "int", "channel"),
        Scheme("W4A16", "pack-quantized", 4, "int", "group", group_size=128),
        Scheme("W4A16_ASYM", "pack-quantized", 4, "int", "group", symmetric=False, group_size=128),
        Scheme("W3A16", "pack-quantized", 3, "int", "group", group_size=128),
        Scheme("W2A16", "pack-quantized", 2, "int", "group", group_size=128),
        Scheme("W2A16_ASYM", "pack-quantized", 2, "int", "group", symmetric=False, group_size=128),
        Scheme("FP8", "float-quantized", 8, "float", "tensor", inputs="fp8_tensor"),
        Scheme("FP8_DYNAMIC", "float-quantized", 8, "float", "channel", inputs="fp8_token"),
        Scheme("FP8_BLOCK", "float-quantized", 8, "float", "block", block=(128, 128), inputs="fp8_group"),
        Scheme("MXFP4", "mxfp4-pack-quantized", 4, "float", "group", group_size=32),
        Scheme("NVFP4A16", "nvfp4-pack-quantized", 4, "float", "tensor_group", group_size=16),
        Scheme("NVFP4", "nvfp4-pack-quantized", 4, "float", "tensor_group", group_size=16, inputs="fp4_local"),
    )
}
"""Those that files of safetensors hold, as compressed-tensors describes them."""

GGUF: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("F16", "gguf", 16, "float", "channel"),
        Scheme("BF16", "gguf", 16, "float", "channel"),
        Scheme("Q8_0", "gguf", 8, "int", "group", group_size=32),
        Scheme("Q6_K", "gguf", 6, "int", "group", group_size=16),
        Scheme("Q5_K", "gguf", 5, "int", "group", symmetric=False, group_size=32),
        Scheme("Q4_K", "gguf", 4, "int", "group", symmetric=False, group_size=32),
        Scheme("Q3_K", "gguf", 3, "int", "group", group_size=16),
        Scheme("Q2_K", "gguf", 2, "int", "group", symmetric=False, group_size=16),
        Scheme("Q5_0", "gguf", 5, "int", "group", group_size=32),
        Scheme("Q5_1", "gguf", 5, "int", "group", symmetric=False, group_size=32),
        Scheme("Q4_0", "gguf", 4, "int", "group", group_size=32),
        Scheme("IQ4_NL", "gguf", 4, "float", "group", group_size=32),
        Scheme("MXFP4_GGUF", "gguf", 4, "float", "group", group_size=32),
    )
}
"""Those of GGUF files, under their tensor types' names (`formats.gguf_types`), but for MXFP4, a name that is taken. Bits and groups are
the inner ones: of most, the scales are themselves quantised, in blocks of 256 columns."""

SCHEMES = COMPRESSED_TENSORS | GGUF
