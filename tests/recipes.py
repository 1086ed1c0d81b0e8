"""What the small models are that `models.py` trains: shapes, and how long and on what they learn."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from corpus import Corpus

__all__ = ["RECIPES", "SHAPE", "Recipe"]

VERSION = 1
"""Part of every recipe's digest: raise it when the training code changes what comes out."""

SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,  # what is learned is then small beside what the weights began as: rounding them shows
}
KINDS = ["sliding_attention", "full_attention"] * 2
GEMMA = {**SHAPE, "intermediate_size": 512, "tie_word_embeddings": True, "query_pre_attn_scalar": 32, "sliding_window": 48}
"""Rows are longer than the window."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides which weights come out, but for the machine's own arithmetic."""

    config: str
    """Class name in transformers."""
    shape: dict[str, Any]
    vocabulary: int = 512
    language: int = 0
    seed: int = 0
    steps: int = 200
    batch: int = 8
    length: int = 128
    learning_rate: float = 2e-3
    version: int = field(default=VERSION)

    @property
    def digest(self) -> str:
        recipe = {**asdict(self), "text": hashlib.sha256(Corpus(self.language).sample.encode()).hexdigest()}
        return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


RECIPES: dict[str, Recipe] = {
    "llama": Recipe("LlamaConfig", {**SHAPE, "intermediate_size": 512}),
    "llama_thin": Recipe(  # trained again and again: as little work a step as there can be
        "LlamaConfig",
        {
            **SHAPE,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_hidden_layers": 2,
            "intermediate_size": 192,
            "initializer_range": 0.02,
        },
        vocabulary=320,
        steps=250,
        length=64,
        learning_rate=4e-3,
    ),
    "llama_learned": Recipe(  # what is learned outweighs what the weights began as, so a few directions of its stream are loud
        "LlamaConfig", {**SHAPE, "intermediate_size": 512, "initializer_range": 0.02}, steps=120
    ),
    "qwen2": Recipe("Qwen2Config", {**{k: v for k, v in SHAPE.items() if k != "head_dim"}, "intermediate_size": 512}, steps=80),
    "qwen3": Recipe("Qwen3Config", {**SHAPE, "intermediate_size": 512, "tie_word_embeddings": True}, steps=80),
    "qwen3_moe": Recipe(
        "Qwen3MoeConfig",
        {
            **SHAPE,
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "output_router_logits": True,
            "router_aux_loss_coef": 0.01,
        },
        steps=150,
    ),
    "qwen2_moe": Recipe(
        "Qwen2MoeConfig",
        {
            **{k: v for k, v in SHAPE.items() if k != "head_dim"},
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 256,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "output_router_logits": True,
            "router_aux_loss_coef": 0.01,
        },
        steps=80,
    ),
    "qwen3_moe_32": Recipe(  # many narrow experts, four of them for a token
        "Qwen3MoeConfig",
        {
            **SHAPE,
            "hidden_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 256,
            "moe_intermediate_size": 64,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "output_router_logits": True,
            "router_aux_loss_coef": 0.01,
        },
        steps=150,
    ),
    "mixtral": Recipe(
        "MixtralConfig",
        {
            **SHAPE,
            "intermediate_size": 256,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "output_router_logits": True,
            "router_aux_loss_coef": 0.01,
        },
        steps=150,
    ),
    "mistral": Recipe("MistralConfig", {**SHAPE, "intermediate_size": 512, "sliding_window": None}, steps=60),
    "gemma2": Recipe("Gemma2Config", {**GEMMA, "layer_types": KINDS}, steps=60),
    "gemma3": Recipe("Gemma3TextConfig", {**GEMMA, "layer_types": KINDS}, steps=60),
    "phi3": Recipe(
        "Phi3Config", {**{k: v for k, v in SHAPE.items() if k != "head_dim"}, "intermediate_size": 512, "sliding_window": None}, steps=60
    ),
}
