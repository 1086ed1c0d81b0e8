"""A job that leaves fewer experts, cut off in its survey or behind it, goes on with the same decisions: the same bytes come out."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from nursery import Nursery
from test_resume import TRIES, files_of
from test_structured_resume import ALWAYS_SAVES, GOES_ON, cut_off, job

PASSES: dict[str, list[dict[str, Any]]] = {
    name: [
        {name: {"experts": 6}},
        {"pruneWidth": {"ratio": 0.5, "multiple": 32}},
        {"gptq": {"scheme": "W4A16", "groupSize": 32, "targets": ["re:.*o_proj", "re:.*experts.*"]}},
    ]
    for name in ("pruneExperts", "mergeExperts")
}


@pytest.fixture(scope="module")
def nursery(nursery: Nursery) -> Nursery:
    return nursery.after(ALWAYS_SAVES)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten thin blocks of eight experts."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 10, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
    folder = tmp_path_factory.mktemp("mixture")
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, head_dim=32, vocab_size=512, initializer_range=0.1)).to(torch.bfloat16).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("name", PASSES)
def test_killed_anywhere_the_same_bytes_come_out(name: str, nursery: Nursery, mixture: Path, tmp_path: Path) -> None:
    whole = nursery.worker(job(tmp_path, mixture, "whole", PASSES[name]))
    said = whole.communicate()[1]
    assert whole.returncode == 0, said
    wanted = files_of(tmp_path / "whole")
    assert json.loads(wanted["kompressor.json"])["evaluation"]["kl"] > 0
    seen: set[str] = set()
    for number, out in enumerate(TRIES):
        cut, chance = job(tmp_path, mixture, out, PASSES[name]), random.Random(number)
        early, late, unit = chance.randint(2, 4), chance.randint(6, 8), chance.randint(3, 8)
        heard = cut_off(nursery, cut, lambda state, at=early: (state.survey or 0) >= at)
        heard += cut_off(nursery, cut, lambda state, at=late: (state.survey or 0) >= at or state.surveys > 0)
        heard += cut_off(nursery, cut, lambda state, at=unit: state.unit >= at)
        last = nursery.worker(cut)
        heard += last.communicate()[1]
        assert last.returncode == 0, heard
        made = files_of(tmp_path / out)
        assert [file for file in wanted if file != "report.html" and made.get(file) != wanted[file]] == []
        assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == [], "working objects were left behind"
        seen |= {"survey" if survey else "stream" for survey, _, _ in GOES_ON.findall(heard)}
        if {"survey", "stream"} <= seen:
            return
    pytest.fail(f"workers were only ever killed in {sorted(seen)}")
