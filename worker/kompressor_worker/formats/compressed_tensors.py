"""compressed-tensors: which tensors a quantised linear is stored as, what config.json says of them, and how they are
read back.

Names, shapes and the meaning of `quantization_config` follow compressed-tensors 0.20 (its compressors,
`QuantizationConfig` and `match_targets`), vLLM's and transformers' readers of it. What is needed before a weight is
read works from shapes alone, without torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from kompressor_worker.formats.targets import patterns_for, subtree_patterns
from kompressor_worker.layout import DTYPE_BYTES, KvStrategy, LinearLayout, ModelLayout
from kompressor_worker.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from kompressor_worker import grid

VERSION = "0.20.0"
"""The compressed-tensors release whose format this is; readers do not act on it."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the output, known before there is any."""

    name: str
    dtype: str
    """safetensors' name of it."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def planned_tensors(name: str, shape: tuple[int, int], dtype: str, scheme: Scheme) -> list[PlannedTensor]:
    """The tensors that a linear `name` with a weight of this shape [out, in] and safetensors dtype (BF16, F16, F32) is
    stored as."""
    parts = [*_weight_parts(shape, dtype, scheme), *_input_parts(dtype, scheme)]
    return [PlannedTensor(f"{name}.{suffix}", kind, sizes) for suffix, kind, sizes in parts]


Part = tuple[str, str, tuple[int, ...]]
"""What a tensor is called behind the linear's name, its dtype and shape."""


def _weight_parts(shape: tuple[int, int], dtype: str, scheme: Scheme) -> list[Part]:
    rows, columns = shape
    scales: tuple[int, ...] = (1,) if scheme.strategy == "tensor" else scheme.scale_shape(shape)
    match scheme.format:
        case "int-quantized":
            return [("weight", "I8", (rows, columns)), ("weight_scale", dtype, scales)]
        case "float-quantized":
            return [("weight", "F8_E4M3", (rows, columns)), ("weight_scale", dtype, scales)]
        case "pack-quantized":
            parts: list[Part] = [
                ("weight_packed", "I32", (rows, _words(columns, scheme.bits))),
                ("weight_scale", dtype, scales),
                ("weight_shape", "I64", (2,)),
            ]
            if not scheme.symmetric:
                parts.append(("weight_zero_point", "I32", (_words(rows, scheme.bits), scales[-1])))
            return parts
        case "mxfp4-pack-quantized":
            return [("weight_packed", "U8", (rows, columns // 2)), ("weight_scale", "U8", scales)]
        case "nvfp4-pack-quantized":
            return [
                ("weight_packed", "U8", (rows, columns // 2)),
                ("weight_scale", "F8_E4M3", scales),
                ("weight_global_scale", "F32", (1,)),
            ]
    raise AssertionError(f"{scheme.name}: no layout for format {scheme.format}")


def _input_parts(dtype: str, scheme: Scheme) -> list[Part]:
    """One value each: scales in the weight's dtype, as a reader's parameters are."""
    match scheme.inputs:
        case "int8_tensor" | "fp8_tensor":
            return [("input_scale", dtype, (1,))]
        case "int8_tensor_asym":
            return [("input_scale", dtype, (1,)), ("input_zero_point", "I8", (1,))]
        case "fp4_local":
            return [("input_global_scale", "F32", (1,))]
    return []


def quantization_config(
    linears: Sequence[LinearLayout], schemes: Mapping[str, Scheme], others: Sequence[str] = (), kv_cache: KvStrategy | None = None
) -> dict[str, Any]:
    """`config.json["quantization_config"]` for a model of these linears, those in `schemes` (by name) quantised.

    `kv_cache`: how the scales of an FP8 cache are shared, if there are any (`passes.kv_cache`).
    `others`: modules with matrices that are no linears here and stay exact (`other_modules`): a vision tower, stacked experts.
    One scheme: it targets "Linear", and what stays exact is on the ignore list. Several: each group names its own linears, disjointly, so
    that no reader's order of precedence matters (compressed-tensors sorts targets, vLLM takes the first that matches).
    """
    groups: dict[Scheme, list[str]] = {}
    for linear in linears:
        if linear.name in schemes:
            groups.setdefault(schemes[linear.name], []).append(linear.name)
    names = [linear.name for linear in linears]
    exact = [linear.name for linear in linears if linear.name not in schemes and linear.kind != "embedding"]
    ignore = [*patterns_for(exact, names), *subtree_patterns(others, names, list(schemes))]
    heads = [linear.name for linear in linears if linear.kind == "head"]
    if not any(name.rpartition(".")[2] == "lm_head" or name in schemes for name in heads):
        ignore.insert(0, "lm_head")  # tied to the embeddings, or under an old name in the file: a Linear of this name when loaded
    # transformers takes the first group that speaks of experts for the routed ones; shared experts have the word in their name too
    ordered = sorted(groups.items(), key=lambda group: not any(".experts." in name for name in group[1]))
    targets = [["Linear"]] if len(ordered) == 1 else [patterns_for(members, names) for _, members in ordered]
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": _format({scheme.format for scheme in groups}),
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "config_groups": {
            f"group_{i}": _group(scheme, target) for i, ((scheme, _), target) in enumerate(zip(ordered, targets, strict=True))
        },
        "ignore": ignore,
        "kv_cache_scheme": None if kv_cache is None else _kv_cache_scheme(kv_cache),
        "sparsity_config": {},
        "transform_config": {},
    }


def other_modules(layout: ModelLayout) -> list[str]:
    """Modules with a matrix that is no linear of the decoder, in the model's order: what `quantization_config` calls others."""
    weights = {linear.weight for linear in layout.linears()}
    tensors = (
        tensor for stage in layout.stages() for tensor in stage.tensors if tensor.name.endswith("weight") or tensor.encoding != "made"
    )
    return list(dict.fromkeys(t.name.rpartition(".")[0] for t in tensors if len(t.shape) > 1 and t.name not in weights))


def named_tensors(
    name: str,
    shape: tuple[int, int],
    scheme: Scheme,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """What `planned_tensors` announces of the weight, filled: codes, scales and zero points of a weight [out, in] as a kernel packs them.
    What it announces of the input comes from `passes.inputs`."""
    import torch

    packed = scheme.format in ("pack-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized")
    if scheme.strategy == "tensor":
        scale = scale.reshape(1)
    tensors = {f"{name}.weight_packed" if packed else f"{name}.weight": codes, f"{name}.weight_scale": scale}
    if scheme.format == "pack-quantized":
        tensors[f"{name}.weight_shape"] = torch.tensor(shape, dtype=torch.int64)
    if zero_point is not None:
        tensors[f"{name}.weight_zero_point"] = zero_point
    if scheme.format == "nvfp4-pack-quantized":
        assert global_scale is not None
        tensors[f"{name}.weight_global_scale"] = global_scale
    return tensors


def decode(name: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] in `dtype` that a reader sees: (code - zero point) * scale in fp32, then rounded. `tensors`
    by full name."""
    from kompressor_worker import kernels

    codes, columns, found = codes_and_grid(name, tensors, scheme)
    return kernels.dequantize(codes, columns, found, scheme, dtype)


def codes_and_grid(name: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> tuple[torch.Tensor, int, grid.Grid]:
    """A quantised linear's codes as the file holds them, its columns, and its grid, unpacked. `tensors` by full name."""
    import torch

    from kompressor_worker import grid
    from kompressor_worker.formats import packing

    def tensor(suffix: str) -> torch.Tensor:
        return tensors[f"{name}.{suffix}"]

    zero_point = global_scale = None
    scale = tensor("weight_scale")
    if scheme.strategy == "tensor":
        scale = scale.reshape(1, 1)
    match scheme.format:
        case "int-quantized" | "float-quantized":
            codes = tensor("weight")
            columns = codes.shape[1]
        case "pack-quantized":
            rows, columns = (int(n) for n in tensor("weight_shape"))
            codes = tensor("weight_packed")
            if not scheme.symmetric:
                zero_point = packing.unpack_int32(tensor("weight_zero_point"), scheme.bits, rows, dim=0)
        case "mxfp4-pack-quantized":
            codes, scale = tensor("weight_packed"), grid.mx_scale(scale)
            columns = 2 * codes.shape[1]
        case "nvfp4-pack-quantized":
            codes, global_scale = tensor("weight_packed"), tensor("weight_global_scale")
            columns = 2 * codes.shape[1]
        case _:
            raise AssertionError(f"{scheme.name}: no layout for format {scheme.format}")
    return codes, columns, grid.Grid(scale.to(torch.float32), zero_point, global_scale)


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _format(formats: Collection[str]) -> str:
    """Of the whole model, for formats of its groups; "dense" is the library's name for weights as they were."""
    if len(formats) > 1:
        return "mixed-precision"
    return next(iter(formats), "dense")


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "weights": _weights(scheme),
        "input_activations": _inputs(scheme),
        "output_activations": None,
        "format": scheme.format,
    }


def _weights(scheme: Scheme) -> dict[str, Any]:
    args = _args(scheme.bits, scheme.type, scheme.strategy, scheme.group_size, dynamic=False)
    args["symmetric"] = scheme.symmetric
    if scheme.block is not None:
        args["block_structure"] = list(scheme.block)
    if scheme.format == "mxfp4-pack-quantized":
        args["scale_dtype"] = "torch.uint8"
    if scheme.format == "nvfp4-pack-quantized":
        args["scale_dtype"] = "torch.float8_e4m3fn"
    if not scheme.symmetric:
        args["zp_dtype"] = "torch.int8"
    if scheme.actorder:
        args["actorder"] = "static"
    return args


def _inputs(scheme: Scheme) -> dict[str, Any] | None:
    match scheme.inputs:
        case "none":
            return None
        case "int8_token":
            return _args(8, "int", "token", None, dynamic=True)
        case "fp8_token":
            return _args(8, "float", "token", None, dynamic=True)
        case "fp8_group":
            return _args(8, "float", "group", 128, dynamic=True)
        case "int8_tensor":
            return _args(8, "int", "tensor", None, dynamic=False)
        case "int8_tensor_asym":
            return {**_args(8, "int", "tensor", None, dynamic=False), "symmetric": False, "zp_dtype": "torch.int8"}
        case "fp8_tensor":
            return _args(8, "float", "tensor", None, dynamic=False)
        case "fp4_local":
            return {**_args(4, "float", "tensor_group", 16, dynamic="local"), "scale_dtype": "torch.float8_e4m3fn"}


def _kv_cache_scheme(strategy: KvStrategy) -> dict[str, Any]:
    return _args(8, "float", "attn_head" if strategy == "head" else "tensor", None, dynamic=False)


def _args(bits: int, kind: str, strategy: str, group_size: int | None, *, dynamic: bool | str) -> dict[str, Any]:
    """compressed-tensors' QuantizationArgs, as it writes them itself; keys that it leaves out when they say nothing are
    left out."""
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "group_size": group_size,
        "strategy": strategy,
        "dynamic": dynamic,
    }
