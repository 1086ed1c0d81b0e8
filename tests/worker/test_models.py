"""The models that all other tests compress: trained, deterministic, and sensitive enough that damage shows."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from families import fp8_block_model, mxfp4_model, tiny_model
from sources import folder_source
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Mxfp4Config, PreTrainedModel

from corpus import Corpus
from kompressor_worker.layout import ModelLayout
from kompressor_worker.reading import read_layout
from models import RECIPES, held_out_tokens, perplexity, trained_model


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def rounded(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """All decoder matrices but routers, to nearest, one scale a row: the plainest quantiser there is."""
    top = 2 ** (bits - 1)
    for name, weight in model.named_parameters():
        if ".layers." in name and weight.dim() >= 2 and "gate.weight" not in name:
            scale = weight.data.abs().amax(-1, keepdim=True) / (top - 0.5)
            weight.data = (weight.data / scale).round().clamp(-top, top - 1) * scale
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_rounding_to_four_bits_hurts_and_to_eight_does_not(kind: str) -> None:
    folder, tokens = trained_model(kind), held_out_tokens(kind)
    exact, eight, four = (perplexity(model, tokens) for model in (load(folder), rounded(load(folder), 8), rounded(load(folder), 4)))
    assert 2.0 < exact < 3.6, "learned, not perfectly"
    assert abs(eight / exact - 1) < 0.002
    assert four > 1.01 * exact


def test_the_language_is_the_same_everywhere() -> None:
    text = Corpus(0).text(seed=1, characters=20_000)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "818a936c28863b90"
    assert text != Corpus(0).text(seed=2, characters=20_000)
    assert text != Corpus(1).text(seed=1, characters=20_000)


def test_a_recipe_names_its_cache() -> None:
    assert len({recipe.digest for recipe in RECIPES.values()}) == len(RECIPES)


def test_the_checkpoint_is_complete(trained_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained_llama)
    text = "Clara was a potter who lived near the old tower."
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert GenerationConfig.from_pretrained(trained_llama).eos_token_id == 2
    said = load(trained_llama).generate(torch.tensor([ids]), max_new_tokens=24)[0]
    words = set(tokenizer.decode(said[len(ids) :]).split())
    assert len(words & set(Corpus(0).sample.split())) >= 5


def test_held_out_rows(trained_llama: Path) -> None:
    rows = held_out_tokens("llama", rows=5, length=40)
    assert rows.shape == (5, 40)
    assert rows.dtype == torch.int64
    assert (rows[:, 0] == 1).all() and (rows < RECIPES["llama"].vocabulary).all()
    assert torch.equal(rows, held_out_tokens("llama", rows=5, length=40))


def by_name(layout: ModelLayout) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {t.name: (t.dtype, t.shape) for stage in layout.stages() for t in stage.tensors}


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_fp8_sources_are_what_transformers_reads(family: str) -> None:
    from safetensors.torch import load_file
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    plain = tiny_model(family)
    folder = fp8_block_model(plain)
    layout = read_layout(folder_source(folder))
    assert by_name(layout) == by_name(read_layout(folder_source(plain)))
    before, after = load_file(plain / "model.safetensors"), load_file(folder / "model.safetensors")
    encoded = [t for stage in layout.stages() for t in stage.tensors if t.encoding == "fp8_block"]
    assert {t.name for t in encoded} == {x.weight for x in layout.linears() if x.kind == "linear"}
    for tensor in encoded:
        weight, scale = (after[stored.name] for stored in tensor.stored)
        decoded = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
        assert (decoded - before[tensor.name].float()).norm() < 0.04 * before[tensor.name].float().norm()


def test_mxfp4_sources_are_what_transformers_reads() -> None:
    folder = mxfp4_model()
    plain = tiny_model("gpt_oss")
    layout = read_layout(folder_source(folder))
    assert by_name(layout) == by_name(read_layout(folder_source(plain)))
    assert sum(t.encoding == "mxfp4" for stage in layout.stages() for t in stage.tensors) == 4
    loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True))
    exact = load(plain).state_dict()
    for name, tensor in loaded.state_dict().items():
        error = (tensor.float() - exact[name]).norm() / exact[name].norm().clamp(min=1e-9)
        assert error < (0.15 if name.endswith(("gate_up_proj", "down_proj")) else 1e-6), name
