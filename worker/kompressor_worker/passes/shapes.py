"""Which shapes a scheme's loaders read, checked on headers before a weight is read. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import gcd

from kompressor_worker.errors import UserError
from kompressor_worker.layout import LinearLayout, ModelLayout
from kompressor_worker.schemes import Scheme

USUAL_GROUPS = (128, 64, 32)
"""Group sizes for which vLLM has its fastest kernels."""


def check_shapes(layout: ModelLayout, linears: Sequence[LinearLayout], scheme: Scheme) -> None:
    """Raises UserError for the first linear that `scheme` cannot hold in a form that its loaders read."""
    refuse_other_format(layout, scheme)
    for linear in linears:
        if 0 in linear.shape:
            raise UserError(f"{linear.name}: weight {list(linear.shape)} is empty; list it under ignore")
        match scheme.format:
            case "pack-quantized":
                _check_group(linear, scheme)
                _check_packing(linear, scheme)
            case "mxfp4-pack-quantized" | "nvfp4-pack-quantized":
                _check_group(linear, scheme)
        if scheme.calibrated is not None and linear.kind == "head":
            raise UserError(f"{linear.name}: {scheme.name} needs its input measured, and the head's is not; choose FP8_DYNAMIC or W8A8")
        if scheme.calibrated is not None and linear.absorbed:
            raise UserError(
                f"{linear.name}: vLLM learns this weight by running an identity through it, whose ones {scheme.name}'s calibrated scale of "
                "the input cuts off; list it under ignore, or choose FP8_DYNAMIC or W8A8"
            )
        if scheme.inputs in ("int8_tensor", "int8_tensor_asym") and is_routed_expert(linear.name):
            raise UserError(
                f"{linear.name}: no loader reads routed experts in {scheme.name}; list them under ignore, or choose FP8, or W8A8 for vLLM"
            )
    if scheme.block is not None:
        _check_blocks(layout, linears, scheme.block)


def refuse_other_format(layout: ModelLayout, scheme: Scheme) -> None:
    """Raises UserError where the result's files know nothing of it."""
    if (scheme.format == "gguf") == (layout.file_format == "gguf"):
        return
    if layout.file_format == "gguf":
        raise UserError(f"{scheme.name}: no type of GGUF files; choose one such as Q4_K, or output.format compressed-tensors")
    raise UserError(f"{scheme.name}: a type of GGUF files alone; set output.format gguf, or choose a scheme such as W4A16")


def _check_group(linear: LinearLayout, scheme: Scheme) -> None:
    group, columns = scheme.group_size, linear.shape[1]
    if group is None or columns % group == 0:
        return
    if not scheme.choosable_groups:
        raise UserError(
            f"{linear.name}: {columns} columns not divisible by {scheme.name}'s groups of {group}; "
            "list it under ignore, or choose another scheme"
        )
    fitting = [str(size) for size in USUAL_GROUPS if columns % size == 0]
    choice = ", ".join([*fitting, "or -1"]) if fitting else "-1"
    raise UserError(f"{linear.name}: {columns} columns not divisible by groupSize {group}; choose {choice}, or list it under ignore")


def _check_packing(linear: LinearLayout, scheme: Scheme) -> None:
    rows, columns = linear.shape
    step = 32 // gcd(32, scheme.bits)  # so many codes end where a word ends
    if columns % step:
        raise UserError(
            f"{linear.name}: {columns} columns do not fill the 32-bit words of {scheme.name} (multiples of {step} do); "
            "list it under ignore, or choose W8A8 or FP8_DYNAMIC"
        )
    if not scheme.symmetric and rows % step:
        raise UserError(
            f"{linear.name}: the zero points of {rows} rows do not fill the 32-bit words of {scheme.name} "
            f"(multiples of {step} do); list it under ignore, or choose W4A16"
        )


def _check_blocks(layout: ModelLayout, linears: Sequence[LinearLayout], block: tuple[int, int]) -> None:
    """vLLM's `validate_fp8_block_shape` and `validate_fp8_block_shape_moe`: whole blocks of columns, and of the rows of whatever another
    matrix is appended to."""
    height, width = block
    remedy = "list it under ignore, or choose FP8_DYNAMIC"
    last = {linear.fused: linear.name for linear in layout.linears() if linear.fused is not None}
    for linear in linears:
        rows, columns = linear.shape
        if columns % width:
            raise UserError(f"{linear.name}: {columns} columns not divisible by FP8_BLOCK's {width}; {remedy}")
        followed = linear.fused is not None and (is_routed_expert(linear.name) or last[linear.fused] != linear.name)
        parts = [rows] if followed else stored_as_one(linear, layout)[:-1]
        for part in parts:
            if part % height:
                raise UserError(
                    f"{linear.name}: {part} rows not divisible by FP8_BLOCK's {height}, and loaders put more rows after them; {remedy}"
                )


def stored_as_one(linear: LinearLayout, layout: ModelLayout) -> list[int]:
    """Rows of the matrices in a weight that the checkpoint itself holds fused, as Phi-3's qkv_proj and gate_up_proj; else all its rows."""
    rows = linear.shape[0]
    last = linear.name.rpartition(".")[2]
    if last == "gate_up_proj":
        return [rows // 2, rows // 2]
    config = layout.config.get("text_config", layout.config)
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if last != "qkv_proj" or not heads or not groups:
        return [rows]
    width = rows // (heads + 2 * groups)
    return [heads * width, groups * width, groups * width]


def is_routed_expert(name: str) -> bool:
    return re.search(r"\.experts\.\d+\.", name) is not None
