"""Broken and unsuitable checkpoints: each one clear error before a weight is read."""

from __future__ import annotations

from typing import Any

import pytest
from breaks import INDEX, WEIGHTS, Break, Q, config, drop_tensor, edit_header, edit_json, only, put, refused, reshape, without
from families import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from sources import folder_source, safetensors_bytes

from kompressor_worker.errors import CorruptSource, KompressorError, NotFound, UserError
from kompressor_worker.reading import read_layout

UNSUITABLE: list[tuple[str, Break, str]] = [
    ("no config", without("config.json"), "no config.json among generation_config.json, model.safetensors; point"),
    (
        "folder above",
        lambda s: setattr(s, "files", {f"llama/{n}": d for n, d in s.files.items()}),
        "s3://bucket/model: no config.json here, but in llama/; point model.source.uri there",
    ),
    ("pickles", only("pytorch_model.bin"), "only PyTorch pickles; convert: AutoModelForCausalLM.from_pretrained"),
    ("gguf", only("model-Q4.gguf"), "weights only as GGUF, already compressed; start from the original checkpoint"),
    ("lora", only("adapter_model.safetensors"), "a LoRA adapter, not a model; merge it into its base"),
    ("mistral's own", only("consolidated.safetensors"), "consolidated.safetensors is no name that transformers loads"),
    ("gpt2", config(model_type="gpt2"), "model_type 'gpt2' stores its weights transposed, which no loader reads"),
    ("gptq", config(quantization_config={"quant_method": "gptq", "bits": 4}), "quant_method gptq cannot be decoded; start"),
    (
        "compressed",
        config(quantization_config={"quant_method": "compressed-tensors", "format": "pack-quantized"}),
        "compressed-tensors (pack-quantized) cannot be decoded; start from the unquantised checkpoint",
    ),
    ("older key", config(compression_config={"format": "dense"}), "quant_method unknown (dense) cannot be decoded"),
    ("fp8 tensor", config(quantization_config={"quant_method": "fp8"}), "fp8 without weight_block_size cannot be decoded"),
    ("nested", config(text_config={"quantization_config": {"quant_method": "awq"}}), "quant_method awq cannot be decoded"),
    (
        "no blocks",
        lambda s: config(model_type="novel")(s) or put(WEIGHTS, safetensors_bytes({"a.weight": ("BF16", (2, 2))}))(s),
        "model_type 'novel' is not a known family, and no tensor is in a numbered block; known families: llama, mis",
    ),
    (
        "fp8 without config",
        lambda s: edit_header(s, lambda e: e["lm_head.weight"].update(dtype="F8_E4M3", shape=[128, 256])),
        "lm_head.weight: stored as F8_E4M3, and config.json's quantization_config does not say how; start from",
    ),
    (
        "older marker",
        put("quantize_config.json", b"{}"),
        "s3://bucket/model: quantize_config.json says that the weights are quantised; start from the unquantised checkpoint",
    ),
    (
        "four bits",
        lambda s: edit_header(s, lambda e: e[Q].update(dtype="F4")),
        f"model.safetensors: '{Q}': stored as F4; start from a checkpoint in F32, F16 or BF16",
    ),
    (
        "integers",
        lambda s: edit_header(s, lambda e: e[Q].update(dtype="U16")),
        f"{Q}: stored as U16; start from a checkpoint in F32, F16 or BF16",
    ),
]
BROKEN: list[tuple[str, Break, str]] = [
    ("config", put("config.json", b"{"), "config.json: not JSON (Expecting property name"),
    ("layers", config(num_hidden_layers="2"), "config.json: num_hidden_layers '2'; upload config.json and all shards"),
    ("cut", lambda s: s.files.update({WEIGHTS: s.files[WEIGHTS][:-1]}), "model.safetensors: truncated: "),
    ("missing", lambda s: drop_tensor(s, Q), f"{Q} is missing, which llama has; upload config.json and all shards"),
    ("embedding", lambda s: drop_tensor(s, "model.embed_tokens.weight"), "model.embed_tokens.weight is missing"),
    ("norm", lambda s: drop_tensor(s, "model.norm.weight"), "model.norm.weight is missing; upload"),
    ("head", lambda s: drop_tensor(s, "lm_head.weight"), "lm_head.weight is missing, which llama has"),
    ("depth", config(num_hidden_layers=3), "model.layers.2: no tensor of it, though config.json says num_hidden_layers "),
    ("hidden", config(hidden_size=64), "q_proj.weight: shape [256, 128], but config.json says [q=256, hidden=64]; up"),
    ("heads", config(num_attention_heads=8), "q_proj.weight: shape [256, 128], but config.json says [q=512, hidden=128]"),
    ("kv", config(num_key_value_heads=4), "k_proj.weight: shape [128, 128], but config.json says [kv=256, hidden=128]"),
    ("width", config(intermediate_size=512), "gate_proj.weight: shape [256, 128], but config.json says [ffn=512"),
    ("vocabulary", config(vocab_size=130), "model.embed_tokens.weight: shape [128, 128], but config.json says [vocab=130"),
    ("rank", lambda s: reshape(s, Q, [256, 64, 2]), f"{Q}: shape [256, 64, 2], but config.json says [q=256, hidden=128]"),
]


@pytest.mark.parametrize(("change", "message"), [pytest.param(c, m, id=i) for i, c, m in UNSUITABLE])
def test_unsuitable(change: Break, message: str) -> None:
    source = folder_source(tiny_model("llama"))
    change(source)
    assert message in refused(source, UserError)


@pytest.mark.parametrize(("change", "message"), [pytest.param(c, m, id=i) for i, c, m in BROKEN])
def test_broken(change: Break, message: str) -> None:
    source = folder_source(tiny_model("llama"))
    change(source)
    assert message in refused(source, CorruptSource)


def test_no_weights_at_all() -> None:
    source = folder_source(tiny_model("llama"))
    del source.files[WEIGHTS]
    text = f"s3://bucket/model: no {WEIGHTS} and no {INDEX}; upload the weights"
    assert refused(source, NotFound) == text


def test_a_head_is_not_asked_of_a_model_without_one() -> None:
    source = folder_source(tiny_model("llama"))
    drop_tensor(source, "lm_head.weight")
    config(architectures=["LlamaModel"])(source)
    assert [stage.name for stage in read_layout(source).units[-1].stages] == ["model.norm"]


def test_a_key_twice_in_the_config_is_what_json_says_it_is() -> None:
    source = folder_source(tiny_model("llama"))
    source.files["config.json"] = b'{"num_hidden_layers": 9, ' + source.files["config.json"].lstrip()[1:]
    assert len(read_layout(source).units) == 4


def test_blocks_beyond_the_config_are_kept_and_told() -> None:
    source = folder_source(tiny_model("llama"))
    config(num_hidden_layers=1)(source)
    layout = read_layout(source)
    assert layout.units[-1].name == "model.layers.1"
    assert layout.warnings == ("model.layers.1.input_layernorm.weight and 8 more are beyond num_hidden_layers 1; kept as they are",)


def test_experts() -> None:
    source = folder_source(tiny_model("qwen3_moe"))
    drop_tensor(source, "model.layers.1.mlp.experts.2.up_proj.weight")
    assert "model.layers.1.mlp.experts.2.up_proj.weight is missing, which qwen3_moe" in refused(source, CorruptSource)
    source = folder_source(tiny_model("qwen3_moe"))
    edit_json(source, "config.json", lambda c: c.update(num_local_experts=8))
    assert "mlp.gate.weight: shape [4, 128], but config.json says [experts=8, hid" in refused(source, CorruptSource)
    source = folder_source(tiny_model("qwen3_moe"))
    edit_json(source, "config.json", lambda c: c.update(num_local_experts=3))
    assert "mlp.gate.weight: shape [4, 128], but config.json says [experts=3, hid" in refused(source, CorruptSource)


def test_an_expert_that_no_router_row_leads_to() -> None:
    source = folder_source(tiny_model("mixtral", num_local_experts=3))
    name = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    edit_header(source, lambda e: e.update({name: {"dtype": "BF16", "shape": [0, 128], "data_offsets": [0, 0]}}))
    assert f"{name}: the router has no row for this expert; upload" in refused(source, CorruptSource)


KEYS = [
    "architectures", "decoder_sparse_step", "dtype", "head_dim", "hidden_size", "mlp_only_layers", "model_type", "num_attention_heads",
    "num_hidden_layers", "num_local_experts", "quantization_config", "text_config", "tie_word_embeddings", "torch_dtype",
]  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 10**30) | st.floats() | st.text(max_size=3) | st.sampled_from(["fp8", "mxfp4", "float16"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["quant_method", "weight_block_size", "format", "model_type", "dtype"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3), st.sampled_from(["qwen3_moe", "gemma3_vision"]))
def test_no_config_is_a_crash(changes: dict[str, Any], family: str) -> None:
    source = folder_source(tiny_model(family))
    config(**changes)(source)
    try:
        layout = read_layout(source)
    except KompressorError as error:
        assert ";" in str(error), "a remedy"
    else:
        assert sum(len(stage.tensors) for stage in layout.stages()) > 20
