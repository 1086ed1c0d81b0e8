"""Linears and the KV cache as a block's forward sees them: with published weights, and for evaluation with inputs and cache rounded too."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from kompressor_worker import kernels
from kompressor_worker.batch import Batch
from kompressor_worker.block import KvStatistics
from kompressor_worker.decoder import Decoder
from kompressor_worker.decoder_block import Cache
from kompressor_worker.schemes import Scheme

ROWS = 64
"""On a CPU oneDNN compiles a product in bf16 for each number of rows that it meets, and keeps the code: experts meet all of them."""


class Projection:
    """x W^T + b with `weights` (full names, model dtype), computed in fp32: weights are widened once a step."""

    def __init__(self, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        self.weights, self.dtype = weights, dtype
        self._wide: dict[str, Tensor] = {}

    @classmethod
    def as_a_runtime(cls, weights: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> Projection:
        """For calibration: in the model's `dtype`, as runtimes compute, where the device multiplies bf16 faster than fp32."""
        return cls(weights, dtype if dtype is torch.bfloat16 and kernels.fast_bf16(device) else torch.float32)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        if name not in self._wide:
            self._wide[name] = self.weights[f"{name}.weight"].to(self.dtype)
        bias = self.weights.get(f"{name}.bias")
        rows = len(x)
        if x.dim() == 2 and self.dtype is torch.bfloat16 and x.device.type == "cpu":
            x = F.pad(x, (0, 0, 0, -rows % ROWS))
        y = F.linear(x.to(self.dtype), self._wide[name], None if bias is None else bias.to(self.dtype))
        return y[:rows] if x.dim() == 2 else y

    def forget(self) -> None:
        """The next step has other weights."""
        self._wide.clear()


class Published(Projection):
    """The same with inputs quantised as a runtime does that reads `tensors`, the encoded linears of this block."""

    def __init__(self, weights: Mapping[str, Tensor], schemes: Mapping[str, Scheme], tensors: Mapping[str, Tensor]) -> None:
        super().__init__(weights)
        self._schemes, self._tensors = schemes, tensors

    def __call__(self, name: str, x: Tensor) -> Tensor:
        scheme = self._schemes.get(name)
        if scheme is not None and scheme.inputs != "none":
            x = kernels.fake_quantize_input(
                x,
                scheme.inputs,
                scale=self._tensors.get(f"{name}.input_scale"),
                zero_point=self._tensors.get(f"{name}.input_zero_point"),
                global_scale=self._tensors.get(f"{name}.input_global_scale"),
            )
        return super().__call__(name, x)


def trial(weights: Mapping[str, Tensor], schemes: Mapping[str, Scheme], decoder: Decoder) -> Projection:
    """For weights that are tried out: as calibration computes, or with the inputs of linears in `schemes` rounded as a runtime does it."""
    if any(scheme.inputs != "none" for scheme in schemes.values()):
        return Published(weights, schemes, {})
    return Projection.as_a_runtime(weights, decoder.dtype, decoder.device)


class KvObserver:
    """Measures keys and values on their way into the cache."""

    def __init__(self, kv_heads: int, device: torch.device) -> None:
        self.seen = {kind: KvStatistics(torch.zeros(kv_heads, device=device)) for kind in ("k", "v")}

    def of(self, batch: Batch) -> Cache:
        def cache(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            valid = batch.valid(k.shape[2], k.device)
            for kind, x in (("k", k), ("v", v)):
                by_head = x.transpose(0, 1)  # [KV heads, rows, length, head_dim]
                by_head = by_head.flatten(1, 2) if valid is None else by_head[:, valid]
                if by_head.shape[1]:
                    self.seen[kind].largest = torch.maximum(self.seen[kind].largest, by_head.abs().amax(dim=(1, 2)))
            return k, v

        return cache


def kv_rounding(block: str, tensors: Mapping[str, Tensor]) -> Callable[[Batch], Cache] | None:
    """What a runtime's FP8 cache does to keys and values with the scales that this block publishes; None: it publishes none."""
    scales = tensors.get(f"{block}.self_attn.k_scale"), tensors.get(f"{block}.self_attn.v_scale")
    k_scale, v_scale = scales
    if k_scale is None or v_scale is None:
        return None

    def cache(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.fake_quantize_kv(k, k_scale), kernels.fake_quantize_kv(v, v_scale)

    return lambda batch: cache
