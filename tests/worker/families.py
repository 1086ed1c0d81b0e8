"""Tiny random checkpoints of every family, written by transformers' own `save_pretrained`, and quantised sources made of them.

They are kept in the same cache as the trained models, so most test runs need no transformers for them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models import cached

if TYPE_CHECKING:
    import torch

__all__ = ["FAMILIES", "fp8_block_model", "mxfp4_model", "tiny_model"]

VERSION = 1
"""Part of the cache's key: raise it when the code below changes what comes out."""

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Every linear's sides divide by 128, so that every scheme applies."""

VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "head_dim": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32, "kv_lora_rank": 128,
    "moe_intermediate_size": 128, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    "smollm3": ("SmolLM3Config", {}),
    "gemma2": ("Gemma2Config", {}),
    "gemma3": ("Gemma3TextConfig", {}),
    "gemma3_vision": ("Gemma3Config", {"mm_tokens_per_image": 4}),
    "olmo3": ("Olmo3Config", {}),
    "phi3": ("Phi3Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "mlp_only_layers": [0]},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 256},
    ),
    "deepseek_v2": ("DeepseekV2Config", {**LATENT, "q_lora_rank": None, "num_experts_per_tok": 2}),
    "deepseek_v3": ("DeepseekV3Config", {**LATENT, "q_lora_rank": 128, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "olmo2": ("Olmo2Config", {}),
    "gpt_neox": ("GPTNeoXConfig", {"vocab_size": 131}),
    "falcon": ("FalconConfig", {"head_dim": None}),
}  # fmt: skip
"""Name to config class and what it needs beyond BASE (None: what it cannot take). From olmo2 on: decoders that no data describes."""


def tiny_model(family: str, *, dtype: str = "bfloat16", shard: str | None = None, **overrides: Any) -> Path:
    """Folder of a random checkpoint (seed 0), in the cache, not to be written to. `shard` is save_pretrained's max_shard_size
    ("200KB"); `overrides` go into the config, of the decoder where there is also a vision tower."""
    recipe = {
        "family": family,
        "dtype": dtype,
        "shard": shard,
        "overrides": overrides,
        "base": BASE,
        "extra": FAMILIES[family],
        "vision": VISION,
        "version": (VERSION, version("transformers")),
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    return cached("tiny", f"{family}-{digest}", lambda folder: _save(folder, family, dtype, shard, overrides))


def _save(folder: Path, family: str, dtype: str, shard: str | None, overrides: Mapping[str, Any]) -> None:
    import torch
    import transformers

    name, extra = FAMILIES[family]
    config_class = getattr(transformers, name)
    if "mm_tokens_per_image" in extra:
        config = config_class(text_config={**BASE, **overrides}, vision_config=VISION, **extra)
        model_class: Any = transformers.AutoModelForImageTextToText
    else:
        config = config_class(**{k: v for k, v in {**BASE, **extra, **overrides}.items() if v is not None or k not in BASE})
        model_class = transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and not name.endswith("norm.weight"):  # biases start as zeros: nothing to lose
                torch.nn.init.normal_(parameter, std=0.02)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                torch.nn.init.normal_(buffer, std=0.02)
    model.to(getattr(torch, dtype)).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))


def fp8_block_model(source: Path, block: tuple[int, int] = (128, 128)) -> Path:
    """`source` as its makers would publish it in FP8: every decoder linear F8_E4M3 with `weight_scale_inv`, in the cache."""
    name = f"fp8-{block[0]}x{block[1]}-{source.name}-{VERSION}"
    return cached("tiny", name, lambda folder: _save_fp8(source, folder, block))


def _save_fp8(source: Path, folder: Path, block: tuple[int, int]) -> None:
    from safetensors.torch import load_file, save_file

    tensors: dict[str, torch.Tensor] = {}
    exact = []
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = _fp8_blocks(tensor.float(), block)
        else:
            tensors[name] = tensor
            exact += [name.removesuffix(".weight")] if tensor.dim() == 2 else []
    _copy_but_weights(source, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _set_quantization(
        folder,
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(block),
            "modules_to_not_convert": exact,
        },
    )


def _fp8_blocks(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    rows, columns = weight.shape
    scale = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    encoded = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scale[i, j] = weight[part].abs().max() / 448
            encoded[part] = (weight[part] / scale[i, j]).to(torch.float8_e4m3fn)
    return encoded, scale


def mxfp4_model() -> Path:
    """A tiny gpt-oss as it is published: experts in MXFP4 (`*_blocks`, `*_scales`), everything else bf16, in the cache."""
    source = tiny_model("gpt_oss")
    return cached("tiny", f"mxfp4-{source.name}-{VERSION}", lambda folder: _save_mxfp4(source, folder))


def _save_mxfp4(source: Path, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = _mxfp4(tensor.float())
        else:
            tensors[name] = tensor
    _copy_but_weights(source, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    exact = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    _set_quantization(folder, {"quant_method": "mxfp4", "modules_to_not_convert": exact})


def _mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[E, in, out] to blocks [E, out, in / 32, 16] (low nibble first) and scales [E, out, in / 32] (E8M0, bias 127)."""
    import torch

    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    groups = weight.transpose(1, 2).unflatten(2, (-1, 32))
    exponent = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=2.0**-100))) - 2
    scaled = groups / torch.exp2(exponent).unsqueeze(-1)
    code = (scaled.abs().unsqueeze(-1) - grid).abs().argmin(-1) + 8 * (scaled < 0)
    packed = (code[..., 0::2] | (code[..., 1::2] << 4)).to(torch.uint8)
    return packed.contiguous(), (exponent + 127).to(torch.uint8).contiguous()


def _copy_but_weights(source: Path, folder: Path) -> None:
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder / path.name)


def _set_quantization(folder: Path, quantization: Mapping[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}, indent=2))
