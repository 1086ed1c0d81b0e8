"""Every family of mixtures with fewer experts, by real jobs: what is published is cut from the source, and has the function reported.

In fp32, so that what a job says and what transformers measures agree to the sums' last digits.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import families
import mixtures
import pytest
import smaller
import torch
from test_structured_families import compress, passes_of, require_function, rows_of

from independent import tensors_of

SHAPE: dict[str, Any] = {"num_hidden_layers": 4, "initializer_range": 0.1, "dtype": "float32"}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8},
    "qwen2_moe": {"num_experts": 8},
    "qwen3_moe": {"num_experts": 8, "mlp_only_layers": [1]},
    "deepseek_v2": {"n_routed_experts": 8},
    "deepseek_v3": {"n_routed_experts": 16, "n_group": 4, "topk_group": 2},
}
KEPT = {"deepseek_v3": 12}
"""Experts that stay; 6 of 8 in the others."""
LOOSE = re.compile(r"\.experts\.\d+\.|\.gate\.")
"""Names of what may change."""


def mixture(family: str, folder: Path, **shape: Any) -> Path:
    source = smaller.lively(families.tiny_model(family, **{**SHAPE, **FAMILIES[family], **shape}), folder / "lively")
    state, chance = tensors_of(source), torch.Generator().manual_seed(3)
    for name, tensor in state.items():
        if name.endswith("e_score_correction_bias"):
            state[name] = tensor + 0.1 * torch.randn(tensor.shape, generator=chance)
    return mixtures.write(source, folder / "source", state)


def said_of(report: dict[str, Any], name: str) -> dict[int, dict[str, Any]]:
    return {int(layer): found for layer, found in report["structure"]["passes"][name]["layers"].items()}


@pytest.mark.parametrize("importance", ["reap", "frequency"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_it_is_a_cut_of_the_source(family: str, importance: str, tmp_path: Path) -> None:
    """The experts of least importance by transformers' own routing and outputs are gone, and nothing else has changed."""
    source, kept = mixture(family, tmp_path), KEPT.get(family, 6)
    report = compress(source, tmp_path, [{"pruneExperts": {"experts": kept, "importance": importance, "minTokens": 0}}])
    before, made = tensors_of(source), tensors_of(tmp_path / "out")
    wanted, groups = {}, FAMILIES[family].get("n_group", 1)
    for layer, (tokens, means) in mixtures.contributions(source, rows_of("calibration")).items():
        scores = means if importance == "reap" else tokens / tokens.sum()
        said = said_of(report, "pruneExperts")[layer]
        assert said["tokens"] == tokens.long().tolist()
        assert said["scores"] == pytest.approx(scores.tolist(), rel=1e-3)
        best = scores.view(groups, -1).topk(kept // groups).indices + torch.arange(groups)[:, None] * (len(scores) // groups)
        wanted[layer] = best.flatten().sort().values.tolist()
        assert said["gone"] == sorted(set(range(len(scores))) - set(wanted[layer]))
    cut = mixtures.cut_experts(before, wanted)
    assert made.keys() == cut.keys()
    assert [name for name, tensor in cut.items() if not torch.equal(made[name], tensor)] == []
    assert mixtures.expert_count(tmp_path / "out") == kept
    require_function(source, tmp_path / "out", report, 1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_the_rest_stays_as_it_is(family: str, tmp_path: Path) -> None:
    """Shared experts, norms and attention, and experts that stay by themselves with their rows of the router."""
    source, kept = mixture(family, tmp_path), KEPT.get(family, 6)
    report = compress(source, tmp_path, [{"mergeExperts": {"experts": kept}}])
    before, made = tensors_of(source), tensors_of(tmp_path / "out")
    assert [name for name, tensor in made.items() if not LOOSE.search(name) and not torch.equal(before[name], tensor)] == []
    assert mixtures.expert_count(tmp_path / "out") == kept
    number, within = mixtures.expert_count(source), mixtures.expert_count(source) // FAMILIES[family].get("n_group", 1)
    for layer, said in said_of(report, "mergeExperts").items():
        merged = said["merged"]
        assert sum(len(members) - 1 for members in merged) == number - kept
        assert all(len({member // within for member in members}) == 1 for members in merged), "experts of two groups became one"
        assert all(members == sorted(members, key=lambda m: (-said["tokens"][m], m)) for members in merged)
        alone = sorted(set(range(number)) - {member for members in merged for member in members})
        heads = sorted([*alone, *(members[0] for members in merged)])
        downs = [name for name in made if f".layers.{layer}." in name and ".experts." in name and name.endswith(mixtures.DOWN)]
        router = next(name for name in made if f".layers.{layer}." in name and name.endswith(".gate.weight"))
        for name in downs:
            new = int(re.findall(r"\.experts\.(\d+)\.", name)[0])
            old = name.replace(f".experts.{new}.", f".experts.{heads[new]}.")
            assert torch.equal(made[name], before[old]) == (heads[new] in alone), name
            assert torch.equal(made[router][new], before[router][heads[new]]) == (heads[new] in alone), (router, new)
    require_function(source, tmp_path / "out", report, 1e-3)


@pytest.mark.parametrize("name", ["pruneExperts", "mergeExperts"])
def test_fewer_than_a_token_is_routed_to(name: str, tmp_path: Path) -> None:
    source = mixture("qwen2_moe", tmp_path)
    report = compress(source, tmp_path, [{name: {"experts": 1}}])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_experts_per_tok"] == 1 and mixtures.expert_count(tmp_path / "out") == 1
    assert any("1 experts stay, so a token is routed to 1" in warning for warning in report["warnings"])
    require_function(source, tmp_path / "out", report, 1e-3)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_those_that_say_nothing_go(family: str, tmp_path: Path) -> None:
    """Two dead ones a layer, each layer its own; and the busiest of them must not be saved by its tokens."""
    layers = [0, 1, 2, 3] if family == "mixtral" else [0, 2, 3]
    dead = {layer: [layer, (3 * layer + 5) % 8] for layer in layers}
    source = mixtures.silenced(mixture(family, tmp_path), tmp_path / "silenced", dead)
    report = compress(source, tmp_path, [{"pruneExperts": {"experts": 6}}])
    assert {layer: said["gone"] for layer, said in said_of(report, "pruneExperts").items()} == {n: sorted(d) for n, d in dead.items()}


@pytest.mark.parametrize("name", ["pruneExperts", "mergeExperts"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_with_all_that_makes_a_model_smaller(family: str, name: str, tmp_path: Path) -> None:
    """Before the others or between them, gptq behind: one job, and the function that it reports."""
    source = mixture(family, tmp_path, num_attention_heads=8, num_key_value_heads=4, head_dim=32 if family != "qwen2_moe" else 16)
    layers, heads, width, hidden = ({n: p} for n, p in passes_of(family, layers=3).items())
    fewer = {name: {"ratio": 0.25}}
    orders = {"pruneExperts": [fewer, layers, width, hidden], "mergeExperts": [width, layers, heads, fewer]}
    report = compress(source, tmp_path, [*orders[name], {"gptq": {"scheme": "W4A16", "groupSize": 32}}])
    require_function(source, tmp_path / "out", report, 1e-2)
    assert mixtures.expert_count(tmp_path / "out") == 6 and report["result"]["quantizedLinears"] > 0


@pytest.mark.parametrize("name", ["pruneExperts", "mergeExperts"])
@pytest.mark.parametrize("behind", ["rotate", "awq"])
def test_other_passes_come_behind(name: str, behind: str, tmp_path: Path) -> None:
    """A rotation changes nothing of what was decided: the same function as without it."""
    source, fewer = mixture("qwen3_moe", tmp_path), {name: {"experts": 6}}
    more = {"rotate": {"rotate": {}}, "awq": {"awq": {"scheme": "W4A16", "groupSize": 32}}}[behind]
    found = []
    for number, passes in enumerate([[fewer], [fewer, more], [more, fewer]] if behind == "rotate" else [[fewer, more]]):
        (tmp_path / str(number)).mkdir()
        report = compress(source, tmp_path / str(number), passes)
        require_function(source, tmp_path / str(number) / "out", report, 1e-3)
        found.append(report["evaluation"]["kl"])
    assert found == pytest.approx([found[0]] * len(found), rel=1e-2)
