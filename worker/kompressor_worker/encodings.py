"""What the stored tensors mean: plain, FP8 in blocks, MXFP4; and which quantised checkpoints cannot be started from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from kompressor_api.names import Reason
from kompressor_worker.architectures import text_config
from kompressor_worker.errors import CorruptSource, UserError
from kompressor_worker.layout import SourceTensor, StoredTensor

__all__ = ["decoded_dtype", "source_tensors"]

FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Names in config.json to names in safetensors."""


def source_tensors(config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> dict[str, SourceTensor]:
    """The tensors as the model sees them, by name, in stored order.

    Raises UserError (a format that cannot be decoded), CorruptSource."""
    quantization = _quantization(config)
    method = quantization.get("quant_method")
    dtype = decoded_dtype(config, stored)
    if method is None:
        found = {name: _plain(tensor) for name, tensor in stored.items()}
    elif method == "fp8" and quantization.get("weight_block_size"):
        found = _fp8_block(_block(quantization), dtype, stored)
    elif method == "mxfp4":
        found = _mxfp4(dtype, stored)
    else:
        raise UserError(
            f"config.json: quantization_config.quant_method {_described(quantization)} cannot be decoded; "
            "start from the unquantised checkpoint (fp32, fp16, bf16), FP8 in blocks or MXFP4",
            Reason.UNSUPPORTED_MODEL,
        )
    for tensor in found.values():
        if tensor.dtype.startswith(("F8", "F4", "F6")):
            raise UserError(
                f"{tensor.name}: stored as {tensor.dtype}, and config.json's quantization_config does not say how; "
                "start from the unquantised checkpoint",
                Reason.UNSUPPORTED_MODEL,
            )
    return found


def decoded_dtype(config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> str:
    """BF16, F16 or F32: what most bytes are stored in, or, in a quantised checkpoint, what config.json says."""
    if not _quantization(config):
        held = Counter[str]()
        for tensor in stored.values():
            if tensor.dtype in FLOATS.values():
                held[tensor.dtype] += tensor.nbytes
        if held:
            return held.most_common(1)[0][0]
    for place in (config, text_config(config)):
        name = place.get("dtype") or place.get("torch_dtype")
        if isinstance(name, str) and name.removeprefix("torch.") in FLOATS:
            return FLOATS[name.removeprefix("torch.")]
    return "BF16"


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for place in (config, text_config(config)):
        for key in ("quantization_config", "compression_config"):
            value = place.get(key)
            if isinstance(value, dict) and value:
                return {"quant_method": "unknown", **value}
    return {}


def _described(quantization: Mapping[str, Any]) -> str:
    method = str(quantization["quant_method"])
    if method == "fp8":
        return "fp8 without weight_block_size"
    return f"{method} ({quantization['format']})" if "format" in quantization else method


def _plain(tensor: StoredTensor) -> SourceTensor:
    return SourceTensor(tensor.name, tensor.dtype, tensor.shape, (tensor,))


def _block(quantization: Mapping[str, Any]) -> tuple[int, int]:
    size = quantization["weight_block_size"]
    if not (isinstance(size, list) and len(size) == 2 and all(type(v) is int and v > 0 for v in size)):
        raise CorruptSource(f"config.json: weight_block_size {size!r} is not [rows, columns]; correct it")
    return size[0], size[1]


def _fp8_block(block: tuple[int, int], dtype: str, stored: Mapping[str, StoredTensor]) -> dict[str, SourceTensor]:
    """DeepSeek's: X F8_E4M3 [out, in] and X_scale_inv [ceil(out/rows), ceil(in/columns)]; weight = X * X_scale_inv."""
    found: dict[str, SourceTensor] = {}
    for name, tensor in stored.items():
        scale = stored.get(f"{name}_scale_inv")
        if name.endswith("_scale_inv"):
            if name.removesuffix("_scale_inv") not in stored:
                raise CorruptSource(f"{name}: a scale without its weight; upload the checkpoint again")
        elif name.endswith((".activation_scale", ".input_scale")):
            raise UserError(
                f"{name}: static activation scales cannot be decoded away; start from the unquantised checkpoint",
                Reason.UNSUPPORTED_MODEL,
            )
        elif scale is None and tensor.dtype == "F8_E4M3":
            raise CorruptSource(f"{name}: F8_E4M3 without {name}_scale_inv; upload the checkpoint again")
        elif scale is None:
            found[name] = _plain(tensor)
        else:
            _check_fp8(block, tensor, scale)
            found[name] = SourceTensor(name, dtype, tensor.shape, (tensor, scale), "fp8_block", block)
    return found


def _check_fp8(block: tuple[int, int], weight: StoredTensor, scale: StoredTensor) -> None:
    if weight.dtype != "F8_E4M3" or len(weight.shape) != 2 or scale.dtype not in FLOATS.values():
        raise UserError(
            f"{weight.name}: {weight.dtype} {list(weight.shape)} with scales in {scale.dtype} is not FP8 in blocks "
            "(F8_E4M3 matrix, scales in F32, F16 or BF16); start from the unquantised checkpoint",
            Reason.UNSUPPORTED_MODEL,
        )
    expected = tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    if scale.shape != expected:
        raise CorruptSource(
            f"{scale.name}: shape {list(scale.shape)}, but {list(weight.shape)} in blocks of {list(block)} needs "
            f"{list(expected)}; correct weight_block_size in config.json"
        )


def _mxfp4(dtype: str, stored: Mapping[str, StoredTensor]) -> dict[str, SourceTensor]:
    """gpt-oss: X_blocks U8 [E, rows, groups, 16] and X_scales U8 [E, rows, groups] are X [E, 32 * groups, rows]."""
    found: dict[str, SourceTensor] = {}
    for name, tensor in stored.items():
        if name.endswith("_scales") and tensor.dtype == "U8":
            if f"{name.removesuffix('_scales')}_blocks" not in stored:
                raise CorruptSource(f"{name}: scales without their blocks; upload the checkpoint again")
        elif name.endswith("_blocks") and tensor.dtype == "U8":
            plain = name.removesuffix("_blocks")
            scales = stored.get(f"{plain}_scales")
            if scales is None:
                raise CorruptSource(f"{name}: blocks without {plain}_scales; upload the checkpoint again")
            if tensor.shape != (*scales.shape, 16) or len(scales.shape) != 3 or scales.dtype != "U8":
                raise CorruptSource(
                    f"{name}: {tensor.dtype} {list(tensor.shape)} and scales {scales.dtype} {list(scales.shape)} are no "
                    "MXFP4 ([E, rows, groups, 16] and [E, rows, groups]); upload the checkpoint again"
                )
            experts, rows, groups, _ = tensor.shape
            found[plain] = SourceTensor(plain, dtype, (experts, 32 * groups, rows), (tensor, scales), "mxfp4")
        else:
            found[name] = _plain(tensor)
    return found
