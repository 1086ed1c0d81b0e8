"""What all blocks of a decoder share: sizes, norms, rotary embeddings, embeddings; and the rows on their way through them.

The families differ in data (architectures.py); rotary embeddings and activations are transformers' own. State is in the model's dtype,
arithmetic is fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kompressor_worker.architectures import FAMILIES, refuse_unknown_forward
from kompressor_worker.layout import ModelLayout
from kompressor_worker.tensors import DTYPES
from kompressor_worker.windows import windows_of


class Decoder:
    """What all blocks of a model share."""

    def __init__(self, layout: ModelLayout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        refuse_unknown_forward(layout.family, layout.config)
        self.family = FAMILIES[layout.family or ""]
        self.config = transformers_config(layout.config)
        self.dtype = DTYPES[layout.dtype]
        self.eps = float(self.config.rms_norm_eps)
        self.heads = int(self.config.num_attention_heads)
        self.kv_heads = int(self.config.num_key_value_heads or self.heads)
        self.head_dim = int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads)
        self.scale = float(getattr(self.config, "query_pre_attn_scalar", None) or self.head_dim) ** -0.5
        self.softcap: float | None = getattr(self.config, "attn_logit_softcapping", None)
        self.final_softcap: float | None = getattr(self.config, "final_logit_softcapping", None)
        self._windows = windows_of(layout.config, self.family, int(self.config.num_hidden_layers))
        self._rotary = rotary_embedding(self.config).to(device)
        self._activation = activation(self.config)

    def embed(self, rows: Tensor) -> Tensor:
        """Hidden states of embedding rows [..., hidden], scaled where the family does, in the model's dtype."""
        if not self.family.scaled_embeddings:
            return rows.to(self.dtype)
        scale = torch.tensor(float(self.config.hidden_size) ** 0.5).to(rows.dtype)
        return (rows * scale).to(self.dtype)

    def norm(self, x: Tensor, weight: Tensor, eps: float | None = None) -> Tensor:
        """RMSNorm in fp32 of x [..., n]. `eps`: where it is not config.json's."""
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + (self.eps if eps is None else eps))
        return x * (weight.float() + self.family.norm_offset)

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        activated = self._activation(gate)
        return activated * up if activated.requires_grad or up.requires_grad else activated.mul_(up)

    def window(self, layer: int) -> int | None:
        """The sliding window of this layer's attention; None: it sees everything before."""
        return self._windows[layer]

    def positions(self, length: int, layer: int) -> tuple[Tensor, Tensor]:
        """cos and sin [1, length, rotary_dim], fp32."""
        like, at = torch.empty(0, device=self.device), torch.arange(length, device=self.device)[None]
        if hasattr(self._rotary, "layer_types"):
            turns = self._rotary(like, at, layer_type=self.config.layer_types[layer])
        else:
            turns = self._rotary(like, at)
        if isinstance(turns, Tensor):  # one complex number for each pair of channels
            return torch.cat((turns.real, turns.real), dim=-1), torch.cat((turns.imag, turns.imag), dim=-1)
        cos, sin = turns
        if (rotated := getattr(self.config, "no_rope_layers", None)) and not rotated[layer]:
            return torch.ones_like(cos), torch.zeros_like(sin)
        return cos, sin


def transformers_config(config: Mapping[str, Any]) -> Any:
    """transformers' config object of the decoder, with its defaults filled in."""
    from transformers import CONFIG_MAPPING

    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert text is not None
    plain = {k: v for k, v in text.items() if k not in ("quantization_config", "architectures")}
    return CONFIG_MAPPING[text["model_type"]].from_dict(plain)


def rotary_embedding(config: Any) -> torch.nn.Module:
    """transformers' module for this config: positions to cos and sin, with the config's own kind of scaling."""
    modeling = import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    found = next(c for name, c in vars(modeling).items() if name.endswith("RotaryEmbedding") and "Vision" not in name)
    module: torch.nn.Module = found(config=config)
    return module


def activation(config: Any) -> Callable[[Tensor], Tensor]:
    from transformers.activations import ACT2FN

    name = getattr(config, "hidden_activation", None) or config.hidden_act
    found: Callable[[Tensor], Tensor] = ACT2FN[name]
    return found
