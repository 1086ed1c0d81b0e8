"""Fewer experts on trained models: what goes is what is missed least.

Real jobs judged by their KL on held-out rows, beside ten random draws cut by hand, and beside each other: the table is printed (pytest -s).
"""

from __future__ import annotations

from pathlib import Path

import mixtures
import pytest
from expert_bench import LENGTH, METHODS, Bench
from quality import require_ratio

from independent import tensors_of
from models import held_out_tokens, token_rows, trained_model

ROWS = 48


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "qwen3_moe_32"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    kind: str = request.param
    source = trained_model(kind)
    return Bench(source, token_rows(source, 0, 21, ROWS, LENGTH), held_out_tokens(kind, ROWS, LENGTH), tmp_path_factory.mktemp(kind))


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_the_choice_pays(bench: Bench, ratio: float) -> None:
    """By both measures, beside the mean of ten random draws. What merging is worth beside them is printed."""
    draws = bench.drawn(ratio)
    found = {method: bench.of(method, ratio) for method in METHODS}
    said = ", ".join(f"{method} {float(kl.mean()):.4f}" for method, kl in found.items())
    means = draws.mean(1)
    print(f"{bench.source.name} {ratio:.0%}: {said}, random {means.mean():.4f} ({means.min():.4f} to {means.max():.4f})")
    require_ratio(found["reap"], draws.mean(0), 1.0)
    require_ratio(found["frequency"], draws.mean(0), 1.0)


# ---- by domain


def domains(folder: Path, marks: str) -> Bench:
    source = mixtures.domain_model()
    calibration, held_out = (mixtures.domain_rows(source, list(marks), seed, ROWS, LENGTH) for seed in (21, 1_000_003))
    return Bench(source, calibration, held_out, folder)


@pytest.mark.parametrize(("marks", "ratio"), [("~^@", 0.25), ("~^@", 0.5), ("~^", 0.5)])
def test_a_busy_expert_that_says_little_goes(marks: str, ratio: float, tmp_path: Path) -> None:
    """Every token goes to it, so frequency keeps it; what it adds is small, and REAP takes it for what it is worth. Where two experts of a
    domain that nobody asked for are there to go, half of them must go for others to be judged."""
    bench = domains(tmp_path, marks)
    tokens = {layer: counts for layer, (counts, _) in mixtures.contributions(bench.source, bench.calibration).items()}
    assert all(int(counts.argmax()) == mixtures.BUSY for counts in tokens.values())
    reap, frequency, merge = (bench.of(method, ratio) for method in METHODS)
    print(f"domains {marks} {ratio:.0%}: reap {reap.mean():.4f}, frequency {frequency.mean():.4f}, merge {merge.mean():.4f}")
    before = tensors_of(bench.source)
    for method, stays in (("reap", False), ("frequency", True)):
        kept = mixtures.kept_experts(before, tensors_of(bench.folder / f"{method}-{ratio}" / "out"))
        assert all((mixtures.BUSY in experts) == stays for experts in kept.values()), (method, kept)
    by_turns = [kl.view(-1, len(marks)).mean(1) for kl in (reap, frequency)]  # a row of each domain
    require_ratio(*by_turns, 0.9)


def test_calibrated_on_two_domains_the_experts_of_the_third_go(tmp_path: Path) -> None:
    """And the model is then as good as it was where it was asked for, and nowhere else."""
    bench = domains(tmp_path, "~^")
    out = bench.compress([{"pruneExperts": {"experts": 5}}], "two")
    kept = mixtures.kept_experts(tensors_of(bench.source), tensors_of(out))
    assert all(set(experts) == {1, 2, 3, 4, 5} for experts in kept.values()), kept
    elsewhere = Bench(bench.source, bench.calibration, mixtures.domain_rows(bench.source, ["@"], 1_000_003, ROWS, LENGTH), tmp_path)
    require_ratio(bench.divergence(out), elsewhere.divergence(out), 0.2)
