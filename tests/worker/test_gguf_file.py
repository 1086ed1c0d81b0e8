"""GGUF: each family's file, written whole by the plan, says in llama.cpp what the checkpoint says in transformers; the gguf library reads
out of it what was put in."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from families import BASE, FAMILIES, tiny_model
from safetensors.torch import load_file, save_file
from sources import folder_source

from gguf_files import Request, llama_cpp, no_tokenizer, write_whole
from kompressor_worker.errors import UserError
from kompressor_worker.formats.gguf_file import plan_gguf
from kompressor_worker.formats.gguf_form import formed
from kompressor_worker.formats.gguf_metadata import Metadata, metadata_of
from kompressor_worker.layout import ModelLayout, StageLayout
from kompressor_worker.reading import read_layout
from kompressor_worker.schemes import SCHEMES
from kompressor_worker.shards import OutputPlan
from kompressor_worker.windows import recipe_for, with_windows
from models import cached

VERSION = 1
"""Part of the cache's key: raise it when what a model is made of changes below."""
LENGTH = 60
WINDOW = 16
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 256}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
PHI3 = {
    "head_dim": 32,
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 256,
    "sliding_window": None,
    "rope_parameters": {**LONG, "partial_rotary_factor": 0.5, "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0] * 8},
}
SOME = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": WINDOW}
KINDS = ["sliding_attention", "full_attention"]

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama", {}),
    "llama-biases": ("llama", "llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "llama-linear-tied": ("llama", "llama", {"rope_parameters": LINEAR, "tie_word_embeddings": True}),
    "llama-yarn": ("llama", "llama", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "mistral": ("mistral", "llama", {"sliding_window": None}),
    "mistral-window": ("mistral", "granite_swa", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", "qwen2", {"head_dim": 32}),
    "qwen2-wide-heads": ("qwen2", "seed_oss", {"head_dim": 64}),
    "qwen2-window": ("qwen2", "granite_swa", {"head_dim": 32, **SOME}),
    "qwen3-yarn": ("qwen3", "qwen3", {"rope_parameters": YARN}),
    "qwen3_moe": ("qwen3_moe", "qwen3moe", {"mlp_only_layers": [], "norm_topk_prob": True}),
    "mixtral": ("mixtral", "llama", {"sliding_window": None}),
    "mixtral-window": ("mixtral", "granite_swa", {"sliding_window": WINDOW}),
    "gemma2": ("gemma2", "gemma2", {"query_pre_attn_scalar": 64, "sliding_window": WINDOW}),
    "gemma3": (
        "gemma3",
        "gemma3",
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 48, "rope_parameters": GEMMA3_ROPE, "layer_types": KINDS},
    ),
    "phi3-longrope": ("phi3", "phi3", PHI3),
}
"""Name to the family, llama.cpp's architecture and what config.json says beside."""


@pytest.fixture(scope="module")
def written() -> dict[str, Path]:
    return {name: loud_model(family, extra) for name, (family, _, extra) in CASES.items()}


def loud_model(family: str, extra: Mapping[str, Any]) -> Path:
    """A random checkpoint of which every tensor counts: norms and biases too are not what they begin as. In the cache, with what
    transformers says of `tokens_of()`: not to be written to."""
    recipe = [family, FAMILIES[family], BASE, extra, LENGTH, VERSION, version("transformers")]
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]

    def make(folder: Path) -> None:
        import transformers

        name, more = FAMILIES[family]
        config = getattr(transformers, name)(**{**BASE, **more, **extra})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.data += 0.3 * torch.randn_like(parameter)
                else:
                    parameter.data.normal_(std=0.12)
        model.save_pretrained(folder)
        numpy.save(folder / "expected.npy", log_probabilities(folder, tokens_of(), table=family.startswith("gemma")).numpy())

    return cached("tiny", f"gguf-{family}-{digest}", make)


def planned(layout: ModelLayout, max_shard: int | None = None) -> tuple[OutputPlan, Metadata]:
    metadata = metadata_of(layout, no_tokenizer(), "test")
    return plan_gguf(layout, {}, metadata, "model-F32.gguf", **({} if max_shard is None else {"max_shard": max_shard})), metadata


class Table(torch.nn.Module):
    """GELU as ggml computes it: looked up, from halves to halves."""

    def __init__(self, gelu: torch.nn.Module) -> None:
        super().__init__()
        self.gelu = gelu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.gelu(x.half().float())
        return found.half().float()


def log_probabilities(folder: Path, tokens: list[int], table: bool = False) -> torch.Tensor:
    """[tokens, vocabulary] by transformers. `table`: with GELU as ggml has it."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for layer in model.model.layers if table else ():
        layer.mlp.act_fn = Table(layer.mlp.act_fn)
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def tokens_of(seed: int = 0) -> list[int]:
    return torch.randint(3, BASE["vocab_size"], (LENGTH,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_llama_cpp_says_what_transformers_says(written: dict[str, Path], tmp_path: Path) -> None:
    requests, tokens = [], tokens_of()
    for name, folder in written.items():
        (place := tmp_path / name).mkdir()
        plan, metadata = planned(read_layout(folder_source(folder)))
        assert metadata.decoder.architecture.name == CASES[name][1]
        family = CASES[name][0].replace("_", "")
        own = metadata.decoder.architecture.name in (family, "llama")
        assert [f"the file says {CASES[name][1]}" in warning for warning in metadata.warnings] == [True] * (not own)
        requests.append(Request(write_whole(plan, load_file(folder / "model.safetensors"), place)[0], tokens))
    worst: dict[bool, dict[str, float]] = {True: {}, False: {}}
    for (name, folder), (logits, _) in zip(written.items(), llama_cpp(requests, tmp_path), strict=True):
        expected = torch.from_numpy(numpy.load(folder / "expected.npy"))
        assert expected.std() > 0.5, name
        worst[name.startswith("gemma")][name] = float((torch.from_numpy(logits).log_softmax(-1) - expected).abs().max())
    assert max(worst[False].values()) < 1e-4, worst
    assert max(worst[True].values()) < 1e-3, worst  # a sum in another order may round to another half in GELU's table


def test_the_gguf_library_reads_what_was_put_in(written: dict[str, Path], tmp_path: Path) -> None:
    for name in ("llama-biases", "gemma3", "mixtral-window"):
        layout = read_layout(folder_source(written[name]))
        plan, metadata = planned(layout)
        values = load_file(written[name] / "model.safetensors")
        (tmp_path / name).mkdir()
        reader = gguf.GGUFReader(write_whole(plan, values, tmp_path / name)[0])
        found = {t.name: t for t in reader.tensors}
        placed = [t for unit in plan.stages for stage in unit for t in stage if t.form]
        assert {t.form.tensor for t in placed if t.form} | {t.name for t, _ in plan.constants} == set(found)
        for t in placed:
            assert t.form is not None
            theirs = gguf.quants.dequantize(found[t.form.tensor].data, found[t.form.tensor].tensor_type)
            part = theirs if t.form.expert is None else theirs[t.form.expert]
            numpy.testing.assert_array_equal(part, formed(values[t.name], t.form).float().numpy())
        for t, data in plan.constants:
            assert found[t.name].data.tobytes() == data
        assert all(int(t.data_offset) % 32 == 0 for t in reader.tensors)
        for key, value in metadata.values.items():
            assert reader.fields[key].contents() == value.value or isinstance(value.value, float)


def test_weights_of_sixteen_bits_stay_so_and_norms_do_not(tmp_path: Path) -> None:
    layout = read_layout(folder_source(tiny_model("qwen3_moe", mlp_only_layers=[], norm_topk_prob=True)))
    plan, _ = planned(layout)
    path = write_whole(plan, load_file(tiny_model("qwen3_moe", mlp_only_layers=[], norm_topk_prob=True) / "model.safetensors"), tmp_path)[0]
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    exact = {name for name, kind in types.items() if kind == "F32"}
    assert exact == {name for name in types if "norm" in name or "gate_inp" in name}
    assert {types[name] for name in types.keys() - exact} == {"BF16"}


def test_a_large_result_is_split(written: dict[str, Path], tmp_path: Path) -> None:
    whole, _ = planned(layout := read_layout(folder_source(written["mixtral-window"])))
    plan, _ = planned(layout, max_shard=300_000)
    names = [shard.name for shard in plan.shards]
    assert len(names) > 3
    assert names == [f"model-F32-{n + 1:05d}-of-{len(names):05d}.gguf" for n in range(len(names))]
    assert plan.tensor_bytes == whole.tensor_bytes
    units = [[(t.shard, t.start) for stage in unit for t in stage] for unit in plan.stages]
    assert all(max(before) < min(behind) for before, behind in pairwise(units))
    values = load_file(written["mixtral-window"] / "model.safetensors")
    (tmp_path / "one").mkdir()
    requests = [
        Request(write_whole(plan, values, tmp_path)[0], tokens_of()),
        Request(write_whole(whole, values, tmp_path / "one")[0], tokens_of()),
    ]
    (split, _), (one, _) = llama_cpp(requests, tmp_path)
    assert numpy.array_equal(split, one)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("llama", "granite_swa"), ("qwen2", "granite_swa"), ("mixtral", "granite_swa"), ("qwen3_moe", "mellum"), ("gemma2", "gemma2")],
)
def test_windows_that_a_pass_gives_are_kept(written: dict[str, Path], tmp_path: Path, name: str, architecture: str) -> None:
    """Beside transformers' class that has them, under the names that the pass publishes."""
    before = read_layout(folder_source(written[name]))
    layout = with_windows(before, recipe_for(before, "hybridAttention"), (1,), WINDOW)
    plan, metadata = planned(layout)
    assert metadata.decoder.architecture.name == architecture
    assert metadata.decoder.windows == (WINDOW, None)
    values = load_file(written[name] / "model.safetensors")
    tensors = [t for stage in layout.stages() for t in stage.tensors]
    values = {t.name: values[t.stored[0].name] if t.stored else torch.zeros(t.shape) for t in tensors}
    shutil.copytree(written[name], published := tmp_path / "published")
    save_file(values, published / "model.safetensors", metadata={"format": "pt"})
    (published / "config.json").write_text(json.dumps(layout.config))
    file = write_whole(plan, values, tmp_path)[0]
    ((logits, _),) = llama_cpp([Request(file, tokens_of())], tmp_path)
    expected = log_probabilities(published, tokens_of(), table=name == "gemma2")
    assert float((torch.from_numpy(logits).log_softmax(-1) - expected).abs().max()) < (1e-3 if name == "gemma2" else 1e-4)


def changed(layout: ModelLayout, **changes: Any) -> ModelLayout:
    return replace(layout, config={**layout.config, **changes})


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic'"),
    "partial": ("llama", {"partial_rotary_factor": 0.5}, "on 32 of 64 channels"),
    "mscale": ("llama", {"rope_parameters": {**YARN, "mscale": 1.0}}, "mscale"),
    "activation": ("llama", {"hidden_act": "gelu"}, "the activation 'gelu'"),
    "gates": ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob false"),
    "dense layers": ("qwen3_moe", {"mlp_only_layers": [0]}, "layers without experts"),
    "scores": ("gemma2", {"query_pre_attn_scalar": 48}, "query_pre_attn_scalar 48 (it takes 64)"),
    "caps": ("gemma2", {"attn_logit_softcapping": None}, "soft caps"),
    "untied": ("gemma2", {"tie_word_embeddings": False}, "not tied"),
    "heads": ("phi3-longrope", {"num_attention_heads": 2}, "2 heads of 32 channels beside a hidden_size of 128"),
    "factors": ("phi3-longrope", {"rope_parameters": {**PHI3["rope_parameters"], "long_factor": [1.0]}}, "long_factor [1.0]"),
    "lacking": ("llama", {"rms_norm_eps": None}, "rms_norm_eps None"),
    "unknown": ("llama", {"model_type": "olmo3"}, "model_type 'olmo3' has no names in GGUF"),
}
"""A case of CASES, what config.json says otherwise, and what the refusal names."""


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused(written: dict[str, Path], case: str) -> None:
    name, changes, message = REFUSED[case]
    layout = changed(read_layout(folder_source(written[name])), **changes)
    layout = replace(layout, tied_embeddings=layout.config["tie_word_embeddings"], family=None if case == "unknown" else layout.family)
    with pytest.raises(UserError) as refused:
        planned(layout)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_windows_without_an_architecture_are_refused_or_the_context_ends_with_them(written: dict[str, Path]) -> None:
    """A pass was asked for its windows; a source that has some is exact up to their size."""
    qwen3 = read_layout(folder_source(written["qwen3-yarn"]))
    with pytest.raises(UserError, match="no qwen3 with a sliding window in layer 0 "):
        planned(with_windows(qwen3, recipe_for(qwen3, "hybridAttention"), (1,), WINDOW))
    odd = changed(read_layout(folder_source(written["gemma2"])), layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(UserError, match="a sliding window in layer 1 "):
        planned(replace(odd, windowed=True))
    phi3 = changed(read_layout(folder_source(written["phi3-longrope"])), sliding_window=100)
    _, metadata = planned(phi3)
    assert metadata.values["phi3.context_length"].value == 100
    assert "up to which the model is what it was" in metadata.warnings[0]


def with_dtype(stage: StageLayout, name: str, dtype: str) -> StageLayout:
    return replace(stage, tensors=tuple(replace(t, dtype=dtype) if t.name == name else t for t in stage.tensors))


def test_biases_and_experts_that_have_no_place_are_refused(written: dict[str, Path]) -> None:
    layout = read_layout(folder_source(tiny_model("qwen3", attention_bias=True)))
    with pytest.raises(UserError, match=r"self_attn.o_proj.bias: llama.cpp's architecture qwen3 has no bias there"):
        planned(layout)
    moe = read_layout(folder_source(written["mixtral"]))
    one = next(linear for linear in moe.linears() if ".experts.1." in linear.name)
    units = tuple(replace(unit, stages=tuple(with_dtype(stage, one.weight, "F16") for stage in unit.stages)) for unit in moe.units)
    with pytest.raises(UserError, match="give all experts of a layer the same"):
        planned(replace(moe, units=units))
    with pytest.raises(UserError, match="W8A8 is no type of GGUF"):
        plan_gguf(moe, {one.name: SCHEMES["W8A8"]}, metadata_of(moe, no_tokenizer(), "x"), "x.gguf")
