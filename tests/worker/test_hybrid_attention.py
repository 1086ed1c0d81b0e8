"""Windows in some layers: every family's result read by transformers token by token as the job ran it, and what windows cost as measured.

In fp32, on rows longer than the window: a loader that drops the windows, or puts them on every layer, is told apart by each token.
"""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import families
import pytest
import smaller
import torch
from hypothesis import given
from hypothesis import strategies as st
from sources import folder_source
from torch import Tensor
from windowed import FULL, SLIDING, config_of, variant

import jobs
from calibrated_jobs import evaluation_rows
from kompressor_worker.architectures import FAMILIES as DATA
from kompressor_worker.evaluate import BlockError
from kompressor_worker.job import load_job
from kompressor_worker.last_hidden import LastHidden
from kompressor_worker.passes.attention_sets import EVEN, SETS, even, sets
from kompressor_worker.plan import make_plan
from kompressor_worker.progress import Progress
from kompressor_worker.reading import read_layout
from kompressor_worker.run import run
from kompressor_worker.windows import windows_of

ROWS, LENGTH, VOCABULARY, WINDOW = 16, 40, 128, 8
SHAPE: dict[str, Any] = {"num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
SHAPE |= {"initializer_range": 0.1, "dtype": "float32"}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"head_dim": None},
    "qwen3": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "gemma2": {"sliding_window": WINDOW},
    "gemma3": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 3},
    "olmo3": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 3},
    "mixtral": {},
    "qwen2_moe": {"mlp_only_layers": [3], "decoder_sparse_step": 1, "layer_types": None},
    "qwen3_moe": {"mlp_only_layers": [3], "decoder_sparse_step": 2},  # experts in blocks 1 and 5
}
THERE = {"gemma2": [1, 3, 5], "gemma3": [1, 3, 5], "olmo3": [1, 3, 5]}
"""Layers with full attention, where not all have it."""
NOTHING = {"mistral": {"sliding_window": None}}
"""As hubs' files say it."""
HYBRID: dict[str, Any] = {"hybridAttention": {"window": WINDOW, "fullLayers": 2, "samples": ROWS}}
W4 = {"gptq": {"scheme": "W4A16", "groupSize": 32}}


def token_rows(seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(3, VOCABULARY) for _ in range(LENGTH)] for _ in range(ROWS)]


def job_of(source: Path, folder: Path, passes: list[dict[str, Any]]) -> Path:
    body = jobs.manifest(source.as_uri(), (folder / "out").as_uri(), passes)
    for section, seed in (("calibration", 1), ("evaluation", 2)):
        path = folder / f"{section}.jsonl"
        path.write_text("".join(json.dumps({"ids": row}) + "\n" for row in token_rows(seed)))
        body["spec"][section] = {"dataset": {"uri": path.as_uri(), "tokens": "ids"}, "samples": ROWS, "sequenceLength": LENGTH}
    return jobs.write(folder / "job.json", body)


def compress(source: Path, folder: Path, passes: list[dict[str, Any]]) -> dict[str, Any]:
    """kompressor.json of a job that ends in folder/out."""
    run(load_job(job_of(source, folder, passes), {}), {}, Progress(), threading.Event())
    report: dict[str, Any] = json.loads((folder / "out" / "kompressor.json").read_text())
    return report


def model_of(family: str, folder: Path, **more: Any) -> Path:
    made = smaller.lively(families.tiny_model(family, **{**SHAPE, **FAMILIES[family], **more}), folder / "source")
    (made / "config.json").write_text(json.dumps({**config_of(made), **NOTHING.get(family, {})}))
    return made


def losses(folder: Path, rows: Tensor) -> Tensor:
    """fp64 [rows, length - 1]: negative log-likelihood of each token but the first, by transformers."""
    return -smaller.log_probabilities(folder, rows).gather(-1, rows[:, 1:, None])[..., 0]


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the job itself saw of each token of the evaluation, as `losses`, in its order."""
    found: list[Tensor] = []
    result = LastHidden.result

    def spied(self: LastHidden) -> dict[str, Any]:
        sums = self._comparison._compressed
        found.append((sums.logsumexp() - sums.target).view(ROWS, -1))
        return result(self)

    monkeypatch.setattr(LastHidden, "result", spied)
    return found


@pytest.mark.parametrize("more", [[], [W4]], ids=["", "gptq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_it_token_by_token(family: str, more: list[dict[str, Any]], tmp_path: Path, streamed: list[Tensor]) -> None:
    """As the job's own stream had it; and other windows than those would be seen."""
    report = compress(model_of(family, tmp_path), tmp_path, [HYBRID, *more])
    out, rows = tmp_path / "out", evaluation_rows(tmp_path / "job.json")
    seen = losses(out, rows)
    torch.testing.assert_close(seen, streamed[0], rtol=0, atol=1e-4)
    kinds, full = config_of(out)["layer_types"], report["attention"]["windows"]["fullLayers"]
    assert [layer for layer, kind in enumerate(kinds) if kind == FULL] == full and len(full) == 2
    for name, others in (("dropped", [FULL] * 6), ("everywhere", [SLIDING] * 6)):
        assert float((losses(variant(out, name, others), rows) - seen).abs()[:, WINDOW:].median()) > 1e-2, name


@pytest.mark.parametrize("family", ["llama", "gemma3", "olmo3", "qwen3_moe"])
def test_costs_are_what_transformers_says_of_each_layer_alone(family: str, tmp_path: Path) -> None:
    source, there = model_of(family, tmp_path), THERE.get(family, list(range(6)))
    found = compress(source, tmp_path, [HYBRID])["attention"]["windows"]
    rows, whole, wanted = torch.tensor(token_rows(1)), smaller.load(source), {"divergence": [0.0] * 6, "blockError": [0.0] * 6}
    with torch.inference_mode():
        before = whole(input_ids=rows, use_cache=False, output_hidden_states=True)
        for layer in there:
            kinds = [SLIDING if one == layer or one not in there else FULL for one in range(6)]
            model = smaller.load(variant(tmp_path / "out", str(layer), kinds))
            after = model(input_ids=rows, use_cache=False, output_hidden_states=True)
            p, q = (x.logits[:, :-1].double().log_softmax(-1) for x in (before, after))
            wanted["divergence"][layer] = float((p.exp() * (p - q)).sum(-1).mean())
            if layer < 5:  # the last one's stands behind the final norm
                error = BlockError()
                error.add(before.hidden_states[layer + 1], after.hidden_states[layer + 1])
                wanted["blockError"][layer] = error.value
    assert found["scores"]["divergence"] == pytest.approx(wanted["divergence"], rel=1e-3)
    assert found["scores"]["blockError"][:5] == pytest.approx(wanted["blockError"][:5], rel=1e-3)
    best = sorted(sorted(there, key=lambda layer: -wanted["divergence"][layer])[:2])
    tried = {tuple(each["sourceLayers"]): each["kl"] for each in found["tried"]}
    assert next(iter(tried)) == tuple(best) and set(even(there, 2)) <= set(tried)
    assert found["fullLayers"] == found["sourceLayers"] == list(min(tried, key=lambda layers: tried[layers]))
    for layers in list(tried)[:3]:
        made = variant(tmp_path / "out", f"{layers}", [FULL if one in layers else SLIDING for one in range(6)])
        assert tried[layers] == pytest.approx(float(smaller.divergences(source, made, rows).mean()), rel=1e-3)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=40), st.data())
def test_sets_that_are_tried(scores: list[int], data: st.DataObject) -> None:
    """The highest scores first, every offset of an even spacing or four, then what differs in one layer and loses least."""
    count = data.draw(st.integers(1, len(scores) - 1))
    layers = {2 * layer + 1: float(score) for layer, score in enumerate(scores)}  # not all layers are free
    found = sets(layers, count)
    assert all(len(set(each)) == count and set(each) <= set(layers) and list(each) == sorted(each) for each in found)
    assert len(set(found)) == len(found) <= SETS
    assert sum(layers[layer] for layer in found[0]) == sum(sorted(layers.values(), reverse=True)[:count])
    assert set(even(sorted(layers), count)) <= set(found) and len(even(sorted(layers), count)) == min(EVEN, len(layers) // count)
    swaps = [each for each in found if len(set(each) - set(found[0])) == 1 and each not in even(sorted(layers), count)]
    lost = [sum(layers[layer] for layer in found[0]) - sum(layers[layer] for layer in each) for each in swaps]
    assert lost == sorted(lost) and (len(found) == SETS or len(swaps) >= count * (len(layers) - count) - EVEN)


def test_by_the_error_of_the_block_nothing_flows_on(tmp_path: Path) -> None:
    asked = {**HYBRID["hybridAttention"], "measure": "blockError"}
    found = compress(model_of("qwen3", tmp_path), tmp_path, [{"hybridAttention": asked}])["attention"]["windows"]
    (scores,) = found["scores"].values()
    assert found["fullLayers"] == sorted(sorted(range(6), key=lambda layer: -scores[layer])[:2]) and min(scores) > 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_behind_passes_that_take_away(family: str, tmp_path: Path, streamed: list[Tensor]) -> None:
    """Blocks are counted anew, heads no longer divide the hidden size."""
    passes = [{"pruneLayers": {"layers": 4}}, {"pruneHeads": {"kvHeads": 3}}, HYBRID]
    report = compress(model_of(family, tmp_path), tmp_path, passes)
    rows = evaluation_rows(tmp_path / "job.json")
    torch.testing.assert_close(losses(tmp_path / "out", rows), streamed[0], rtol=0, atol=1e-4)
    config, chosen, gone = (
        config_of(tmp_path / "out"),
        report["attention"]["windows"],
        report["structure"]["passes"]["pruneLayers"]["layers"],
    )
    kept = [layer for layer in range(6) if layer not in gone]
    assert (len(config["layer_types"]), config["num_attention_heads"]) == (4, 6)
    assert chosen["sourceLayers"] == [kept[layer] for layer in chosen["fullLayers"]]
    scores = chosen["scores"]["divergence"]
    assert set(chosen["sourceLayers"]) == set(sorted(kept, key=lambda layer: -scores[layer])[:2])


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_behind_passes_that_leave_fewer_experts(family: str, tmp_path: Path, streamed: list[Tensor]) -> None:
    compress(model_of(family, tmp_path), tmp_path, [{"pruneExperts": {"experts": 3}}, HYBRID])
    rows = evaluation_rows(tmp_path / "job.json")
    torch.testing.assert_close(losses(tmp_path / "out", rows), streamed[0], rtol=0, atol=1e-4)


def test_the_cache_is_counted_and_scaled(tmp_path: Path) -> None:
    """Plan and report, with FP8 scales beside the windows: at 100 tokens two layers hold 100 and four 8, in one byte each of four."""
    passes = [{"hybridAttention": {**HYBRID["hybridAttention"], "context": 100}}, {"kvCache": {}}]
    source = model_of("qwen3", tmp_path)
    job = load_job(job_of(source, tmp_path, passes), {})
    plan = make_plan(job, {})
    report = compress(source, tmp_path, passes)
    token = 2 * 4 * 32
    wanted = {"context": 100, "bytes": [6 * 100 * token * 4, (2 * 100 + 4 * 8) * token], "fullLayers": [6, 2]}
    wanted["bytesPerToken"] = [6 * token * 4, round((2 * 100 + 4 * 8) * token / 100)]
    assert plan.as_json()["kvCache"] == report["attention"]["kvCache"] == wanted
    assert plan.status() | {"kvContext": 100, "kvBytesPerTokenBefore": 6144, "kvBytesPerTokenAfter": 594} == plan.status()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "KV cache of 100 tokens" in page and "Full attention stays in layers" in page


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"sliding_window": 8}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "mistral without": ("mistral", {"sliding_window": None}),
    "qwen2, off": ("qwen2", {"sliding_window": 8, "use_sliding_window": False}),
    "qwen2, the last": ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 4}),
    "qwen3 listed": ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "layer_types": [FULL, SLIDING] * 3}),
    "qwen3_moe": ("qwen3_moe", {"sliding_window": 8, "use_sliding_window": True}),
    "mixtral": ("mixtral", {"sliding_window": 8}),
    "phi3": ("phi3", {"sliding_window": 8}),
    "smollm3": ("smollm3", {"sliding_window": 8}),
    "smollm3 listed": ("smollm3", {"sliding_window": 8, "use_sliding_window": True, "layer_types": [FULL, SLIDING] * 3}),
    "gemma2": ("gemma2", {"sliding_window": 8}),
    "gemma3": ("gemma3", {"sliding_window": 8}),
    "olmo3": ("olmo3", {"sliding_window": 8}),
}


@pytest.mark.parametrize("listed", [True, False], ids=["", "by rule"])
@pytest.mark.parametrize("case", CONFIGS)
def test_windows_are_where_transformers_has_them(case: str, listed: bool) -> None:
    """By the weights of its attention: the last token's on the first one are nothing where there is a window."""
    from transformers import AutoModelForCausalLM

    family, more = CONFIGS[case]
    source = families.tiny_model(family, **{**SHAPE, "head_dim": 16, **more})
    config = {k: v for k, v in {**config_of(source), **more}.items() if listed or k != "layer_types" or "layer_types" in more}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    rows = torch.tensor(token_rows(1))[:1]
    with torch.inference_mode():
        seen = model(input_ids=rows, use_cache=False, output_attentions=True).attentions
    wanted = [None if float(weights[0, :, -1, 0].abs().max()) > 0 else int((weights[0, 0, -1] > 0).sum()) for weights in seen]
    assert list(windows_of(config, DATA[read_layout(folder_source(source)).family or ""], 6)) == wanted
