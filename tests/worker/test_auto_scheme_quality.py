"""Chosen schemes leave less divergence than uniform ones at no more bytes, and than 8 bits in the first and last block at no more bytes.

Real jobs on trained models, dense and a mixture of 8 experts, judged as in `test_quality`; each claim once more with every group's costs
given to another one: then it must fail."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import pytest
from quality import Passes, Weighed, require_ratio

from calibrated_jobs import write_data
from kompressor_worker.passes.auto_scheme import AutoScheme
from models import held_out_tokens, trained_model

ROWS, LENGTH = 128, 128
CANDIDATES = ["W3A16", "W4A16", "W4A16:32", "W8A16"]


def uniform(scheme: str, group: int, **more: Any) -> dict[str, Any]:
    return {"gptq": {"scheme": scheme, "groupSize": group, **more}}


BASELINES: dict[str, Passes] = {
    "uniform W4A16": [uniform("W4A16", 128)],
    "uniform W4A16 in groups of 32": [uniform("W4A16", 32)],
    "W8A16 first and last": [uniform("W8A16", -1, targets=[r"re:.*layers\.(0|3)\."]), uniform("W4A16", 128)],
}
CLAIMS: dict[tuple[str, str], float] = {
    ("llama_learned", "uniform W4A16"): 0.7,
    ("llama", "uniform W4A16 in groups of 32"): 1.0,
    ("qwen3_moe", "W8A16 first and last"): 0.95,
}
"""Model and baseline: chosen at no more bytes, schemes leave less than so much of the baseline's KL. `benchmarks/choices.py` has
every model beside every baseline."""


@pytest.fixture(scope="module")
def laboratories(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Weighed]:
    made = {}
    for kind in {kind for kind, _ in CLAIMS}:
        folder = tmp_path_factory.mktemp(kind)
        made[kind] = Weighed(folder, write_data(folder, kind, ROWS)["calibration"], held_out_tokens(kind, ROWS, LENGTH))
    return made


def shuffled(patch: pytest.MonkeyPatch) -> None:
    decided = AutoScheme._decided

    def decide(self: AutoScheme, costs: list[dict[int, float]]) -> Any:
        by_size: dict[int, list[int]] = {}
        for number, group in enumerate(self._groups):
            by_size.setdefault(group.weights, []).append(number)
        mixed = list(costs)
        for members in by_size.values():  # of the same size, so that nothing else is wrong with them
            others = members[:]
            random.Random(4).shuffle(others)
            for to, of in zip(members, others, strict=True):
                mixed[to] = costs[of]
        return decided(self, mixed)

    patch.setattr(AutoScheme, "_decided", decide)


@pytest.mark.parametrize(("kind", "baseline"), CLAIMS)
def test_choice_pays_and_shuffled_it_does_not(
    kind: str, baseline: str, laboratories: Mapping[str, Weighed], monkeypatch: pytest.MonkeyPatch
) -> None:
    laboratory, source, below = laboratories[kind], trained_model(kind), CLAIMS[kind, baseline]
    than = laboratory.baseline(source, BASELINES[baseline])
    most = laboratory.weights[json.dumps(BASELINES[baseline])]
    chosen: Passes = [{"autoScheme": {"budget": {"bytes": most}, "candidates": CANDIDATES}}]
    require_ratio(laboratory.divergence(source, chosen), than, below)
    assert laboratory.weights[json.dumps(chosen)] <= most
    shuffled(monkeypatch)
    with pytest.raises(AssertionError, match="allowed is less than"):
        require_ratio(laboratory.divergence(source, chosen), than, below)
