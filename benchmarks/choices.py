"""What a choice by measurement is worth beside those that need none: schemes under a budget, layers that keep full attention, experts.

    python benchmarks/choices.py schemes                          # autoScheme beside uniform schemes and more bits at both ends
    python benchmarks/choices.py schemes --models mixtral
    python benchmarks/choices.py windows --seeds 0 1 2            # hybridAttention beside every other choice of as many layers
    python benchmarks/choices.py experts                          # pruneExperts and mergeExperts beside random draws

Real jobs on the small models that the tests train, judged by the mean KL of what is published on held-out rows, read by transformers in
fp32; at no more bytes, with as many layers, or with as many experts. Ratios with the 95 % interval of a paired bootstrap over the rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests"), str(ROOT / "tests/worker")]

from copying import DEEP, LAYERS, Windows  # noqa: E402
from expert_bench import LENGTH, METHODS, Bench  # noqa: E402
from mixtures import domain_model, domain_rows  # noqa: E402
from quality import Passes, Weighed, interval  # noqa: E402

from calibrated_jobs import write_data  # noqa: E402
from models import RECIPES, held_out_tokens, token_rows, trained_model  # noqa: E402

ROWS, EXPERT_ROWS = 128, 48
CANDIDATES = ["W3A16", "W4A16", "W4A16:32", "W8A16"]


def plain(scheme: str, group: int, **more: Any) -> dict[str, Any]:
    return {"gptq": {"scheme": scheme, "groupSize": group, **more}}


def baselines(layers: int) -> dict[str, Passes]:
    """What one would choose without measuring."""
    ends = [rf"re:.*layers\.(0|{layers - 1})\."]
    return {
        "W4A16": [plain("W4A16", 128)],
        "W4A16:32": [plain("W4A16", 32)],
        "W8A16 at both ends, W4A16 between": [plain("W8A16", -1, targets=ends), plain("W4A16", 128)],
        "W8A16 at both ends, W3A16 between": [plain("W8A16", -1, targets=ends), plain("W3A16", 128)],
    }


def schemes(models: list[str], folder: Path) -> Iterator[str]:
    """A line for each model and baseline: what both leave, the program's own answer and the plan that was kept over the baseline."""
    yield "| model | at the bytes of | its KL | the program's over that | chosen over that | plan |"
    yield "|---|---|---|---|---|---|"
    for kind in models:
        place = folder / kind
        place.mkdir()
        laboratory = Weighed(place, write_data(place, kind, ROWS)["calibration"], held_out_tokens(kind, ROWS, LENGTH))
        source = trained_model(kind)
        for name, passes in baselines(RECIPES[kind].shape["num_hidden_layers"]).items():
            than = laboratory.baseline(source, passes)
            most = laboratory.weights[json.dumps(passes)]
            ratios, plan = [], ""
            for samples in (0, 16):
                chosen = [{"autoScheme": {"budget": {"bytes": most}, "candidates": CANDIDATES, "samples": samples}}]
                kl = laboratory.divergence(source, chosen)
                assert laboratory.weights[json.dumps(chosen)] <= most
                ratios.append("{:.2f} ({:.2f} to {:.2f})".format(*interval(kl, than)))
                tried = laboratory.reports[json.dumps(chosen)]["autoScheme"]["plans"]
                plan = min(tried, key=lambda one: one.get("kl", 0.0))["name"]
            yield f"| {kind} | {name} | {float(than.mean()):.3g} | {' | '.join(ratios)} | {plan} |"


def windows(seeds: list[int], folder: Path) -> Iterator[str]:
    """A line for each model and number of layers that keep full attention; of LAYERS beside all choices there are, of DEEP (the first seed)
    beside evenly spaced ones and those that are missed most by themselves."""
    yield "| model | full | chosen | its KL | missed most alone | evenly spaced | over the better of these | best of all | mean of all |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for seed, layers, count in [*((s, LAYERS, n) for s in seeds for n in (2, 3)), *((seeds[0], DEEP, n) for n in (2, 3, 4))]:
        (place := folder / f"{seed}-{layers}-{count}").mkdir()
        found = Windows.of(seed, count, place, layers)
        better = min((found.divergence(full) for full in found.even()), key=lambda kl: float(kl.mean()))
        everything = "- | - |"
        if layers == LAYERS:
            means = sorted(float(found.divergence(full).mean()) for full in itertools.combinations(range(layers), count))
            everything = f"{means[0]:.3f} | {sum(means) / len(means):.3f} |"
        yield (
            f"| {layers} layers, seed {seed} | {count} | {found.chosen} | {float(found.divergence(found.chosen).mean()):.3f} | "
            f"{float(found.divergence(found.alone).mean()):.3f} | "
            f"{', '.join(f'{float(found.divergence(full).mean()):.3f}' for full in found.even())} | "
            "{:.2f} ({:.2f} to {:.2f}) | ".format(*interval(found.divergence(found.chosen), better))
            + everything
        )


def experts(models: list[str], folder: Path) -> Iterator[str]:
    """A line for each mixture: the KL with 25 % and 50 % of the experts gone, by method, and the mean of ten random draws."""
    yield f"| model | {' | '.join(METHODS)} | random |"
    yield f"|---|{'---|' * (len(METHODS) + 1)}"
    for kind in models:
        place = folder / kind
        place.mkdir()
        if kind == "domains":
            source = domain_model()
            calibration, held_out = (domain_rows(source, list("~^@"), seed, EXPERT_ROWS, LENGTH) for seed in (21, 1_000_003))
        else:
            source = trained_model(kind)
            calibration, held_out = token_rows(source, 0, 21, EXPERT_ROWS, LENGTH), held_out_tokens(kind, EXPERT_ROWS, LENGTH)
        bench = Bench(source, calibration, held_out, place)
        made = [[float(bench.of(method, ratio).mean()) for ratio in (0.25, 0.5)] for method in METHODS]
        made.append([float(bench.drawn(ratio).mean()) for ratio in (0.25, 0.5)])
        yield f"| {kind} | {' | '.join(f'{a:.3f}, {b:.3f}' for a, b in made)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("schemes", "windows", "experts"))
    parser.add_argument("--models", nargs="+", help="for schemes and experts: of the suite's; domains is a Mixtral with a busy expert")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="for windows: of the models' training")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        match options.what:
            case "schemes":
                lines = schemes(options.models or ["llama_learned", "llama", "qwen3", "qwen3_moe", "mixtral"], folder)
            case "windows":
                lines = windows(options.seeds, folder)
            case _:
                lines = experts(options.models or ["mixtral", "qwen3_moe", "qwen3_moe_32", "domains"], folder)
        for line in lines:
            print(line, flush=True)


if __name__ == "__main__":
    main()
