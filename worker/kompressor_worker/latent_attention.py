"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): queries, and keys with values, out of latents narrower than all heads.

Three steps come before the output projection. `latents`: what reads the block's norm; queries are whole there in models that have no
latent for them. `queries` and `keys_values`: what reads each latent behind a norm of its own. A head's query and key are two parts, one
without position and one that rotary embedding turns; the key's turned part comes with the latent and is the same for all heads.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kompressor_worker.attention import attend, rotate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kompressor_worker.decoder import Decoder
    from kompressor_worker.decoder_block import Linear, Step

NORMS = {"queries": "self_attn.q_a_layernorm", "keys_values": "self_attn.kv_a_layernorm"}
"""By step: the norm that makes its input."""
NORM_EPS = 1e-6
"""Theirs, whatever config.json says of the others: transformers builds them so."""
STATE = ("latent_q", "latent_kv")
"""Between the steps: the queries, or what they are made of; what keys and values are made of, with the key's turned part behind it."""


class LatentAttention:
    """Of one layer."""

    def __init__(self, decoder: Decoder, prefix: str) -> None:
        config = decoder.config
        self.decoder, self.prefix = decoder, prefix
        self.heads = decoder.heads
        self.plain, self.turned, self.value = (int(config.qk_nope_head_dim), int(config.qk_rope_head_dim), int(config.v_head_dim))
        self.rank = int(config.kv_lora_rank)
        self.paired = bool(getattr(config, "rope_interleave", True))
        """Whether neighbouring channels are turned together, else the two halves."""
        self.scale = softmax_scale(config)

    def input(self, step: Step, state: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
        """[rows, length, rank] of a step that reads a latent, in the model's dtype."""
        x = state["latent_q"] if step.name == "queries" else state["latent_kv"][..., : self.rank]
        return self.decoder.norm(x, weights[f"{self.prefix}{NORMS[step.name]}.weight"], NORM_EPS).to(self.decoder.dtype)

    def advance(self, step: Step, x: Tensor, state: dict[str, Tensor], length: int, layer: int, linear: Linear) -> None:
        """The step's outputs; after the last of them `attention`, as of every other family."""
        names, dtype = [each.name for each in step.layout.linears], self.decoder.dtype
        match step.name:
            case "latents":
                state |= {name: linear(each, x).to(dtype) for name, each in zip(STATE, names, strict=True)}
            case "queries":
                state["latent_q"] = linear(names[0], x).to(dtype)
            case "keys_values":
                q, k, v = self._heads(state, linear(names[0], x), length, layer)
                seen = attend(q, k, pad(v, (0, q.shape[-1] - self.value)), self.scale, None, None)  # as wide: the kernel for that is lean
                state["attention"] = seen.view(*seen.shape[:-1], self.heads, -1)[..., : self.value].flatten(-2).to(dtype)
                for name in STATE:
                    del state[name]

    def _heads(self, state: Mapping[str, Tensor], expanded: Tensor, length: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys [rows, heads, length, plain + turned] and values [rows, heads, length, value]."""
        rows, dtype = len(expanded), expanded.dtype
        q = state["latent_q"].to(dtype).view(rows, length, self.heads, -1).transpose(1, 2)
        expanded = expanded.view(rows, length, self.heads, -1).transpose(1, 2)
        key = state["latent_kv"][..., self.rank :].to(dtype).view(rows, 1, length, self.turned)
        cos, sin = self.decoder.positions(length, layer)
        turned, key = (rotate(self._halves(part), cos, sin).to(dtype) for part in (q[..., self.plain :], key))
        queries = torch.cat((q[..., : self.plain], turned), dim=-1)
        keys = torch.cat((expanded[..., : self.plain], key.expand(-1, self.heads, -1, -1)), dim=-1)
        return queries, keys, expanded[..., self.plain :]

    def _halves(self, x: Tensor) -> Tensor:
        """Channels so ordered that those turned together are half the width apart; scores do not depend on their order."""
        return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1) if self.paired else x

    def value_rows(self) -> tuple[int, ...]:
        """By input column of the output projection: the row of the keys' and values' projection that makes it."""
        width = self.plain + self.value
        return tuple(head * width + self.plain + channel for head in range(self.heads) for channel in range(self.value))


def softmax_scale(config: Any) -> float:
    """Of scores. Rotary embeddings that are stretched with a temperature (YaRN's `mscale_all_dim`) have it squared in here."""
    scale = math.pow(int(config.qk_nope_head_dim) + int(config.qk_rope_head_dim), -0.5)
    rope = getattr(config, "rope_parameters", None) or {}
    temperature = float(rope.get("mscale_all_dim", 0)) if rope.get("rope_type", "default") != "default" else 0
    if not temperature or rope["factor"] <= 1:
        return scale
    return scale * (0.1 * temperature * math.log(float(rope["factor"])) + 1.0) ** 2
