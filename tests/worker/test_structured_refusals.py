"""What structured pruning cannot do is said in one line, before a weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest

import jobs
from kompressor_worker.errors import UserError
from kompressor_worker.job import load_job
from kompressor_worker.plan import make_plan
from kompressor_worker.storage.file_source import FileSource

HEADS, WIDTH = {"pruneHeads": {"kvHeads": 1}}, {"pruneWidth": {"ratio": 0.5, "multiple": 32}}
HIDDEN, LAYERS = {"pruneHidden": {"hiddenSize": 96}}, {"pruneLayers": {"layers": 1}}
W4 = {"gptq": {"scheme": "W4A16", "groupSize": 32}}

Passes = list[dict[str, Any]]
REFUSED: dict[str, tuple[str, Passes, str]] = {
    "more heads": ("llama", [{"pruneHeads": {"kvHeads": 3}}], "num_key_value_heads 3 is to stay, the model has 2; ask for fewer"),
    "all heads": ("llama", [{"pruneHeads": {"kvHeads": 2}}], "num_key_value_heads 2 is to stay, the model has 2"),
    "more neurons": ("llama", [{"pruneWidth": {"intermediateSize": 300}}], "intermediate_size 300 is to stay, the model has 256"),
    "more channels": ("llama", [{"pruneHidden": {"hiddenSize": 129}}], "hidden_size 129 is to stay, the model has 128"),
    "more blocks": ("llama", [{"pruneLayers": {"layers": 3}}], "num_hidden_layers 3 is to stay, the model has 2"),
    "no head": ("llama", [{"pruneHeads": {"kvHeads": 0}}], r"passes\[0\].pruneHeads: kvHeads: .*greater than or equal to 1"),
    "no block": ("llama", [{"pruneLayers": {"ratio": 0.9}}], "ratio 0.9 of num_hidden_layers 2 leaves 0, rounded; choose another ratio"),
    "nothing goes": ("llama", [{"pruneHeads": {"ratio": 0.1}}], "ratio 0.1 of num_key_value_heads 2 leaves 2, rounded; choose another"),
    "rounded up": ("llama", [{"pruneHidden": {"ratio": 0.25}}], "leaves 128, rounded to a multiple of 128; .*or a smaller multiple"),
    "rounded down": ("llama", [{"pruneWidth": {"ratio": 0.8}}], "intermediate_size 256 leaves 0, rounded to a multiple of 128"),
    "a ratio above one": ("llama", [{"pruneWidth": {"ratio": 1.0}}], "ratio: .*less than 1"),
    "both": ("llama", [{"pruneHeads": {"ratio": 0.5, "kvHeads": 1}}], "give either ratio, such as 0.25, or kvHeads"),
    "neither": ("llama", [{"pruneLayers": {}}], "give either ratio, such as 0.25, or layers"),
    "by layer": ("llama", [{"pruneWidth": {"ratio": 0.5, "targets": ["re:.*0.*"]}}], "no portable loader reads sizes by layer"),
    "an unknown function": ("gpt_neox", [WIDTH], "model_type 'gpt_neox' is not one whose function is known .*leave pruneWidth out"),
    "stacked experts": ("gpt_oss", [HEADS], "model_type 'gpt_oss' is not one whose function is known"),
    "heads of latents": ("deepseek_v3", [HEADS], "model_type 'deepseek_v3' makes its heads of latents .*use pruneWidth or pruneLayers"),
    "channels before latents": ("deepseek_v2", [HIDDEN], "pruneHidden: model_type 'deepseek_v2' makes its heads of latents"),
    "a cache of latents": (
        "deepseek_v2",
        [{"kvCache": {}}],
        r"kvCache: the model \(kv_lora_rank 128\) caches latent vectors.*leave kvCache",
    ),
    "an absorbed weight, a static input": (
        "deepseek_v3",
        [{"rtn": {"scheme": "FP8"}}],
        "kv_b_proj: vLLM learns this weight .*list it under ignore, or choose FP8_DYNAMIC",
    ),
    "a model that sees": ("gemma3_vision", [HIDDEN], "also sees or hears, .*use pruneWidth, pruneHeads or pruneLayers"),
    "two widths, one count": ("qwen3_moe", [{"pruneWidth": {"intermediateSize": 96}}], "feed-forwards of 2 widths .*give a ratio"),
    "heads that do not divide": (
        "gemma2",
        [{"pruneHeads": {"kvHeads": 3}}],
        "6 heads of 64 channels, .*transformers refuses a gemma2 .*other counts",
    ),
    "a window that its stand-in has not": (
        "qwen2",
        [HEADS],
        "vLLM takes .*a qwen2, .*seed_oss, which has no use_sliding_window; ask for other",
    ),
    "after gptq": ("llama", [W4, HEADS], "is W4A16 by an earlier pass; put pruneHeads before the passes that quantise"),
    "after rtn": ("llama", [{"rtn": {"scheme": "W8A8"}}, LAYERS], "is W8A8 by an earlier pass; put pruneLayers before"),
    "after wanda": ("llama", [{"wanda": {"sparsity": 0.5}}, WIDTH], "is to have zeros by an earlier pass, .*put pruneWidth first"),
    "after kvCache": ("llama", [{"kvCache": {}}, HIDDEN], "has scales for the cache as it was; put pruneHidden before kvCache"),
    "hidden after rotate": ("llama", [{"rotate": {}}, HIDDEN], "has turned the hidden states that it looks at; put pruneHidden first"),
    "blocks after rotate": ("llama", [{"rotate": {}}, LAYERS], "has turned the hidden states that it looks at; put pruneLayers first"),
    "blocks after channels": ("llama", [HIDDEN, LAYERS], "has left 96 of the 128 channels; put pruneLayers first"),
    "heads twice": ("qwen3", [HEADS, HEADS], "an earlier pruneHeads has left num_attention_heads 2 of 8; ask once"),
    "neurons twice": ("llama", [WIDTH, WIDTH], "an earlier pruneWidth has left intermediate_size 128 of 256; ask once"),
    "neurons of experts twice": ("qwen3_moe", [WIDTH, WIDTH], "an earlier pruneWidth has left .*intermediate_size .*ask once"),
    "channels twice": ("llama", [HIDDEN, HIDDEN], "an earlier pruneHidden has left hidden_size 96 of 128; ask once"),
    "blocks twice": ("llama", [LAYERS, LAYERS], "an earlier pruneLayers has left num_hidden_layers 1 of 2; ask once"),
    "neurons, then groups": ("llama", [{"pruneWidth": {"intermediateSize": 144}}, W4], "down_proj: 144 .*groupSize 32"),
    "channels, then groups": ("llama", [{"pruneHidden": {"hiddenSize": 80}}, W4], "_proj: 80 .*groupSize 32"),
    "heads, then groups": ("qwen2", [{"pruneHeads": {"kvHeads": 3}}, {"gptq": {"scheme": "W4A16"}}], "o_proj: 96 .*groupSize 128"),
    "experts, then groups": ("mixtral", [{"pruneWidth": {"intermediateSize": 144}}, W4], r"experts.0.w2: 144 .*groupSize 32"),
}
SHAPES: dict[str, dict[str, Any]] = {
    "heads that do not divide": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "a window that its stand-in has not": {"num_attention_heads": 8, "head_dim": None, "use_sliding_window": True, "sliding_window": 8},
    "heads twice": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "heads, then groups": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": None},
}


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(FileSource, "read_into", fail)


def job(tmp_path: Path, family: str, passes: Passes, calibrated: bool = True, **shape: Any) -> Path:
    source = families.tiny_model(family, **shape)
    body = jobs.manifest(source.as_uri(), (tmp_path / "out").as_uri(), passes)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"ids": [3 + n, 4, 5, 6]}) + "\n" for n in range(8)))
    if calibrated:
        body["spec"]["calibration"] = {"dataset": {"uri": rows.as_uri(), "tokens": "ids"}, "samples": 8, "sequenceLength": 4}
    return jobs.write(tmp_path / "job.json", body)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_a_weight_is_read(case: str, tmp_path: Path) -> None:
    family, passes, said = REFUSED[case]
    with pytest.raises(UserError, match=said) as refused:
        make_plan(load_job(job(tmp_path, family, passes, **SHAPES.get(case, {})), {}), {})
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("one", [HEADS, WIDTH, HIDDEN, LAYERS], ids=lambda one: next(iter(one)))
def test_without_data_to_measure_on(one: dict[str, Any], tmp_path: Path) -> None:
    uncorrected = {name: {**params, "correction": "none"} for name, params in one.items()}
    with pytest.raises(UserError, match=r"passes\[0\].prune\w+: measures activations, and spec.calibration is missing; add"):
        make_plan(load_job(job(tmp_path, "llama", [uncorrected], calibrated=False), {}), {})


@pytest.mark.usefixtures("unread")
def test_the_plan_says_what_will_be_there(tmp_path: Path) -> None:
    """All four in one job that nothing is wrong with: planned, and no weight read either."""
    passes = [LAYERS, HEADS, WIDTH, HIDDEN, W4]
    plan = make_plan(load_job(job(tmp_path, "llama", passes), {}), {})
    shapes = {linear.name: linear.shape for linear in plan.layout.linears()}
    assert shapes["model.layers.0.self_attn.q_proj"] == (128, 96) and shapes["model.layers.0.self_attn.k_proj"] == (64, 96)
    assert shapes["model.layers.0.mlp.down_proj"] == (96, 128) and shapes["lm_head"] == (128, 96)
    assert not any(name.startswith("model.layers.1.") for name in shapes)
