"""Every family made smaller by real jobs: what is published has the shapes that transformers gives such a model, and the function reported.

In fp32, so that what a job says and what transformers measures agree to the sums' last digits. Cut by hand where nothing is corrected.
"""

from __future__ import annotations

import json
import math
import random
import threading
from pathlib import Path
from typing import Any

import families
import pytest
import smaller
import torch
from smaller import Sizes

import jobs
from independent import tensors_of
from kompressor_worker.job import load_job
from kompressor_worker.passes.prune_layers import PruneLayers
from kompressor_worker.progress import Progress
from kompressor_worker.run import run

ROWS, LENGTH, VOCABULARY = 32, 24, 128
SHAPE: dict[str, Any] = {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
SHAPE |= {"initializer_range": 0.1, "dtype": "float32"}
WINDOW = {"sliding_window": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": WINDOW,
    "qwen2": {"head_dim": None},
    "qwen3": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "gemma2": WINDOW,
    "gemma3": WINDOW,
    "phi3": {"head_dim": None},
    "mixtral": {},
    "qwen2_moe": {"mlp_only_layers": [3]},
    "qwen3_moe": {"mlp_only_layers": [3], "decoder_sparse_step": 2},  # experts in blocks 1 and 5
}
WHOLE = ("gemma2", "gemma3")
"""Their heads must divide the hidden size: half of these go, of the others a quarter."""
SETTLED = {"correction": "none"}


def kv_heads(family: str) -> int:
    return 2 if family in WHOLE else 3


def passes_of(family: str, layers: int = 4, **more: Any) -> dict[str, dict[str, Any]]:
    return {
        "pruneLayers": {"layers": layers, **more},
        "pruneHeads": {"kvHeads": kv_heads(family), **more},
        "pruneWidth": {"ratio": 0.25, "multiple": 32, **more},
        "pruneHidden": {"hiddenSize": 96, **more},
    }


W4 = {"gptq": {"scheme": "W4A16", "groupSize": 32}}


def token_rows(seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(3, VOCABULARY) for _ in range(LENGTH)] for _ in range(ROWS)]


def compress(source: Path, folder: Path, passes: list[dict[str, Any]]) -> dict[str, Any]:
    """kompressor.json of a job that ends in folder/out."""
    body = jobs.manifest(source.as_uri(), (folder / "out").as_uri(), passes)
    for section, seed in (("calibration", 1), ("evaluation", 2)):
        path = folder / f"{section}.jsonl"
        path.write_text("".join(json.dumps({"ids": row}) + "\n" for row in token_rows(seed)))
        body["spec"][section] = {"dataset": {"uri": path.as_uri(), "tokens": "ids"}, "samples": ROWS, "sequenceLength": LENGTH}
    run(load_job(jobs.write(folder / "job.json", body), {}), {}, Progress(), threading.Event())
    report: dict[str, Any] = json.loads((folder / "out" / "kompressor.json").read_text())
    return report


def model_of(family: str, folder: Path) -> Path:
    return smaller.lively(families.tiny_model(family, **{**SHAPE, **FAMILIES[family]}), folder / "source")


def rows_of(section: str) -> torch.Tensor:
    """As the job reads them, in its order or another."""
    return torch.tensor(token_rows({"calibration": 1, "evaluation": 2}[section]))


def require_function(source: Path, result: Path, report: dict[str, Any], least: float) -> None:
    """That the KL and the perplexity reported are those of the published files, and no accident."""
    said, seen = report["evaluation"], smaller.measure(source, result, rows_of("evaluation"))
    assert said["kl"] > least, said
    for name, value in seen.items():
        assert value == pytest.approx(said[name], rel=2e-4), name


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize("name", ["pruneHeads", "pruneWidth", "pruneHidden", "pruneLayers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_uncorrected_it_is_a_cut_of_the_source(family: str, name: str, tmp_path: Path) -> None:
    source = model_of(family, tmp_path)
    report = compress(source, tmp_path, [{name: passes_of(family, **SETTLED)[name]}])
    before, made, sizes = tensors_of(source), tensors_of(tmp_path / "out"), Sizes.of(source)
    match name:
        case "pruneHeads":
            wanted = smaller.cut_heads(before, made, sizes)
        case "pruneWidth":
            wanted = smaller.cut_width(before, made, sizes)
        case "pruneLayers":
            wanted = smaller.cut_layers(before, made, sizes)
        case _:
            wanted = by_hand(family, source, made)
    assert made.keys() == wanted.keys()
    for key, tensor in wanted.items():
        if name == "pruneHidden":  # norms are measured in sums of another order, embeddings may be multiplied
            torch.testing.assert_close(made[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda said, key=key: f"{key}: {said}")
        else:
            assert torch.equal(made[key], tensor), key
    require_function(source, tmp_path / "out", report, 1e-3)


def by_hand(family: str, source: Path, made: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What pruneHidden should publish. Gemma multiplies embeddings by the root of their number; what is tied to them hears of it too."""
    before, sizes = tensors_of(source), Sizes.of(source)
    kept = smaller.kept_channels(before, made)
    factors = smaller.norm_factors(source, rows_of("calibration"), kept)
    widened = math.sqrt(sizes.hidden / len(kept)) if family in WHOLE else 1.0
    return smaller.cut_hidden(before, kept, sizes, {**factors, "model.norm.weight": factors["model.norm.weight"] / widened}, widened)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_four_then_gptq(family: str, tmp_path: Path) -> None:
    """Corrected and quantised in one job, two neighbouring blocks or any two gone."""
    source = model_of(family, tmp_path)
    report = compress(source, tmp_path, [{name: params} for name, params in passes_of(family).items()] + [W4])
    require_function(source, tmp_path / "out", report, 1e-2)
    assert report["result"]["quantizedLinears"] > 0


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_narrower_and_fewer_behind_latents(family: str, tmp_path: Path) -> None:
    """The shared expert is as wide as so many routed ones, before and after; layers without experts stay at the beginning."""
    shape = {**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 4, "first_k_dense_replace": 2, "n_shared_experts": 2}
    source = smaller.lively(families.tiny_model(family, **shape), tmp_path / "source")
    passes = passes_of(family, layers=4)
    report = compress(source, tmp_path, [{name: passes[name]} for name in ("pruneLayers", "pruneWidth")] + [W4])
    require_function(source, tmp_path / "out", report, 1e-2)
    config, gone = config_of(tmp_path / "out"), report["structure"]["passes"]["pruneLayers"]["layers"]
    assert config["first_k_dense_replace"] == sum(layer not in gone for layer in (0, 1))
    assert (config["moe_intermediate_size"], config["intermediate_size"]) == (96, 192)


DEAD_BLOCK = 2
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {"max_window_layers": 5, "layer_types": ["full_attention"] * 5},
    "qwen3": {"max_window_layers": 5, "layer_types": ["full_attention"] * 5},
    "smollm3": {"layer_types": ["full_attention"] * 5, "no_rope_layers": [1, 0, 0, 1, 0]},
    "gemma2": {"layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "full_attention"]},
    "gemma3": {"layer_types": ["sliding_attention"] * 4 + ["full_attention"]},
    "qwen2_moe": {
        "mlp_only_layers": [2],
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 192,
        "max_window_layers": 5,
        "layer_types": ["full_attention"] * 5,
        "architectures": ["TransformersMoEForCausalLM"],
    },
    "qwen3_moe": {"mlp_only_layers": [0, 2, 3], "decoder_sparse_step": 1, "moe_intermediate_size": 96},
}
"""What config.json says beside the usual sizes once block 2 of 6 is gone and 6 heads are left of 8: what is not named here stays."""


@pytest.mark.parametrize("old", [False, True], ids=["", "layer kinds by rule"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_adds_nothing_goes_and_the_function_stays(family: str, old: bool, tmp_path: Path) -> None:
    """All four passes, corrected, on a model in which heads, neurons, channels and a block are dead. What was a rule of the family's over
    all layers, as older files have it, is a list afterwards."""
    if old and family not in WHOLE:
        pytest.skip("its files have always listed them, or have none")
    groups = SHAPE["num_key_value_heads"] - kv_heads(family)
    source = smaller.plant(model_of(family, tmp_path), tmp_path / "planted", groups, 0.25, 32, DEAD_BLOCK)
    before = config_of(source)
    if old:
        before = {key: value for key, value in before.items() if key != "layer_types"}
        (source / "config.json").write_text(json.dumps(before))
    report = compress(source, tmp_path, [{name: params} for name, params in passes_of(family, layers=5).items()])
    kl = smaller.divergences(source, tmp_path / "out", rows_of("evaluation"))
    assert float(kl.abs().quantile(0.95)) < 1e-5 and float(kl.median()) < 1e-6
    assert float(kl.mean()) == pytest.approx(report["evaluation"]["kl"], rel=1e-2, abs=1e-7)
    assert float(kl.mean()) < (1e-3 if "moe" in family or family == "mixtral" else 1e-6)  # a router may be near a tie, once
    heads, sizes = kv_heads(family), Sizes.of(source)
    usual = {"num_hidden_layers": 5, "hidden_size": 96, "intermediate_size": 192, "head_dim": sizes.head}
    usual |= {"num_key_value_heads": heads, "num_attention_heads": 2 * heads}
    assert config_of(tmp_path / "out") == {**before, **usual, **CONFIGS.get(family, {})}


@pytest.mark.parametrize("measure", ["influence", "divergence"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_blocks_are_scored_as_transformers_would(family: str, measure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[torch.Tensor] = []
    decide = PruneLayers.decide
    monkeypatch.setattr(PruneLayers, "decide", lambda self, seen: (found.append(seen["scores"]), decide(self, seen))[1])
    source = model_of(family, tmp_path)
    compress(source, tmp_path, [{"pruneLayers": {"layers": 5, "measure": measure, "samples": ROWS, **SETTLED}}])
    wanted = influence(source) if measure == "influence" else divergence(source)
    assert found[0].tolist() == pytest.approx(wanted, rel=1e-3)


def influence(source: Path) -> list[float]:
    model, rows = smaller.load(source), rows_of("calibration")
    inputs: list[torch.Tensor] = []
    scores: list[float] = []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
        block.register_forward_hook(
            lambda _, x, y: scores.append(1 - float(torch.cosine_similarity(x[0], y[0] if isinstance(y, tuple) else y, dim=-1).mean()))
        )
    with torch.inference_mode():
        model(input_ids=rows, use_cache=False)
    return scores


def divergence(source: Path) -> list[float]:
    model, rows = smaller.load(source), rows_of("calibration")
    blocks, scores, kinds = list(model.model.layers), [], getattr(model.config, "layer_types", None)
    with torch.inference_mode():
        whole = model(input_ids=rows, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        for number in range(len(blocks)):
            model.model.layers = torch.nn.ModuleList(blocks[:number] + blocks[number + 1 :])
            model.config.num_hidden_layers = len(blocks) - 1
            if kinds is not None:
                model.config.layer_types = kinds[:number] + kinds[number + 1 :]
            less = model(input_ids=rows, use_cache=False).logits[:, :-1].double().log_softmax(-1)
            scores.append(float((whole.exp() * (whole - less)).sum(-1).mean()))
    return scores
