"""Passes that make a model smaller, with others behind them and on models with particulars: biases, a vision tower, heads of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import smaller
import torch
from sources import folder_source
from test_structured_families import SHAPE, W4, compress, model_of, passes_of, require_function, rows_of

from independent import tensors_of
from kompressor_worker.passes.prune_layers import PruneLayers, PruneLayersParams
from kompressor_worker.reading import read_layout

HEADS, WIDTH, HIDDEN = ({name: passes_of("llama")[name]} for name in ("pruneHeads", "pruneWidth", "pruneHidden"))
LAYERS: dict[str, Any] = {"pruneLayers": {"layers": 4}}
BEHIND: dict[str, list[dict[str, Any]]] = {
    "awq": [HEADS, HIDDEN, {"awq": {"scheme": "W4A16", "groupSize": 32}}],
    "smoothQuant and sparseGPT": [WIDTH, HEADS, {"smoothQuant": {}}, {"sparseGPT": {"pattern": "2:4"}}],
    "wanda, gptq": [LAYERS, HIDDEN, WIDTH, {"wanda": {"sparsity": 0.3}}, W4],
}


@pytest.mark.parametrize("case", BEHIND)
@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_other_passes_come_behind(family: str, case: str, tmp_path: Path) -> None:
    source = model_of(family, tmp_path)
    require_function(source, tmp_path / "out", compress(source, tmp_path, BEHIND[case]), 1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "mixtral"])
def test_rotated_behind_it_is_the_same_function(family: str, tmp_path: Path) -> None:
    """Fewer values in fused weights, fewer channels behind a final norm that has changed, a head that is untied."""
    source, found = model_of(family, tmp_path), []
    for name, more in (("plain", []), ("rotated", [{"rotate": {}}])):
        (tmp_path / name).mkdir()
        report = compress(source, tmp_path / name, [LAYERS, HEADS, WIDTH, HIDDEN, *more])
        require_function(source, tmp_path / name / "out", report, 1e-3)
        found.append(report["evaluation"]["kl"])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize("order", [[HEADS, HIDDEN, WIDTH], [HIDDEN, WIDTH, HEADS], [WIDTH, HEADS, HIDDEN]], ids=lambda o: str(len(o)))
def test_any_order_of_what_does_not_look_at_the_whole(order: list[dict[str, Any]], tmp_path: Path) -> None:
    source = model_of("qwen3", tmp_path)
    require_function(source, tmp_path / "out", compress(source, tmp_path, order), 1e-3)


def test_windows_of_the_last_blocks(tmp_path: Path) -> None:
    """6 heads of 16 on 96 channels: what a head's size follows from stays, so it is a Qwen2 still, with windows from the third block on."""
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3, "head_dim": None}
    source = smaller.lively(families.tiny_model("qwen2", **{**SHAPE, **window}), tmp_path / "source")
    planted = smaller.plant(source, tmp_path / "planted", 1, 0.25, 32, 1)
    report = compress(planted, tmp_path, [{"pruneLayers": {"layers": 5}}, HEADS, WIDTH, HIDDEN])
    assert abs(report["evaluation"]["kl"]) < 1e-6
    assert smaller.measure(planted, tmp_path / "out", rows_of("evaluation"))["kl"] < 1e-6
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["head_dim"], config["max_window_layers"]) == ("qwen2", 16, 2)
    assert config["layer_types"] == ["full_attention"] * 2 + ["sliding_attention"] * 3


def test_a_qwen2_whose_head_size_would_not_follow_has_another_name(tmp_path: Path) -> None:
    source = model_of("qwen2", tmp_path)
    report = compress(source, tmp_path, [{"pruneHeads": {"kvHeads": 2}}])
    require_function(source, tmp_path / "out", report, 1e-3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"], config["head_dim"]) == ("seed_oss", ["SeedOssForCausalLM"], 16)


def test_biases_go_with_their_rows(tmp_path: Path) -> None:
    """A Llama with biases everywhere, whose heads must divide its channels: no other model_type is a Llama with biases."""
    shape = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "initializer_range": 0.1}
    biased = families.tiny_model("llama", dtype="float32", attention_bias=True, mlp_bias=True, **shape)
    source = smaller.lively(biased, tmp_path / "source")
    report = compress(source, tmp_path, [{"pruneLayers": {"layers": 3}}, {"pruneHeads": {"kvHeads": 2}}, WIDTH, HIDDEN])
    require_function(source, tmp_path / "out", report, 1e-3)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


def test_a_map_takes_the_bias_too(tmp_path: Path) -> None:
    """What the feed-forward before the blocks that go says, bias and all, is multiplied by the map."""
    folder = families.tiny_model("llama", dtype="float32", num_hidden_layers=4, mlp_bias=True)
    layout, state, chance = read_layout(folder_source(folder)), tensors_of(folder), torch.Generator().manual_seed(0)
    matrix, x = torch.randn(128, 128, generator=chance), torch.randn(5, 256, generator=chance)
    p = PruneLayers(PruneLayersParams(layers=2))
    p.prepare(layout)
    p.decide({"scores": torch.tensor([3.0, 2.0, 1.0, 0.0])})
    p.prepare(layout)
    p.decide({"1": matrix})
    unit = next(u for u in p.prepare(layout).units if u.name == "model.layers.1")
    weights = {name: tensor for name, tensor in state.items() if name.startswith(f"{unit.name}.")}
    said = smaller_output(weights, x)
    p.transform(unit, weights)
    torch.testing.assert_close(smaller_output(weights, x), said @ matrix)
    assert not torch.equal(said, smaller_output(weights, x))


def smaller_output(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, weights["model.layers.1.mlp.down_proj.weight"], weights["model.layers.1.mlp.down_proj.bias"])


def test_the_decoder_of_a_model_that_sees(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    shape = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    source = families.tiny_model("gemma3_vision", dtype="float32", **shape)
    compress(source, tmp_path, [{"pruneLayers": {"layers": 2}}, {"pruneHeads": {"kvHeads": 2}}, WIDTH])
    model, said = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"], said
    text = model.config.text_config
    assert (text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads, text.intermediate_size) == (2, 4, 2, 192)
    with torch.inference_mode():
        assert torch.isfinite(model(input_ids=torch.arange(3, 99).view(2, 48)).logits).all()
