"""Decoder families as data: which linears a block has, which of them share an input, and what loaders fuse.

Names are those in the files that `save_pretrained` writes and hubs hold, without the block's own prefix
(`model.layers.7.`). A new family is an entry in FAMILIES; code that knows a family by name is a mistake.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kompressor_api.names import Reason
from kompressor_worker.errors import UserError
from kompressor_worker.family import Experts, Family, Group, Linear, Scoring, StandIn

__all__ = ["EXPERT_COUNTS", "FAMILIES", "Dimensions", "family_of", "refuse_unknown_forward", "text_config"]

Q = Linear("self_attn.q_proj", "q", "hidden")
K = Linear("self_attn.k_proj", "kv", "hidden")
V = Linear("self_attn.v_proj", "kv", "hidden")
O = Linear("self_attn.o_proj", "hidden", "q")  # noqa: E741
ATTENTION = (Group("self_attn.qkv", (Q, K, V)), Group("self_attn.o", (O,)))


def gated(
    prefix: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj", width: str = "ffn", group: str | None = None
) -> tuple[Group, ...]:
    """The usual feed-forward: down(act(gate(x)) * up(x)). `group`: what the groups' names begin with, where that is not `prefix`."""
    group = prefix if group is None else group
    return (
        Group(f"{group}gate_up", (Linear(prefix + gate, width, "hidden"), Linear(prefix + up, width, "hidden"))),
        Group(f"{group}down", (Linear(prefix + down, "hidden", width),)),
    )


STACKS = {"mlp.experts.gate_up_proj": ("gate_proj", "up_proj"), "mlp.experts.down_proj": ("down_proj",)}
KV_A = Linear("self_attn.kv_a_proj_with_mqa", "kv_rank+rope", "hidden")
KV_B = Linear("self_attn.kv_b_proj", "latent_kv", "kv_rank", absorbed=True)
LATENT = (
    Group("self_attn.latents", (Linear("self_attn.q_a_proj", "q_rank", "hidden"), KV_A)),
    Group("self_attn.queries", (Linear("self_attn.q_b_proj", "latent_q", "q_rank"),)),
    Group("self_attn.keys_values", (KV_B,)),
    Group("self_attn.o", (Linear("self_attn.o_proj", "hidden", "latent_v"),)),
)
LATENT_KV = (Group("self_attn.latents", (Linear("self_attn.q_proj", "latent_q", "hidden"), KV_A), fused=False), *LATENT[2:])


def deepseek(model_type: str, scoring: Scoring, correction: str = "", **defaults: Any) -> Family:
    return Family(
        (model_type,),
        LATENT,
        gated("mlp."),
        Experts(
            "mlp.gate",
            "mlp.experts.{expert}",
            gated("", width="moe_ffn"),
            stacks=STACKS,
            shared=gated("mlp.shared_experts.", width="shared_ffn", group="mlp.shared_"),
            correction=correction,
            scoring=scoring,
        ),
        attention_without={"q_lora_rank": LATENT_KV},
        latent=True,
        defaults={"q_lora_rank": 1536, **defaults},
    )


GEMMA = {"tie_word_embeddings": True}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        ("llama", "ministral"),
        ATTENTION,
        gated("mlp."),
        whole_heads=True,
        stand_in=StandIn("ministral", without=("attention_bias", "mlp_bias"), windowed=True),
    ),
    "mistral": Family(("mistral",), ATTENTION, gated("mlp.")),
    "qwen2": Family(
        ("qwen2", "seed_oss"),
        ATTENTION,
        gated("mlp."),
        derived_head=True,
        stand_in=StandIn(
            "seed_oss",
            {"architectures": ["SeedOssForCausalLM"], "attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
            without=("use_sliding_window",),
        ),
    ),
    "qwen3": Family(("qwen3",), ATTENTION, gated("mlp.")),
    "smollm3": Family(("smollm3",), ATTENTION, gated("mlp."), no_rotary_every=4, defaults={"tie_word_embeddings": True}),
    "gemma2": Family(
        ("gemma2",),
        ATTENTION,
        gated("mlp."),
        norm_offset=1.0,
        post_norms=True,
        scaled_embeddings=True,
        full_attention_every=2,
        whole_heads=True,
        defaults=GEMMA,
    ),
    "gemma3": Family(
        ("gemma3_text",),
        ATTENTION,
        gated("mlp."),
        norm_offset=1.0,
        post_norms=True,
        scaled_embeddings=True,
        full_attention_every=6,
        whole_heads=True,
        defaults={
            **GEMMA,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "vocab_size": 262_208,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-6,
        },
    ),
    "olmo3": Family(("olmo3",), ATTENTION, gated("mlp."), post_norms=True, pre_norms=False, whole_norms=True, full_attention_every=4),
    "phi3": Family(
        ("phi3",),
        (Group("self_attn.qkv", (Linear("self_attn.qkv_proj", "q+kv+kv", "hidden"),)), Group("self_attn.o", (O,))),
        (
            Group("mlp.gate_up", (Linear("mlp.gate_up_proj", "ffn+ffn", "hidden"),)),
            Group("mlp.down", (Linear("mlp.down_proj", "hidden", "ffn"),)),
        ),
    ),
    "mixtral": Family(
        ("mixtral",),
        ATTENTION,
        experts=Experts(
            "block_sparse_moe.gate",
            "block_sparse_moe.experts.{expert}",
            gated("", "w1", "w3", "w2"),
            stacks={"mlp.experts.gate_up_proj": ("w1", "w3"), "mlp.experts.down_proj": ("w2",)},
            in_memory="mlp.gate",
        ),
    ),
    "qwen2_moe": Family(
        ("qwen2_moe",),
        ATTENTION,
        gated("mlp."),
        Experts(
            "mlp.gate",
            "mlp.experts.{expert}",
            gated("", width="moe_ffn"),
            stacks=STACKS,
            shared=gated("mlp.shared_expert.", width="shared_ffn", group="mlp.shared_"),
            shared_gate="mlp.shared_expert_gate",
        ),
        defaults={"shared_expert_intermediate_size": 5632},
        derived_head=True,
        stand_in=StandIn("qwen2_moe", {"architectures": ["TransformersMoEForCausalLM"]}),  # vLLM then runs transformers' module
    ),
    "qwen3_moe": Family(
        ("qwen3_moe",),
        ATTENTION,
        gated("mlp."),
        Experts("mlp.gate", "mlp.experts.{expert}", gated("", width="moe_ffn"), stacks=STACKS),
    ),
    "deepseek_v2": deepseek(
        "deepseek_v2",
        Scoring(renormalise=False, best=1, grouped_by=("group_limited_greedy",), scaled=True),
        n_shared_experts=2,
    ),
    "deepseek_v3": deepseek(
        "deepseek_v3",
        Scoring(sigmoid=True, best=2, scaled=True),
        correction="mlp.gate.e_score_correction_bias",
        n_shared_experts=1,
        first_k_dense_replace=3,
    ),
    "gpt_oss": Family(
        ("gpt_oss",),
        ATTENTION,
        experts=Experts(
            "mlp.router",
            stacked=(
                ("mlp.experts.gate_up_proj", ("experts", "hidden", "ffn+ffn")),
                ("mlp.experts.down_proj", ("experts", "ffn", "hidden")),
            ),
        ),
        forward=False,  # attention sinks, and experts that stay stacked
    ),
}


EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Where config.json says how many experts a token may be routed to."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The decoder's part of config.json: all of it, or text_config in a model that also sees or hears."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def family_of(config: Mapping[str, Any]) -> str | None:
    """Key of FAMILIES for a config.json, or None."""
    model_type = text_config(config).get("model_type")
    return next((name for name, family in FAMILIES.items() if model_type in family.model_types), None)


def refuse_unknown_forward(family: str | None, config: Mapping[str, Any]) -> None:
    """Raises UserError for decoders whose function decoder.py does not know, so that nothing can flow through them."""
    if family is None or not FAMILIES[family].forward:
        known = ", ".join(name for name, f in FAMILIES.items() if f.forward)
        raise UserError(
            f"config.json: model_type {text_config(config).get('model_type')!r} cannot be run for calibration or evaluation "
            f"(known: {known}); use passes without calibration (rtn) and leave evaluation out",
            Reason.UNSUPPORTED_MODEL,
        )


class Dimensions:
    """Sizes that config.json promises, by name: hidden, q, kv, ffn, moe_ffn, shared_ffn, experts, vocab, layers, one;
    with latent attention q_rank, kv_rank, rope, and latent_q, latent_kv, latent_v over all heads. None where it promises nothing."""

    def __init__(self, family: Family, config: Mapping[str, Any]) -> None:
        text = {**family.defaults, **text_config(config)}

        def size(*names: str) -> int | None:
            return next((v for n in names if type(v := text.get(n)) is int and v > 0), None)

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        head = size("head_dim") or (hidden // heads if hidden and heads else None)
        kv_heads = size("num_key_value_heads")
        rope, plain, value = size("qk_rope_head_dim"), size("qk_nope_head_dim"), size("v_head_dim")
        shared, width = size("n_shared_experts"), size("moe_intermediate_size")
        self.sizes: dict[str, int | None] = {
            "hidden": hidden,
            "q": heads * head if heads and head else None,
            "kv": kv_heads * head if kv_heads and head else None,
            "ffn": size("intermediate_size"),
            "moe_ffn": size("moe_intermediate_size"),
            "shared_ffn": shared * width if shared and width else size("shared_expert_intermediate_size"),
            "experts": size(*EXPERT_COUNTS),
            "q_rank": size("q_lora_rank"),
            "kv_rank": size("kv_lora_rank"),
            "rope": rope,
            "latent_q": heads * (plain + rope) if heads and plain and rope else None,
            "latent_kv": heads * (plain + value) if heads and plain and value else None,
            "latent_v": heads * value if heads and value else None,
            "vocab": size("vocab_size"),
            "layers": size("num_hidden_layers"),
            "one": 1,
        }

    def __getitem__(self, name: str) -> int | None:
        """`name` may be a sum such as q+kv+kv; None as soon as one term is unknown."""
        total = 0
        for part in name.split("+"):
            term = self.sizes[part]
            if term is None:
                return None
            total += term
        return total
