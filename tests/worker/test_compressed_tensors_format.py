"""What is written is what compressed-tensors, transformers and vLLM read: names, config and weights, loaded by them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from sources import folder_source
from test_rtn import shared_scale

from kompressor_worker.block import Stage
from kompressor_worker.formats.compressed_tensors import decode, other_modules, planned_tensors, quantization_config
from kompressor_worker.formats.targets import matches
from kompressor_worker.layout import LinearLayout, ModelLayout
from kompressor_worker.passes import build_passes
from kompressor_worker.reading import read_layout
from kompressor_worker.schemes import COMPRESSED_TENSORS, SCHEMES, Scheme

NAMES = {torch.bfloat16: "BF16", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8"} | {
    torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32", torch.float16: "F16"
}  # fmt: skip
BLOCKS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Compressed:
    """A checkpoint put through passes by hand, as the stream does, and written as one file."""

    def __init__(self, source: Path, folder: Path, passes: Sequence[Mapping[str, Any]]) -> None:
        from safetensors.torch import load_file, save_file

        self.folder = folder
        self.layout: ModelLayout = read_layout(folder_source(source))
        self.schemes: dict[str, Scheme] = {}
        built = build_passes(passes)
        for p in built:
            self.schemes |= p.assign(self.layout, self.schemes)
        self.source: dict[str, torch.Tensor] = {}
        for path in sorted(source.glob("*.safetensors")):
            self.source |= load_file(path)
        self.tensors = dict(self.source)
        for layout in self.layout.stages():
            stage = Stage(layout, {t.name: self.source[t.name] for t in layout.tensors}, self.schemes)
            for p in built:
                p.apply(stage)
            for name, encoded in stage.encoded.items():
                del self.tensors[f"{name}.weight"]
                self.tensors |= encoded.tensors
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        self.config = json.loads((folder / "config.json").read_text())
        self.config["quantization_config"] = quantization_config(list(self.layout.linears()), self.schemes, other_modules(self.layout))
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, folder / "model.safetensors", {"format": "pt"})

    def weight(self, name: str) -> torch.Tensor:
        if name not in self.schemes:
            return self.source[f"{name}.weight"]
        return decode(name, self.tensors, self.schemes[name], torch.bfloat16)


def load(folder: Path, *, dequantize: bool) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    chosen = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **chosen)
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(1, 33)[None]).logits
    return found


@pytest.mark.parametrize("scheme", [name for name, scheme in COMPRESSED_TENSORS.items() if scheme.calibrated is None])
def test_llama_in_transformers(scheme: str, tmp_path: Path) -> None:
    made = Compressed(tiny_model("llama"), tmp_path / "out", [{"rtn": {"scheme": scheme}}])
    assert len(made.schemes) == 14
    model = load(made.folder, dequantize=True)
    for name, weight in model.state_dict().items():
        if name.endswith("proj.weight"):
            assert torch.equal(weight, made.weight(name.removesuffix(".weight"))), name
    assert logits(model).isfinite().all()
    if SCHEMES[scheme].symmetric:  # transformers 5.23 loads asymmetric packed weights only dequantised
        compressed = logits(load(made.folder, dequantize=False))
        assert compressed.isfinite().all()
        original = logits(load(tiny_model("llama"), dequantize=False))
        assert (compressed - original).norm() < {2: 1.0, 3: 0.7}.get(SCHEMES[scheme].bits, 0.35) * original.norm()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC"])
def test_mixture_in_transformers(family: str, scheme: str, tmp_path: Path) -> None:
    made = Compressed(tiny_model(family), tmp_path / "out", [{"rtn": {"scheme": scheme}}])
    model = load(made.folder, dequantize=False)
    assert logits(model).isfinite().all()
    state = model.state_dict()
    block, first, second, third = (
        ("mlp", "gate_proj", "up_proj", "down_proj") if family == "qwen3_moe" else ("block_sparse_moe", "w1", "w3", "w2")
    )
    sparse = [layer for layer in range(2) if f"model.layers.{layer}.mlp.experts.down_proj" in state]
    assert sparse
    for layer in sparse:
        experts = f"model.layers.{layer}.mlp.experts"
        fused = state[f"{experts}.gate_up_proj"], state[f"{experts}.down_proj"]
        for expert in range(4):
            prefix = f"model.layers.{layer}.{block}.experts.{expert}"
            ours = torch.cat([made.weight(f"{prefix}.{first}"), made.weight(f"{prefix}.{second}")])
            assert torch.equal(fused[0][expert], ours), prefix
            assert torch.equal(fused[1][expert], made.weight(f"{prefix}.{third}")), prefix
        router = f"model.layers.{layer}.{block}.gate"
        assert torch.equal(state[f"model.layers.{layer}.mlp.gate.weight"], made.source[f"{router}.weight"])
        assert torch.equal(state[f"model.layers.{layer}.self_attn.q_proj.weight"], made.weight(f"model.layers.{layer}.self_attn.q_proj"))


def test_mixed_schemes_in_transformers(tmp_path: Path) -> None:
    passes = [
        {"rtn": {"scheme": "W4A16", "groupSize": 32, "targets": ["re:.*mlp"]}},
        {"rtn": {"scheme": "FP8_DYNAMIC", "targets": ["re:.*layers.0.self_attn"]}},
        {"rtn": {"scheme": "W8A8", "ignore": ["re:.*o_proj$"]}},
    ]
    made = Compressed(tiny_model("llama"), tmp_path / "out", passes)
    config = made.config["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == [r"re:.*layers\.1\.self_attn\.o_proj$", "lm_head"]
    model = load(made.folder, dequantize=False)
    assert logits(model).isfinite().all()
    state = model.state_dict()
    for linear in made.layout.linears():
        if linear.kind != "embedding":
            assert torch.equal(state[linear.weight], made.weight(linear.name)), linear.name


def test_a_model_that_sees(tmp_path: Path) -> None:
    made = Compressed(tiny_model("gemma3_vision"), tmp_path / "out", [{"rtn": {"scheme": "FP8_DYNAMIC"}}])
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(made.folder, dtype=torch.bfloat16)
    quantised = {name for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}
    assert len(quantised) == len(made.schemes)
    assert all("language_model" in name for name in quantised)


@pytest.mark.parametrize("scheme", COMPRESSED_TENSORS.values(), ids=COMPRESSED_TENSORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(8, 128), (256, 384)], ids=str)
def test_planned_is_what_comes(scheme: Scheme, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    from kompressor_worker import kernels
    from kompressor_worker.formats.compressed_tensors import named_tensors

    weight = torch.randn(shape).to(dtype)
    shared = shared_scale(weight, scheme)
    result = kernels.quantize(weight, scheme, shared)
    made = named_tensors("m.q", shape, scheme, result.codes, result.scale, result.zero_point, shared)
    planned = [t for t in planned_tensors("m.q", shape, NAMES[dtype], scheme) if not t.name.startswith("m.q.input_")]
    assert [(t.name, t.dtype, t.shape) for t in planned] == [(n, NAMES[t.dtype], tuple(t.shape)) for n, t in made.items()]
    assert all(t.nbytes == made[t.name].nbytes for t in planned)
    assert all(tensor.is_contiguous() for tensor in made.values())
    assert decode("m.q", made, scheme, dtype).dtype is dtype


@pytest.mark.parametrize("scheme", COMPRESSED_TENSORS)
def test_config_is_compressed_tensors_own(scheme: str) -> None:
    """It parses, and written back by compressed-tensors nothing is added to or lost from the groups."""
    from compressed_tensors.quantization import QuantizationConfig

    linears = llama(4)
    schemes = {x.name: SCHEMES[scheme] for x in linears if x.kind == "linear"}
    config = quantization_config(linears, schemes)
    parsed = QuantizationConfig.model_validate(config)
    group = parsed.config_groups["group_0"]
    assert json.loads(parsed.model_dump_json())["config_groups"] == config["config_groups"]
    assert group.targets == ["Linear"]
    assert config["ignore"] == ["lm_head"]
    assert config["format"] == group.format == SCHEMES[scheme].format


def llama(layers: int, *, tied: bool = False) -> list[LinearLayout]:
    names = [f"model.layers.{i}.{'self_attn' if b in BLOCKS[:4] else 'mlp'}.{b}" for i in range(layers) for b in BLOCKS]
    linears = [LinearLayout("model.embed_tokens", (1000, 256), "BF16", "embedding")]
    linears += [LinearLayout(name, (256, 256), "BF16") for name in names]
    return linears if tied else [*linears, LinearLayout("lm_head", (1000, 256), "BF16", "head")]


def vllm_target(name: str, config: Mapping[str, Any]) -> str | None:
    """Which group vLLM takes for a Linear, None for none: first the ignore list, then the first target in order, then the class."""
    if any(matches(pattern, name) for pattern in config["ignore"]):
        return None
    targets = [(target, group) for group, g in config["config_groups"].items() for target in g["targets"]]
    return next((g for t, g in targets if matches(t, name)), next((g for t, g in targets if t == "Linear"), None))


def library_target(name: str, config: Mapping[str, Any]) -> str | None:
    """The same by compressed-tensors' own matching, on a real Linear."""
    from compressed_tensors.utils.match import is_match, match_targets

    module = torch.nn.Linear(1, 1)
    by_target = {target: group for group, g in config["config_groups"].items() for target in g["targets"]}
    if not is_match(name, module, by_target, config["ignore"]):
        return None
    return by_target[match_targets(name, module, by_target)[0]]


@pytest.mark.parametrize("layers", [1, 2, 12])
def test_readers_agree_on_mixed_targets(layers: int) -> None:
    linears = llama(layers)
    wanted = {
        x.name: SCHEMES["W4A16" if "mlp" in x.name else "W8A8" if "layers.0." in x.name else "FP8_DYNAMIC"]
        for x in linears
        if x.kind == "linear" and not re.search(r"layers\.1\.self_attn\.o_proj", x.name)
    }
    config = quantization_config(linears, wanted)
    groups = {name: (group["format"], group["weights"]["num_bits"]) for name, group in config["config_groups"].items()}
    for linear in linears:
        if linear.kind == "embedding":
            continue
        scheme = wanted.get(linear.name)
        found = vllm_target(linear.name, config)
        assert found == library_target(linear.name, config)
        assert (groups[found] if found else None) == ((scheme.format, scheme.bits) if scheme else None), linear.name
    assert sum(len(g["targets"]) for g in config["config_groups"].values()) + len(config["ignore"]) <= 20


def test_routed_experts_come_before_shared_ones() -> None:
    """transformers takes the first group with a pattern that says experts for the routed ones."""
    names = [
        f"model.layers.{i}.mlp.{place}.{p}" for i in range(3) for place in ("shared_experts", "experts.0", "experts.1") for p in BLOCKS[4:]
    ]
    linears = [LinearLayout(name, (256, 256), "BF16") for name in names]
    schemes = {name: SCHEMES["W4A16" if ".experts." in name else "W8A8"] for name in names}
    config = quantization_config(linears, schemes)
    assert [g["format"] for g in config["config_groups"].values()] == ["pack-quantized", "int-quantized"]
    assert all(library_target(name, config) == ("group_0" if ".experts." in name else "group_1") for name in names)


def test_what_is_around_the_layers_is_no_pattern() -> None:
    linears = llama(2)
    schemes = {x.name: SCHEMES["W8A8"] for x in linears if x.kind == "linear"}
    assert quantization_config(linears, schemes, ["", "model", "model.layers"])["ignore"] == ["lm_head"]


def test_tied_head_and_stacked_experts_are_ignored() -> None:
    linears = llama(2, tied=True)
    schemes = {x.name: SCHEMES["W8A8"] for x in linears if x.kind == "linear"}
    others = [
        "vision_tower.blocks.0.attn",
        "vision_tower.patch",
        "model.layers.0.mlp.experts",
        "model.layers.1.mlp.experts",
        "model.layers.0",
    ]
    config = quantization_config(linears, schemes, others)
    assert config["ignore"] == ["lm_head", r"re:(.*\.)?vision_tower(\..*)?$", r"re:(.*\.)?layers\.\d+\.mlp\.experts(\..*)?$"]
    for name in ("vision_tower.blocks.3.attn.q_proj", "model.vision_tower.x", "model.layers.0.mlp.experts.0.gate_proj", "lm_head"):
        assert vllm_target(name, config) is None
        assert library_target(name, config) is None
    assert all(library_target(name, config) == "group_0" for name in schemes)


@pytest.mark.parametrize("head", ["embed_out", "output"])
def test_a_head_under_an_old_name_stays_exact_under_the_new_one(head: str) -> None:
    """transformers renames GPT-NeoX's embed_out to lm_head: not ignored there, a reader makes a quantised head of it."""
    linears = [LinearLayout(name, (128, 128), "BF16") for name in ("gpt_neox.layers.0.mlp.dense_h_to_4h",)]
    linears.append(LinearLayout(head, (1000, 128), "BF16", "head"))
    schemes = {linears[0].name: SCHEMES["W8A16"]}
    assert quantization_config(linears, schemes)["ignore"] == ["lm_head", head]
    asked_for = schemes | {head: SCHEMES["W8A16"]}
    assert quantization_config(linears, asked_for)["ignore"] == []
