"""The layout of models whose family nobody knows, by the shapes of their tensors."""

from __future__ import annotations

import json

from families import tiny_model
from sources import MemorySource, folder_source, safetensors_bytes
from test_layout_families import placed_names

from kompressor_worker.reading import read_layout


def test_unknown_family_by_shape() -> None:
    layout = read_layout(folder_source(tiny_model("olmo2")))
    assert layout.family is None
    assert len(layout.warnings) == 1
    text = "model_type 'olmo2' is not a known family: laid out by tensor shape, 2 blocks at model.layers.*"
    assert text in layout.warnings[0]
    assert [unit.name for unit in layout.units] == ["embeddings", "model.layers.0", "model.layers.1", "head"]
    block = layout.units[1]
    assert [len(stage.linears) for stage in block.stages] == [0] + [1] * 7
    assert all(linear.fused is None for linear in layout.linears())
    assert [x.kind for x in layout.linears()] == ["embedding", *["linear"] * 14, "head"]


def test_unknown_mixture_with_eyes_by_shape() -> None:
    matrix, vector = ("BF16", (8, 8)), ("BF16", (8,))
    tensors = {
        "model.tok_embeddings.weight": matrix,
        "model.norm.weight": vector,
        "output.weight": matrix,
        "visual.blocks.0.attn.weight": ("BF16", (80, 80)),
        **{
            f"model.layers.{i}.{name}": kind
            for i in range(2)
            for name, kind in {
                "attn.wq.weight": matrix,
                "attn.wq.bias": vector,
                "ln_1.weight": matrix,
                "mlp.gate.weight": matrix,
                "mlp.gate_proj.weight": matrix,
                "conv1d.weight": matrix,
                "q_lora.weight": matrix,
                "experts.3.up.weight": matrix,
                "A_log": matrix,
            }.items()
        },
    }
    config = {"model_type": "novel", "num_hidden_layers": 3}
    source = MemorySource({"config.json": json.dumps(config).encode(), "model.safetensors": safetensors_bytes(tensors)})
    layout = read_layout(source)
    assert placed_names(layout) == sorted(tensors)
    assert [unit.name for unit in layout.units] == [
        "embeddings", "model.layers.0", "model.layers.1", "head", "visual.blocks.0",
    ]  # fmt: skip
    assert [x.name for s in layout.units[1].stages for x in s.linears] == [
        "model.layers.0.attn.wq",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.experts.3.up",
    ]
    wq = "model.layers.0.attn.wq"
    assert [t.name for t in layout.units[1].stages[1].tensors] == [f"{wq}.weight", f"{wq}.bias"]
    assert "(config.json says num_hidden_layers 3)" in layout.warnings[0]
    assert [x.kind for x in layout.linears()][-1] == "head"
