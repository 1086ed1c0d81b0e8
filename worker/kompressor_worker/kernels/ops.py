"""The operations as torch.library knows them, and the one dispatch rule between their two implementations."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kompressor_worker.kernels import (
    activations,
    bitmask,
    build,
    butterflies,
    clip_search,
    column_loop,
    compiled,
    eager,
    gguf_compiled,
    gguf_eager,
    gguf_mean,
    gram,
    pruning,
    token_divergence,
)

LIBRARY = torch.library.Library("kompressor", "DEF")  # type: ignore[no-untyped-call]


def _register(schema: str, reference: Callable[..., Any], fast: Callable[..., Any], on_gpu: str | None = None) -> None:
    """On the CPU compiled where it could be built, on CUDA by the module `on_gpu` where there is Triton; else eager. Without a
    kernel for CUDA are the decoders of what is read, which work before anything is moved there, bitmasks and GGUF's blocks, which
    are of what is written, and the search for a grid."""
    name = schema.partition("(")[0]

    def on_cpu(*args: Any) -> Any:
        lib = build.library()
        return reference(*args) if lib is None else fast(lib, *args)

    def on_cuda(*args: Any) -> Any:
        if os.environ.get("KOMPRESSOR_KERNELS") == "eager" or find_spec("triton") is None:
            return reference(*args)
        return getattr(import_module(f"kompressor_worker.kernels.{on_gpu}"), name)(*args)

    LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, on_cpu, "CPU")  # type: ignore[no-untyped-call]
    if on_gpu is not None:
        LIBRARY.impl(name, on_cuda, "CUDA")  # type: ignore[no-untyped-call]


def _quantize_eager(weight: Tensor, scheme: str, group_size: int, shared: Tensor | None) -> tuple[Tensor, ...]:
    return eager.tensors(eager.quantize(weight, eager.scheme_of(scheme, group_size), shared))


def _quantize_compiled(lib: ctypes.CDLL, weight: Tensor, scheme: str, group_size: int, shared: Tensor | None) -> tuple[Tensor, ...]:
    return eager.tensors(compiled.quantize(lib, weight, eager.scheme_of(scheme, group_size), shared))


def _amax_eager(weight: Tensor) -> Tensor:
    return torch.tensor(eager.amax(weight), dtype=torch.float64)


def _amax_compiled(lib: ctypes.CDLL, weight: Tensor) -> Tensor:
    return torch.tensor(compiled.amax(lib, weight), dtype=torch.float64)


_register(
    "quantize(Tensor weight, str scheme, int group_size, Tensor? shared) -> (Tensor, Tensor, Tensor, Tensor)",
    _quantize_eager,
    _quantize_compiled,
    "triton_quantize",
)
_register("amax(Tensor weight) -> Tensor", _amax_eager, _amax_compiled, "triton_quantize")
_register(
    "decode_fp8_block(Tensor weight, Tensor scale_inv, int[] block, ScalarType dtype) -> Tensor",
    eager.decode_fp8_block,
    compiled.decode_fp8_block,
)
_register(
    "decode_mxfp4(Tensor blocks, Tensor scales, ScalarType dtype) -> Tensor",
    eager.decode_mxfp4,
    compiled.decode_mxfp4,
)
_register(
    "gptq(Tensor weight, Tensor factor, Tensor step, Tensor? zero_point, Tensor group_of, bool floating, int bits, int block,"
    " Tensor? mask=None) -> (Tensor, Tensor)",
    column_loop.gptq,
    compiled.gptq,
    "triton_column_loop",
)
_register(
    "gptq_groups(Tensor weight, Tensor factor, int group_size, int bits, bool symmetric, ScalarType dtype, Tensor? mask=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    column_loop.gptq_groups,
    compiled.gptq_groups,
    "triton_column_loop",
)
_register(
    "prune_columns(Tensor weight, Tensor factor, Tensor? mask, int keep, int of) -> (Tensor, Tensor)",
    pruning.prune_columns,
    compiled.prune_columns,
    "triton_pruning",
)
_register(
    "fake_quantize(Tensor x, str kind, Tensor? scale, Tensor? zero_point, Tensor? global_scale) -> Tensor",
    activations.fake_quantize,
    compiled.fake_quantize,
    "triton_activations",
)
_register("hadamard(Tensor x, Tensor? base) -> Tensor", butterflies.hadamard, compiled.hadamard, "triton_activations")
_register("add_gram(Tensor(a!) sums, Tensor x) -> ()", gram.add_gram, compiled.add_gram, "triton_gram")
_register("pack(Tensor codes, int bits) -> Tensor", eager.pack, compiled.pack, "triton_encode")
_register(
    "code_errors(Tensor weight, Tensor codes, Tensor step, Tensor? zero_point, int[] tile) -> Tensor",
    eager.code_errors,
    compiled.code_errors,
    "triton_encode",
)
_register(
    "dequantize(Tensor codes, int bits, int columns, Tensor step, Tensor? zero_point, int[] tile, ScalarType dtype) -> Tensor",
    eager.dequantize,
    compiled.dequantize,
    "triton_encode",
)
_register(
    "tile_errors(Tensor weight, Tensor step, Tensor? zero_point, int bottom, int top) -> Tensor",
    clip_search.tile_errors,
    compiled.tile_errors,
)
_register("pack_bitmask(Tensor weight, int values) -> (Tensor, Tensor, Tensor)", bitmask.pack_bitmask, compiled.pack_bitmask)
_register("unpack_bitmask(Tensor values, Tensor bitmask, int columns) -> Tensor", bitmask.unpack_bitmask, compiled.unpack_bitmask)
_register(
    "divergence(Tensor(a!) student, Tensor? teacher, Tensor targets, str kind, float temperature, float labels, float? cap,"
    " float? teacher_cap, bool gradient) -> Tensor",
    token_divergence.divergence,
    compiled.divergence,
    "triton_divergence",
)
_register(
    "top_k_divergence(Tensor(a!) student, Tensor indices, Tensor log_probabilities, Tensor rest, Tensor targets, str kind,"
    " float temperature, float labels, float? cap, bool gradient) -> Tensor",
    token_divergence.top_k_divergence,
    compiled.top_k_divergence,
    "triton_divergence",
)
_register(
    "gguf_quantize(Tensor weight, Tensor? importance, str type, bool unbiased) -> (Tensor, Tensor)",
    gguf_eager.quantize,
    gguf_compiled.quantize,
)
_register(
    "gguf_dequantize(Tensor data, int columns, str type, ScalarType dtype) -> Tensor", gguf_eager.dequantize, gguf_compiled.dequantize
)
_register("gguf_codes(Tensor data, int columns, str type) -> (Tensor, Tensor, Tensor)", gguf_eager.codes, gguf_compiled.codes)
_register("gguf_pack(Tensor data, Tensor codes, str type) -> Tensor", gguf_eager.pack, gguf_compiled.pack)
_register(
    "gguf_keep_mean(Tensor weight, Tensor data, Tensor variance, Tensor mean, str type) -> Tensor",
    gguf_mean.keep_mean,
    gguf_compiled.keep_mean,
)
_register("gguf_errors(Tensor weight, Tensor data, str type) -> Tensor", gguf_eager.errors, gguf_compiled.errors)
