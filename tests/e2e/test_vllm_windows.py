"""Windows in some layers: vLLM and transformers see every token of the published folder as the job did, in fp32. `make test-vllm`.

Means hardly tell a window that a loader drops from one that it keeps, so each token is compared; and the names that look right, under which
vLLM drops the windows without a word, are loaded too: were they ever to agree, nothing here would be shown.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_vllm import avx512, seen_by_vllm
from torch import Tensor
from transformers import AutoModelForCausalLM

import jobs
from calibrated_jobs import evaluation_rows, samples, write_data
from kompressor_worker.cli import run_cli
from models import trained_model

pytestmark = pytest.mark.vllm
WINDOW, TOLERANCE = 16, 1e-4
HYBRID: dict[str, Any] = {"hybridAttention": {"window": WINDOW, "fullLayers": 1, "samples": 8}}
HEADS: dict[str, Any] = {"pruneHeads": {"kvHeads": 3}}
CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "llama": ("llama", [HYBRID]),
    "qwen2": ("qwen2", [HYBRID]),
    "qwen3": ("qwen3", [HYBRID]),
    "qwen3_moe": ("qwen3_moe", [HYBRID]),
    "llama pruneHeads": ("llama", [HEADS, HYBRID]),  # 6 heads on 256 channels
    "qwen2 pruneHeads": ("qwen2", [{"pruneHeads": {"kvHeads": 2}}, HYBRID]),
    "qwen3 pruneLayers": ("qwen3", [{"pruneLayers": {"layers": 3}}, HYBRID]),
    "mixtral": ("mixtral", [HYBRID]),  # as a qwen2_moe whose shared expert says nothing
    **{f"random {kind}": (kind, [HYBRID]) for kind in ("mistral", "gemma2", "gemma3", "smollm3", "olmo3", "qwen2_moe")},
}
SHAPE: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 32,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.15,
}  # fmt: skip
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "gemma2": ("Gemma2Config", ALTERNATING),
    "gemma3": ("Gemma3TextConfig", ALTERNATING),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2}),
    "olmo3": ("Olmo3Config", ALTERNATING),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96},
    ),
}
"""Families of which there is no trained model."""
TRAPS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3 by its own class": ("qwen3", {"architectures": ["Qwen3ForCausalLM"]}),
    "qwen3_moe under its own name": (
        "qwen3_moe",
        {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "use_sliding_window": True},
    ),
}
"""Case to what its config.json could say instead."""


def drawn(kind: str, folder: Path) -> Path:
    name, more = RANDOM[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**SHAPE, **more})).save_pretrained(folder)
    return folder


def widened(kind: str, folder: Path) -> Path:
    """The trained model in fp32, so that nothing is rounded on the way."""
    shutil.copytree(trained_model(kind), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    state = {name: tensor.float() for name, tensor in load_file(trained_model(kind) / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return folder


def losses(folder: Path, rows: Tensor) -> Tensor:
    """[rows, length - 1] by transformers, fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        found: Tensor = -model(input_ids=rows, use_cache=False).logits[:, :-1].log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
    return found


@pytest.fixture(scope="module")
def seen(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Tensor, float, dict[str, Any] | str]]:
    """By case and trap: folder, evaluation rows, the perplexity that the job reports, what vLLM says."""
    base = tmp_path_factory.mktemp("windows")
    data = samples({section: path.as_uri() for section, path in write_data(base, "llama").items()})
    made: dict[str, tuple[Path, Tensor, float]] = {}
    chance = random.Random(0)
    ids = base / "ids.jsonl"
    ids.write_text("".join(json.dumps({"ids": [chance.randrange(3, 128) for _ in range(96)]}) + "\n" for _ in range(16)))
    sample = {"dataset": {"uri": ids.as_uri(), "tokens": "ids"}, "samples": 16, "sequenceLength": 96}
    here = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    asked = {value for item in here if hasattr(item, "callspec") for value in item.callspec.params.values()}
    wanted = asked | {TRAPS[trap][0] for trap in TRAPS if trap in asked}
    for case, (kind, passes) in ((case, how) for case, how in CASES.items() if case in wanted):
        folder, trained = base / case.replace(" ", "-"), not case.startswith("random")
        folder.mkdir()
        source = (widened if trained else drawn)(kind, folder / "source")
        body = jobs.manifest(source.as_uri(), (folder / "out").as_uri(), passes)
        more = data if trained else {"calibration": sample, "evaluation": sample}
        job = jobs.write(folder / "job.json", {**body, "spec": {**body["spec"], **more}})
        assert run_cli(["run", str(job)]) == 0
        said = json.loads((folder / "out" / "kompressor.json").read_text())["evaluation"]["perplexityAfter"]
        made[case] = folder / "out", evaluation_rows(job), said
    for trap, (case, says) in ((trap, how) for trap, how in TRAPS.items() if trap in wanted):
        out, rows, said = made[case]
        folder = base / trap.replace(" ", "-")
        shutil.copytree(out, folder)
        config = json.loads((out / "config.json").read_text())
        if isinstance((rope := config.get("rope_parameters", {})).get("full_attention"), dict):
            config["rope_parameters"] = rope["full_attention"]
        (folder / "config.json").write_text(json.dumps({**config, **says}))
        made[trap] = folder, rows, said
    found = seen_by_vllm(base, {str(folder): rows.tolist() for folder, rows, _ in made.values()}, "float32")
    return {case: (folder, rows, said, found[str(folder)]) for case, (folder, rows, said) in made.items()}


@pytest.mark.parametrize("case", CASES)
def test_every_token_is_seen_alike(case: str, tmp_path: Path, seen: dict[str, tuple[Path, Tensor, float, dict[str, Any] | str]]) -> None:
    folder, rows, said, found = seen[case]
    assert not isinstance(found, str), found
    theirs, ours = torch.tensor(found["losses"]), losses(folder, rows)
    apart = float((theirs - ours).abs().max())
    print(f"{case}: largest difference of a token {apart:.2e}; perplexity reported {said:.5f}, vLLM {found['perplexity']:.5f}")
    assert apart < TOLERANCE
    config = json.loads((folder / "config.json").read_text())
    everywhere = {**config, "layer_types": ["full_attention"] * len(config["layer_types"])}
    shutil.copytree(folder, tmp_path / "without")
    (tmp_path / "without" / "config.json").write_text(json.dumps(everywhere))
    assert float((losses(tmp_path / "without", rows) - ours).abs().max()) > 100 * TOLERANCE, "windows that loaders drop would not be seen"
    assert float(ours.double().mean().exp()) == pytest.approx(said, rel=1e-5)
    assert found["perplexity"] == pytest.approx(said, rel=1e-5)


@pytest.mark.parametrize("trap", TRAPS)
def test_under_other_names_windows_are_dropped_without_a_word(
    trap: str, seen: dict[str, tuple[Path, Tensor, float, dict[str, Any] | str]]
) -> None:
    _, rows, _, found = seen[trap]
    assert not isinstance(found, str), found
    right = losses(seen[TRAPS[trap][0]][0], rows)
    apart = (torch.tensor(found["losses"]) - right).abs()
    print(f"{trap}: largest difference of a token {float(apart.max()):.2e}, of means {float((apart).mean()):.2e}")
    assert float(apart[:, WINDOW:].max()) > 100 * TOLERANCE
    assert float(apart[:, : WINDOW - 1].max()) < TOLERANCE, "nothing differs before the window's end"


def test_with_a_cache_in_fp8(tmp_path: Path) -> None:
    """Both read the scales beside the windows."""
    if not avx512():
        pytest.skip("vLLM has no FP8 cache on this CPU")
    data = samples({section: path.as_uri() for section, path in write_data(tmp_path, "llama").items()})
    body = jobs.manifest(trained_model("llama").as_uri(), (tmp_path / "out").as_uri(), [HYBRID, {"kvCache": {}}])
    job = jobs.write(tmp_path / "job.json", {**body, "spec": {**body["spec"], **data}})
    assert run_cli(["run", str(job)]) == 0
    said = json.loads((tmp_path / "out" / "kompressor.json").read_text())["evaluation"]["perplexityAfter"]
    found = seen_by_vllm(tmp_path, {str(tmp_path / "out"): evaluation_rows(job).tolist()})[str(tmp_path / "out")]
    assert not isinstance(found, str), found
    assert found["perplexity"] == pytest.approx(said, rel=0.01)  # its CPU kernel rounds towards zero
