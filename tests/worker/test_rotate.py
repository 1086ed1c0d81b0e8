"""`rotate`: transformers' own models compute the same with rotated weights as with the original ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from blockwise import layout_of, logits, prepared, transformed
from families import tiny_model

from independent import tensors_of
from kompressor_worker.errors import UserError
from kompressor_worker.passes.rotation import Rotation, hadamard

TOKENS = torch.arange(96).view(2, 48) * 7 % 128
TIED = {"tie_word_embeddings": True}


def uneven(folder: Path) -> dict[str, torch.Tensor]:
    """The folder's state, with norms that are not all ones, and biases that are not all small."""
    torch.manual_seed(1)
    state = tensors_of(folder)
    for name, tensor in state.items():
        if tensor.dim() == 1:
            state[name] = tensor + 0.5 * torch.rand_like(tensor)
    return state


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("llama", {**TIED, "hidden_size": 160, "attention_bias": True, "mlp_bias": True}),  # 20 x 8
        ("llama", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 48}),  # 12 x 8; 12 x 4
        ("qwen2", {"hidden_size": 224}),  # 28 x 8
        ("qwen3", {"hidden_size": 72}),  # 9 x 8
        ("mistral", {}),
        ("phi3", {}),
        ("mixtral", {}),
        ("qwen2_moe", {}),
        ("qwen3_moe", {}),
    ],
)
def test_the_rotated_model_is_the_same_function(family: str, overrides: dict[str, Any]) -> None:
    folder = tiny_model(family, dtype="float32", **overrides)
    state = uneven(folder)
    before = logits(folder, state, TOKENS)
    layout, passes, _ = prepared(layout_of(folder), [{"rotate": {"seed": 3}}])
    rotated = dict(state)
    transformed(layout, passes, rotated)
    assert rotated.keys() == {t.name for stage in layout.stages() for t in stage.tensors}
    after = logits(folder, rotated, TOKENS, tie_word_embeddings=False)
    assert (after - before).abs().max() <= 1e-4
    assert before.std() > 0.05, "logits that say nothing"
    norms = [n for n in rotated if n.endswith(("layernorm.weight", "model.norm.weight"))]
    assert len(norms) == 5
    assert all(bool((rotated[n] == 1).all()) for n in norms)
    turned = [n for n, t in rotated.items() if t.dim() == 2 and n in state and not torch.allclose(t, state[n], atol=1e-3)]
    assert set(turned) == {n for n, t in rotated.items() if t.dim() == 2 and n in state}


def test_tied_embeddings_are_untied_in_the_plan() -> None:
    folder = tiny_model("llama", **TIED)
    before = layout_of(folder)
    after, _, _ = prepared(before, [{"rotate": {}}])
    embedding, *_, head = [linear for linear in after.linears() if linear.kind in ("embedding", "head")]
    assert (head.name, head.shape, head.kind) == ("lm_head", embedding.shape, "head")
    assert after.source_bytes - before.source_bytes == 128 * 128 * 2
    assert after.config["tie_word_embeddings"] is False and before.config["tie_word_embeddings"] is True
    assert not after.tied_embeddings and "32768 bytes more" in after.warnings[-1]


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gemma3_vision", "deepseek_v3", "gpt_oss", "olmo2"])
def test_what_cannot_be_rotated_is_refused(family: str) -> None:
    layout = layout_of(tiny_model(family))
    model_type = json.loads((tiny_model(family) / "config.json").read_text())["model_type"].replace("gemma3", "gemma3_text")
    with pytest.raises(UserError, match=f"rotate: model_type '{model_type.replace('_text_text', '_text')}' .*leave rotate out"):
        prepared(layout, [{"rotate": {}}])


def test_rotate_comes_first() -> None:
    with pytest.raises(UserError, match="put rotate first"):
        prepared(layout_of(tiny_model("llama")), [{"rtn": {"scheme": "W8A8"}}, {"rotate": {}}])


@pytest.mark.parametrize("order", [1, 12, 20, 28])
def test_hadamard_matrices(order: int) -> None:
    matrix = hadamard(order)
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 2, 64, 96, 160, 448, 72, 7, 168])
def test_rotations_are_orthogonal_and_spread_outliers(size: int) -> None:
    eye = torch.eye(size, dtype=torch.float64)
    rotation = Rotation(size, seed=5).rows(eye)
    torch.testing.assert_close(rotation @ rotation.T, eye, atol=1e-12, rtol=0)
    columns = torch.randn(size, 3, dtype=torch.float64)
    torch.testing.assert_close(Rotation(size, seed=5).columns(columns), rotation.T @ columns, atol=1e-12, rtol=0)
    scale = torch.rand(size, dtype=torch.float64)
    torch.testing.assert_close(Rotation(size, seed=5).rows(columns.T, scale), (columns.T * scale) @ rotation, atol=1e-12, rtol=0)
    if size in (2, 64, 96, 160, 448):
        torch.testing.assert_close(rotation.abs(), torch.full_like(rotation, size**-0.5), atol=1e-12, rtol=0)
    if size > 2:
        assert not torch.equal(Rotation(size, seed=6).rows(eye), rotation)
