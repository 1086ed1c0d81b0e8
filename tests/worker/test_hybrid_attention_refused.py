"""What windows cannot do is said in one line, before a weight is read."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import families
import pytest

import jobs
from kompressor_worker.errors import UserError
from kompressor_worker.job import load_job
from kompressor_worker.plan import make_plan
from kompressor_worker.progress import Progress
from kompressor_worker.run import run
from kompressor_worker.storage.file_source import FileSource

Passes = list[dict[str, Any]]


def hybrid(**params: Any) -> Passes:
    return [{"hybridAttention": {"window": 16, "fullLayers": 1, **params}}]


REFUSED: dict[str, tuple[str, Passes, str]] = {
    "more layers": ("llama", hybrid(fullLayers=7), "fullLayers 7 are to stay, the model has 4 of 4; ask for fewer"),
    "all layers": ("llama", hybrid(fullLayers=4), "fullLayers 4 are to stay, the model has 4 of 4"),
    "no layer": ("llama", hybrid(fullLayers=0), r"passes\[0\].hybridAttention: fullLayers: .*greater than or equal to 1"),
    "both": ("llama", hybrid(kvBudget=0.5), "give either fullLayers, such as 4, or kvBudget"),
    "neither": ("llama", [{"hybridAttention": {"window": 16}}], "give either fullLayers, such as 4, or kvBudget"),
    "a wide window": ("llama", hybrid(window=128), "window 128 is no less than max_position_embeddings 128.*choose"),
    "wider than the context": ("llama", hybrid(context=16), "window 16 is no less than context 16.*choose"),
    "a context without positions": ("llama", hybrid(context=200), "context 200 is above the model's max_position_embeddings 128"),
    "a small budget": (
        "llama",
        [{"hybridAttention": {"window": 16, "kvBudget": 0.3}}],
        "kvBudget 0.3 is below 0.344, which one layer with full attention and a window of 16 in the 3 others take of a context of 128",
    ),
    "a window of another size": ("gemma2", hybrid(), "2 of 4 layers have a window of 4096 already, .*one size for all; set window 4096"),
    "windows everywhere": ("mistral", hybrid(window=8), "all 4 layers have a window already; leave hybridAttention out"),
    "biases": ("llama", hybrid(), "a 'llama' with windows is published as a ministral, which has no attention_bias"),
    "fused projections": ("phi3", hybrid(), "a 'phi3' with windows in some layers is read alike by no two loaders .known: llama"),
    "an unknown decoder": ("gpt_neox", hybrid(), "a 'gpt_neox' with windows in some layers is read alike by no two"),
    "latent vectors": ("deepseek_v3", hybrid(), r"hybridAttention: the model \(kv_lora_rank 128\) attends to latent vectors"),
    "heads of an OLMo3": ("olmo3", [{"pruneHeads": {"kvHeads": 1}}], "a olmo3 has norms over all heads together"),
    "channels of an OLMo3": ("olmo3", [{"pruneHidden": {"hiddenSize": 96}}], "a olmo3 has no norm before attention and feed-forward"),
    "names that change behind heads": (
        "mixtral",
        [{"pruneHeads": {"kvHeads": 1}}, *hybrid()],
        "published as a qwen2_moe, under other tensor names, .*put hybridAttention first, or into a job of its own",
    ),
    "a rotation behind names that change": (
        "mixtral",
        [*hybrid(), {"rotate": {}}],
        "rotate: model_type 'qwen2_moe' has other tensor names",
    ),
    "twice": ("qwen3", hybrid() * 2, "an earlier hybridAttention has given layers a window; ask once"),
    "before blocks go": ("qwen3", [*hybrid(), {"pruneLayers": {"layers": 3}}], "put pruneLayers first"),
    "before heads go": ("qwen3", [*hybrid(), {"pruneHeads": {"kvHeads": 1}}], "put pruneHeads first"),
    "short rows": ("qwen3", hybrid(window=24), r"passes\[0\].hybridAttention: calibration.sequenceLength 24 shows nothing of it; set 25"),
}
SHAPES: dict[str, dict[str, Any]] = {
    "windows everywhere": {"sliding_window": 8},
    "biases": {"attention_bias": True},
}


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(FileSource, "read_into", fail)


def job(tmp_path: Path, family: str, passes: Passes, length: int = 24, **shape: Any) -> Path:
    source = families.tiny_model(family, num_hidden_layers=4, **shape)
    body = jobs.manifest(source.as_uri(), (tmp_path / "out").as_uri(), passes)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"ids": [3 + n] * length}) + "\n" for n in range(8)))
    dataset = {"uri": rows.as_uri(), "tokens": "ids"}
    for section in ("calibration", "evaluation"):
        body["spec"][section] = {"dataset": dataset, "samples": 8, "sequenceLength": 24}
    return jobs.write(tmp_path / "job.json", body)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_a_weight_is_read(case: str, tmp_path: Path) -> None:
    family, passes, said = REFUSED[case]
    with pytest.raises(UserError, match=said) as refused:
        make_plan(load_job(job(tmp_path, family, passes, **SHAPES.get(case, {})), {}), {})
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(("share", "kept"), [(0.35, 1), (0.56, 1), (0.57, 2), (0.99, 3)])
def test_a_budget_is_as_many_layers_as_it_allows(share: float, kept: int, tmp_path: Path) -> None:
    """Of four layers of 128 tokens each, with a window of 16: 176, 288, 400 tokens are 0.34, 0.56 and 0.78 of 512."""
    plan = make_plan(load_job(job(tmp_path, "llama", [{"hybridAttention": {"window": 16, "kvBudget": share}}]), {}), {})
    assert plan.as_json()["kvCache"]["fullLayers"] == [4, kept]
    assert any("less than 34: few tokens see past the window" in warning for warning in plan.layout.warnings)


def test_data_that_turns_out_to_be_short(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the longest calibration row has 10 tokens, none beyond a window of 16; give longer"):
        run(load_job(job(tmp_path, "llama", hybrid(), length=10), {}), {}, Progress(), threading.Event())
