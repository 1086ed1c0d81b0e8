"""The layout of every family, on the files that transformers itself writes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from families import FAMILIES, tiny_model
from sources import MemorySource, folder_source, safetensors_bytes

from kompressor_worker.layout import ModelLayout, StageLayout
from kompressor_worker.reading import read_layout
from kompressor_worker.shards import plan_output

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = [
    ("norms", ()),
    ("self_attn.qkv", QKV),
    ("self_attn.o", ("self_attn.o_proj",)),
    ("mlp.gate_up", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.down", ("mlp.down_proj",)),
]
PHI3 = [
    ("norms", ()),
    ("self_attn.qkv", ("self_attn.qkv_proj",)),
    ("self_attn.o", ("self_attn.o_proj",)),
    ("mlp.gate_up", ("mlp.gate_up_proj",)),
    ("mlp.down", ("mlp.down_proj",)),
]
MIXTRAL = [
    *LLAMA[:3],
    ("block_sparse_moe.gate", ("block_sparse_moe.gate",)),
    *[(f"block_sparse_moe.experts.{e}", tuple(f"block_sparse_moe.experts.{e}.{w}" for w in ("w1", "w3", "w2"))) for e in range(4)],
]
QWEN3_MOE = [
    *LLAMA[:3],
    ("mlp.gate", ("mlp.gate",)),
    *[(f"mlp.experts.{e}", tuple(f"mlp.experts.{e}.{w}_proj" for w in ("gate", "up", "down"))) for e in range(4)],
]
QWEN2_MOE = [
    *QWEN3_MOE[:4],
    ("mlp.shared_gate_up", ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")),
    ("mlp.shared_down", ("mlp.shared_expert.down_proj",)),
    *QWEN3_MOE[4:],
]
DEEPSEEK_V2 = [
    ("norms", ()),
    ("self_attn.latents", ("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa")),
    ("self_attn.keys_values", ("self_attn.kv_b_proj",)),
    ("self_attn.o", ("self_attn.o_proj",)),
    ("mlp.gate", ("mlp.gate",)),
    ("mlp.shared_gate_up", ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")),
    ("mlp.shared_down", ("mlp.shared_experts.down_proj",)),
    *QWEN3_MOE[4:],
]
DEEPSEEK_V3 = [
    ("norms", ()),
    ("self_attn.latents", ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
    ("self_attn.queries", ("self_attn.q_b_proj",)),
    *DEEPSEEK_V2[2:],
]
GPT_OSS = [
    *LLAMA[:3],
    ("mlp.router", ("mlp.router",)),
    ("mlp.experts.gate_up_proj", ()),
    ("mlp.experts.down_proj", ()),
]
LAST_BLOCK = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3", "gemma3_vision", "olmo3"), LLAMA),
    "phi3": PHI3,
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "gpt_oss": GPT_OSS,
}
LATENT = ("deepseek_v2", "deepseek_v3")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", *LATENT)
TIED = ("qwen3", "smollm3", "gemma2", "gemma3", "gemma3_vision")


def stored_names(folder: Path) -> list[str]:
    from safetensors import safe_open

    names: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names += tensors.keys()
    return sorted(names)


def placed_names(layout: ModelLayout) -> list[str]:
    return sorted(s.name for stage in layout.stages() for tensor in stage.tensors for s in tensor.stored)


def shape_of(stage: StageLayout, block: str) -> tuple[str, tuple[str, ...]]:
    return stage.name.removeprefix(f"{block}."), tuple(x.name.removeprefix(f"{block}.") for x in stage.linears)


@pytest.mark.parametrize("family", LAST_BLOCK)
def test_stages(family: str) -> None:
    folder = tiny_model(family)
    layout = read_layout(folder_source(folder))
    assert layout.family == family.removesuffix("_vision")
    assert layout.dtype == "BF16"
    assert [w for w in layout.warnings if "stacked matrices" not in w] == []
    assert ("stacked matrices" in "".join(layout.warnings)) == (family == "gpt_oss"), "what stays exact is said"
    assert layout.other_files == ("generation_config.json",)
    assert placed_names(layout) == stored_names(folder)
    blocks = [unit for unit in layout.units if ".layers." in unit.name and "vision" not in unit.name]
    assert [unit.name.rsplit(".", 1)[1] for unit in blocks] == ["0", "1"]
    assert [shape_of(stage, blocks[1].name) for stage in blocks[1].stages] == LAST_BLOCK[family]
    assert layout.units[0].name == "embeddings"
    assert layout.units[3].name == "head"
    kinds = Counter(linear.kind for linear in layout.linears())
    assert kinds["embedding"] == 1
    assert kinds["head"] == (0 if family in TIED else 1)
    assert layout.tied_embeddings == (family in TIED)
    assert layout.source_bytes == sum(t.nbytes for s in layout.stages() for x in s.tensors for t in x.stored)


@pytest.mark.parametrize("family", LAST_BLOCK)
def test_what_loaders_fuse(family: str) -> None:
    layout = read_layout(folder_source(tiny_model(family)))
    block = layout.units[2]
    linears = {x.name.removeprefix(f"{block.name}."): x for stage in block.stages for x in stage.linears}
    fused: dict[str | None, set[str]] = {}
    shared: dict[str | None, set[str]] = {}
    for name, linear in linears.items():
        fused.setdefault(linear.fused, set()).add(name)
        shared.setdefault(linear.shared, set()).add(name)
    alone = fused.pop(None, set())
    shared.pop(None, set())
    mixture, routed = family in MIXTURES, family in (*MIXTURES, "gpt_oss")
    if family == "phi3":
        assert (fused, shared) == ({}, {})
        return
    together = {x.removeprefix("self_attn.") for group in (fused, shared) for names in group.values() for x in names if "attn" in x}
    assert together == {"deepseek_v2": set(), "deepseek_v3": {"q_a_proj", "kv_a_proj_with_mqa"}}.get(family, {"q_proj", "k_proj", "v_proj"})
    if mixture:
        experts = {name for name in linears if ".experts." in name}
        assert len(experts) == 12
        assert experts in fused.values(), "one scheme for all experts of a layer"
        beside = {name for name in linears if ".shared_expert" in name and not name.endswith("down_proj")}
        assert not beside or beside in fused.values()
        assert len(shared) == bool(together) + 4 + bool(beside), "q/k/v, and gate/up of every expert"
        assert all(len(names) == 2 for key, names in shared.items() if key and "experts" in key)
    routers = {name for name, linear in linears.items() if linear.kind == "router"}
    downs = {name for name in linears if name.endswith("down_proj") and ".experts." not in name}
    assert len(routers) == routed
    latent = {name for name in linears if "attn" in name and name.removeprefix("self_attn.") not in together}
    assert alone == latent | routers | downs


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_dropped_expert_is_not_written(family: str) -> None:
    """It keeps its number in the source's routing, as the others do."""
    layout = read_layout(folder_source(tiny_model(family)))
    block = layout.units[2]
    assert [stage.expert for stage in block.stages if stage.expert is not None] == [0, 1, 2, 3]
    fewer = replace(block, stages=tuple(replace(stage, dropped=stage.expert == 1) for stage in block.stages))
    pruned = replace(layout, units=tuple(fewer if unit is block else unit for unit in layout.units))
    gone = {linear.name for linear in layout.linears()} - {linear.name for linear in pruned.linears()}
    assert len(gone) == 3 and all(".experts.1." in name for name in gone)
    written = {tensor.name for stages in plan_output(pruned, {}).stages for stage in stages for tensor in stage}
    assert {t.name for stage in layout.stages() for t in stage.tensors} - written == {f"{name}.weight" for name in gone}
    assert len(fewer.as_stored().stages) == len(block.stages)


def test_first_layers_of_a_mixture_may_be_dense() -> None:
    layout = read_layout(folder_source(tiny_model("qwen3_moe", mlp_only_layers=[], decoder_sparse_step=2)))
    assert [shape_of(stage, "model.layers.0") for stage in layout.units[1].stages] == LLAMA
    assert [shape_of(stage, "model.layers.1") for stage in layout.units[2].stages] == QWEN3_MOE


def test_a_vision_tower_stays_exact() -> None:
    layout = read_layout(folder_source(tiny_model("gemma3_vision")))
    others = [unit.name for unit in layout.units[4:]]
    assert others == [
        "multi_modal_projector",
        "vision_tower",
        "vision_tower.encoder.layers.0",
        "vision_tower.encoder.layers.1",
    ]
    assert not any(stage.linears for unit in layout.units[4:] for stage in unit.stages)


def test_newer_names_of_a_model_that_sees() -> None:
    source = folder_source(tiny_model("gemma3_vision"))
    file = source.files["model.safetensors"]
    length = int.from_bytes(file[:8], "little")
    text = file[8 : 8 + length].replace(b"language_model.model.", b"model.language_model.")
    source.files["model.safetensors"] = file[:8] + text + file[8 + length :]
    layout = read_layout(source)
    assert layout.units[1].name == "model.language_model.layers.0"
    assert sum(x.kind == "linear" for x in layout.linears()) == 14


def test_gemma3_leaves_sizes_out_of_its_config() -> None:
    """Published text configs name neither heads nor head size: the family's own defaults hold."""
    source = folder_source(tiny_model("gemma3", num_attention_heads=8, num_key_value_heads=4, head_dim=256))
    config = json.loads(source.files["config.json"])
    for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"):
        del config[key]
    source.files["config.json"] = json.dumps(config).encode()
    layout = read_layout(source)
    assert layout.tied_embeddings
    assert next(x for x in layout.linears() if x.name.endswith("q_proj")).shape == (2048, 128)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_shards_and_one_file_are_the_same_model(family: str) -> None:
    one, many = folder_source(tiny_model(family)), folder_source(tiny_model(family, shard="200KB"))
    assert len(many.files) > 5
    whole, sharded = read_layout(one), read_layout(many)
    assert [u.name for u in whole.units] == [u.name for u in sharded.units]
    assert list(whole.linears()) == list(sharded.linears())
    assert placed_names(whole) == placed_names(sharded)
    assert {t.file for s in sharded.stages() for x in s.tensors for t in x.stored} == {
        name for name in many.files if name.endswith(".safetensors")
    }


def test_only_headers_are_read_and_no_torch_is_imported() -> None:
    folder = tiny_model("llama", shard="200KB")
    source = folder_source(folder)
    read_layout(source)
    assert source.bytes_read <= source.header_budget
    assert source.reads == len([n for n in source.files if n.endswith(".safetensors")]) + 2
    program = "import sys, kompressor_worker.reading; assert not {'torch', 'numpy', 'boto3'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_header_longer_than_the_first_read() -> None:
    name = "model.layers.{}.attn.a_rather_long_name_of_a_projection.weight"
    tensors = {name.format(i): ("BF16", (1, 1)) for i in range(3000)}
    config = json.dumps({"model_type": "novel"}).encode()
    source = MemorySource({"config.json": config, "model.safetensors": safetensors_bytes(tensors)})
    layout = read_layout(source)
    assert source.reads == 3
    assert len(layout.units) == 3000


def test_large_plain_tensors_have_a_stage_of_their_own() -> None:
    """Headers only, so a terabyte costs nothing: gpt-oss' experts do not come in one stage."""
    from kompressor_worker.layout import SourceTensor
    from kompressor_worker.stages import STAGE_BYTES, plain_stages

    sizes = [10, STAGE_BYTES // 2 + 1, 20, 5, STAGE_BYTES // 2 + 1]
    stages = plain_stages("x", [SourceTensor(f"t{i}", "BF16", (size,), ()) for i, size in enumerate(sizes)])
    assert [[t.name for t in stage.tensors] for stage in stages] == [["t0"], ["t1"], ["t2", "t3"], ["t4"]]
    assert [stage.name for stage in stages] == ["x", "x.1", "x.2", "x.3"]


def test_every_family_has_a_tiny_model() -> None:
    from kompressor_worker.architectures import FAMILIES as KNOWN

    assert set(KNOWN) <= set(FAMILIES)
