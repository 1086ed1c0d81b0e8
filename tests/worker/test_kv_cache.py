"""FP8 scales of the KV cache: made from what the cache would hold, read and used by transformers with compressed-tensors' hooks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from published import Published, publish
from safetensors.torch import save_file
from sources import folder_source
from torch.nn.functional import kl_div, nll_loss

import jobs
from calibrated_jobs import evaluation_rows, samples, write_data
from independent import expand
from kompressor_worker import kernels
from kompressor_worker.architectures import FAMILIES
from kompressor_worker.block import KvStatistics
from kompressor_worker.cli import run_cli
from kompressor_worker.errors import UserError
from kompressor_worker.layout import ModelLayout
from kompressor_worker.passes import build_passes
from kompressor_worker.passes.kv_cache import scale_of
from kompressor_worker.reading import read_layout
from kompressor_worker.shards import plan_output

TOKENS = torch.randint(3, 128, (6, 48), generator=torch.Generator().manual_seed(0))
PLACES = [f"model.layers.{layer}.self_attn.{kind}_scale" for layer in range(2) for kind in "kv"]


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits.float()
    return found


def cached(source: Path) -> dict[str, torch.Tensor]:
    """What transformers' cache holds of TOKENS after the unquantised model, [rows, KV heads, tokens, head size], by its scale's name."""
    with torch.inference_mode():
        cache = load(source)(input_ids=TOKENS, use_cache=True).past_key_values
    held = {f"model.layers.{i}.self_attn": layer for i, layer in enumerate(cache.layers)}
    return {f"{name}.{kind}_scale": states for name, x in held.items() for kind, states in (("k", x.keys), ("v", x.values))}


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.forward and not family.latent])
@pytest.mark.parametrize("strategy", ["tensor", "head"])
def test_scales_are_of_what_the_cache_holds(family: str, strategy: str, tmp_path: Path) -> None:
    source = tiny_model(family)
    made = publish(source, tmp_path / "out", [{"kvCache": {"strategy": strategy}}], TOKENS)
    config = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["strategy"] == {"tensor": "tensor", "head": "attn_head"}[strategy]
    states = cached(source)
    assert sorted(states) == sorted(PLACES)
    for name, seen in states.items():
        largest = seen.float().abs().amax() if strategy == "tensor" else seen.float().abs().amax(dim=(0, 2, 3))
        scale = made.tensors[name]
        assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (1,) if strategy == "tensor" else (2, 1, 1))
        torch.testing.assert_close(scale.float().flatten() * 448, largest.reshape(-1), rtol=0.02, atol=0.0)


@pytest.mark.parametrize("passes", [[{"awq": {"scheme": "W4A16"}}], [{"smoothQuant": {}}, {"rtn": {"scheme": "W8A8"}}]], ids=str)
def test_keys_and_values_are_those_of_the_published_weights(passes: list[Mapping[str, Any]], tmp_path: Path) -> None:
    """Whatever other passes fold into their weights, and whichever comes first."""
    made = publish(tiny_model("llama"), tmp_path / "out", [{"kvCache": {}}, *passes], TOKENS)
    for name, seen in cached(expand(without_cache(made, tmp_path / "without"), tmp_path / "plain")).items():
        torch.testing.assert_close(made.tensors[name].float() * 448, seen.float().abs().amax().reshape(1), rtol=0.012, atol=0.0)


@pytest.mark.parametrize("passes", [[], [{"rtn": {"scheme": "FP8"}}], [{"rtn": {"scheme": "W4A16"}}]], ids=str)
@pytest.mark.parametrize("strategy", ["tensor", "head"])
def test_transformers_rounds_with_them(passes: list[Mapping[str, Any]], strategy: str, tmp_path: Path) -> None:
    made = publish(tiny_model("llama"), tmp_path / "out", [*passes, {"kvCache": {"strategy": strategy}}], TOKENS)
    model = load(made.folder)
    held = dict(model.named_parameters())
    for name in PLACES:
        assert torch.equal(held[name], made.tensors[name]), name
    with_cache = logits(model)
    without = logits(load(without_cache(made, tmp_path / "without")))
    assert with_cache.isfinite().all()
    assert 0 < (with_cache - without).norm() < 0.06 * without.norm()
    absurd = {name: tensor / 64 for name, tensor in made.tensors.items() if name in PLACES}  # everything saturates
    save_file({**made.tensors, **absurd}, made.folder / "model.safetensors", {"format": "pt"})
    assert (logits(load(made.folder)) - without).norm() > 0.2 * without.norm()


@pytest.mark.parametrize(
    "passes",
    [
        [{"kvCache": {}}],
        [{"kvCache": {"strategy": "head"}}],
        [{"smoothQuant": {}}, {"gptq": {"scheme": "W8A8"}}, {"kvCache": {}}],
        [{"hybridAttention": {"window": 48, "fullLayers": 2}}, {"kvCache": {"strategy": "head"}}],
    ],
    ids=str,
)
def test_what_the_job_reports_is_measured_with_the_cache_in_use(
    passes: list[Mapping[str, Any]], trained_llama: Path, tmp_path: Path
) -> None:
    body = jobs.manifest(trained_llama.as_uri(), (tmp_path / "out").as_uri(), passes)
    body["spec"] |= samples({section: path.as_uri() for section, path in write_data(tmp_path, "llama", rows=32).items()}, rows=32)
    job = jobs.write(tmp_path / "job.json", body)
    assert run_cli(["run", str(job)]) == 0
    said, tokens = json.loads((tmp_path / "out" / "kompressor.json").read_text())["evaluation"], evaluation_rows(job)
    before, after = (log_probabilities(folder, tokens) for folder in (trained_llama, tmp_path / "out"))
    for word, found in (("perplexityBefore", before), ("perplexityAfter", after)):
        perplexity = math.exp(nll_loss(found.flatten(0, 1), tokens[:, 1:].flatten()).item())
        assert perplexity == pytest.approx(said[word], rel=0.005)
    # The cache moves perplexity by less than that: what tells a rounded cache from another is the divergence.
    kl = kl_div(after, before, log_target=True, reduction="none").sum(dim=-1).mean().item()
    print(passes, f"KL reported {said['kl']:.6f}, measured {kl:.6f}; perplexity reported {said['perplexityAfter']:.4f}, {perplexity:.4f}")
    assert kl == pytest.approx(said["kl"], rel=0.15)


def log_probabilities(folder: Path, tokens: torch.Tensor, piece: int = 32) -> torch.Tensor:
    """Of each token's successor, fp32 [rows, length - 1, vocabulary]. Rows are read as a runtime reads a conversation: `piece` tokens at a
    time, all before them from the cache."""
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        found = [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in tokens.split(piece, dim=1)]
    assert cache.get_seq_length() == tokens.shape[1]
    return torch.cat(found, dim=1)[:, :-1].log_softmax(dim=-1)


def without_cache(made: Published, folder: Path) -> Path:
    folder.mkdir()
    config = json.loads((made.folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = None
    if not made.schemes:
        del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: t for name, t in made.tensors.items() if name not in PLACES}, folder / "model.safetensors", {"format": "pt"})
    return folder


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(-9, 5), st.sampled_from(["tensor", "head"]), st.sampled_from([torch.bfloat16, torch.float16]))
def test_numbers_equal_compressed_tensors(seed: int, power: int, strategy: Any, dtype: torch.dtype) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2, 3, 5, 8, generator=generator) * 10.0**power * torch.tensor([1.0, 3.0, 0.0])[:, None, None]
    args = QuantizationArgs(num_bits=8, type="float", strategy={"tensor": "tensor", "head": "attn_head"}[strategy], symmetric=True)
    seen = KvStatistics(states.abs().amax(dim=(0, 2, 3)))
    ours = scale_of(seen, strategy, dtype)
    over = (0, 1, 2, 3) if strategy == "tensor" else (0, 2, 3)
    theirs, zero_point = calculate_qparams(states.amin(dim=over, keepdim=True)[0], states.amax(dim=over, keepdim=True)[0], args)
    theirs = theirs.to(dtype).float()
    theirs = torch.where(theirs == 0, torch.finfo(torch.float32).eps, theirs).to(dtype).float()
    assert torch.equal(ours, theirs.reshape(ours.shape))
    widened = states * 1.5  # some saturate
    assert torch.equal(kernels.fake_quantize_kv(widened, ours), fake_quantize(widened, ours, zero_point.float().reshape(ours.shape), args))


def layout(family: str) -> ModelLayout:
    return read_layout(folder_source(tiny_model(family)))


def prepare(layout: ModelLayout, **params: Any) -> ModelLayout:
    (built,) = build_passes([{"kvCache": params}])
    return built.prepare(layout)


@pytest.mark.parametrize("family", ["phi3", "gpt_oss", "mixtral", "gemma3_vision"])
def test_every_layer_has_two_scales(family: str) -> None:
    made = [t for stage in prepare(layout(family), strategy="head").stages() for t in stage.tensors if t.encoding == "made"]
    assert [t.name.rpartition(".")[2] for t in made] == ["k_scale", "v_scale"] * 2
    assert {t.shape for t in made} == {(2, 1, 1)}
    assert {t.name.rpartition(".")[0].rpartition("layers.")[2] for t in made} == {"0.self_attn", "1.self_attn"}


@pytest.mark.parametrize("strategy", ["tensor", "head"])
def test_scales_break_no_file_in_two(strategy: str) -> None:
    """W4A16's shapes are int64, which must be aligned where they lie."""
    whole = prepare(layout("llama"), strategy=strategy)
    (rtn,) = build_passes([{"rtn": {"scheme": "W4A16"}}])
    assert len(plan_output(whole, rtn.assign(whole, {})).shards) == 1


def test_refusals() -> None:
    llama = layout("llama")
    with pytest.raises(UserError, match=r"kvCache: the model \(kv_lora_rank 512\) caches latent vectors"):
        prepare(replace(llama, config={**llama.config, "kv_lora_rank": 512}))
    with pytest.raises(UserError, match="kvCache: model_type 'olmo2' is not known"):
        prepare(layout("olmo2"))
    with pytest.raises(UserError, match=r"layers.0.self_attn.k_scale: the layer has this scale already; use kvCache once"):
        prepare(prepare(llama))
    with pytest.raises(UserError, match="num_attention_heads 3 does not fit"):
        prepare(replace(llama, config={**llama.config, "num_attention_heads": 3}), strategy="head")
    with pytest.raises(UserError, match="strategy"):
        prepare(llama, strategy="channel")
