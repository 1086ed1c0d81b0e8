"""Our steps of every family's decoder block against transformers' own modules: fp32, padded rows, windows, scaled rotary embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import BASE
from safetensors.torch import load_file

from kompressor_api.v1alpha1 import SourceLocation
from kompressor_worker.batch import Batch
from kompressor_worker.decoder import Decoder
from kompressor_worker.decoder_block import Block
from kompressor_worker.errors import UserError
from kompressor_worker.forward import Projection
from kompressor_worker.reading import read_layout
from kompressor_worker.sites import sites_of
from kompressor_worker.storage.locations import open_source

SMALL = {**BASE, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_hidden_layers": 3}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
LATENT = {
    "num_key_value_heads": 4, "head_dim": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 20, "kv_lora_rank": 40,
    "q_lora_rank": 36, **MOE, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "rms_norm_eps": 1e-5,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
    "mscale_all_dim": 0.8,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True}),
    "llama3 rotary": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": 7}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    "smollm3": ("SmolLM3Config", {"use_sliding_window": True, "sliding_window": 7, "no_rope_layer_interval": 2}),
    "gemma2": ("Gemma2Config", {"sliding_window": 7, "query_pre_attn_scalar": 48, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "olmo3": ("Olmo3Config", {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "phi3": ("Phi3Config", {"partial_rotary_factor": 0.5, "sliding_window": None}),
    "mixtral": ("MixtralConfig", {**MOE, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**MOE, "head_dim": 32, "num_experts": 4, "shared_expert_intermediate_size": 80, "decoder_sparse_step": 2, "mlp_only_layers": []},
    ),
    "qwen2_moe normalised": (
        "Qwen2MoeConfig",
        {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 80, "qkv_bias": False, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        {**LATENT, "q_lora_rank": None, "n_routed_experts": 6, "n_shared_experts": 2, "routed_scaling_factor": 1.7},
    ),
    "deepseek_v2 in groups, stretched": (
        "DeepseekV2Config",
        {**LATENT, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "rope_parameters": {**YARN, "mscale": 0.7}},
    ),
    "deepseek_v3": ("DeepseekV3Config", {**LATENT, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5}),
    "deepseek_v3 by halves, stretched": (
        "DeepseekV3Config",
        {
            **LATENT,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "rope_interleave": False,
            "norm_topk_prob": False,
            "rope_parameters": {**YARN, "mscale": 1.0},
        },
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**MOE, "num_experts": 4, "norm_topk_prob": False, "mlp_only_layers": [1]}),
}
LENGTHS = (24, 17)


def saved(case: str, folder: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    name, extra = CASES[case]
    torch.manual_seed(3)
    config = getattr(transformers, name)(**{**SMALL, **extra}, initializer_range=0.2)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.6, std=0.3)  # norms and biases that matter
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.5)
    model.eval().to(dtype).save_pretrained(folder)
    return model


def layout_of(folder: Path) -> Any:
    return read_layout(open_source(SourceLocation(uri=f"file://{folder}"), {}))


def ours(folder: Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Final hidden states [rows, length, hidden] before the final norm; products in `dtype`."""
    layout = layout_of(folder)
    weights = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    decoder, project = Decoder(layout, torch.device("cpu")), Projection(weights, dtype)
    batch = Batch(LENGTHS, {"hidden": decoder.embed(weights["model.embed_tokens.weight"][tokens])})
    for number, unit in enumerate(u for u in layout.units if ".layers." in u.name):
        block = Block(decoder, number, unit)
        for step in block.steps:
            sites = {site.name: site for site in sites_of(block, step, ("range",))}
            for name, x in block.inputs(step, batch, weights):
                sites[name].statistics.add(x)
            block.advance(step, batch, weights, project)
    return batch.state["hidden"]


@pytest.mark.parametrize("case", CASES)
def test_the_steps_are_the_models_function(case: str, tmp_path: Path) -> None:
    model = saved(case, tmp_path)
    tokens = torch.randint(3, 120, (2, max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(input_ids=tokens, output_hidden_states=True, use_cache=False)
        got = ours(tmp_path, tokens)
        normed = Decoder(layout_of(tmp_path), torch.device("cpu")).norm(got, model.get_decoder().norm.weight)
    torch.testing.assert_close(normed[0], expected.hidden_states[-1][0], rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(normed[1, : LENGTHS[1]], expected.hidden_states[-1][1, : LENGTHS[1]], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("case", CASES)
def test_in_bf16_the_steps_are_as_near_to_the_function_as_the_model_itself(case: str, tmp_path: Path) -> None:
    model = saved(case, tmp_path, torch.bfloat16)
    tokens = torch.randint(3, 120, (2, max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    norm = Decoder(layout_of(tmp_path), torch.device("cpu")).norm
    with torch.inference_mode():
        native = model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states[-1]
        exact = model.float()(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states[-1]
        got = norm(ours(tmp_path, tokens, torch.bfloat16), model.get_decoder().norm.weight)

    def distance(h: torch.Tensor) -> float:
        return float(sum((h[row, :n] - exact[row, :n]).square().sum() for row, n in enumerate(LENGTHS))) ** 0.5

    assert 0 < distance(got) < 1.5 * distance(native) < 0.2 * float(exact.norm())


def test_padding_and_excluded_rows_count_in_no_statistic(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    layout = layout_of(tmp_path)
    decoder = Decoder(layout, torch.device("cpu"))
    block = Block(decoder, 0, layout.units[1])
    weights = load_file(next(tmp_path.glob("*.safetensors")))
    batch = Batch((5, 3, 4), {"hidden": torch.randn(3, 5, 64)}, excluded=(False, False, True))
    ((_, x),) = block.inputs(block.steps[0], batch, weights)
    assert len(x) == 5 + 3
    ((name, x),) = block.inputs(block.steps[0], Batch((5, 5, 5), batch.state), weights)
    assert name == block.steps[0].layout.name and len(x) == 15


def test_a_decoder_whose_function_is_unknown_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.StableLmConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model_type 'stablelm' cannot be run .* use passes without calibration"):
        Decoder(layout_of(tmp_path), torch.device("cpu"))
