"""Recovery block by block and end to end: how much of what a compression loses comes back, with the tokens and seconds that it takes.

    python benchmarks/recovery.py                                     # all cases and ways on the suite's Llama (hours on 2 cores)
    python benchmarks/recovery.py --cases 2:4 W2A16 --ways recover --rows 256 --steps 100
    python benchmarks/recovery.py --model llama_learned --ways distil labels

Each case is a real job on a trained model of the suite by itself, and one with each way behind its passes: `recover`, `distil` (logits and
hidden states), `logits` (these alone), `labels` (the text alone) and `both` (recover, then distil). All are judged by their own evaluation
on held-out rows. Shares are of the mean KL to the original, and of the rise in perplexity, that the job by itself has. Blocks are tuned on
the calibration rows; trainings have rows of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

import jobs  # noqa: E402
from models import RECIPES, token_rows, trained_model  # noqa: E402

LENGTH, JUDGED, BATCH = 128, 64, 16
"""Tokens of a row; held-out rows; rows of a step of a training, all of them different."""
SEEDS = {"calibration": 21, "evaluation": 1_000_003, "training": 22}
"""Of the text; the models were trained on that of seed 0."""
Passes = list[dict[str, Any]]
DEEPER = "2 of 6 layers"
"""A case for a model of its own: the same recipe with six layers."""
RECIPES |= {f"{name}_six": replace(RECIPES[name], shape={**RECIPES[name].shape, "num_hidden_layers": 6}) for name in list(RECIPES)}


def cases(layers: int) -> dict[str, Passes]:
    """For a model of so many."""
    packed = {"groupSize": 64}
    return {
        "width 25 %": [{"pruneWidth": {"ratio": 0.25, "multiple": 32}}],
        "width 50 %": [{"pruneWidth": {"ratio": 0.5, "multiple": 32}}],
        f"1 of {layers} layers": [{"pruneLayers": {"layers": layers - 1}}],
        DEEPER: [{"pruneLayers": {"layers": 4}}],
        "2:4": [{"sparseGPT": {"pattern": "2:4"}}],
        "W3A16": [{"gptq": {"scheme": "W3A16", **packed}}],
        "W2A16": [{"gptq": {"scheme": "W2A16", **packed}}],
        "W2A16 by rtn": [{"rtn": {"scheme": "W2A16", **packed}}],
        "W2A16_ASYM": [{"gptq": {"scheme": "W2A16_ASYM", **packed}}],
    }


@dataclass(frozen=True)
class Outcome:
    kl: float
    rise: float
    """Of the perplexity, as a share of the original's."""
    seconds: float


def write_rows(folder: Path, model: str, rows: int, trained: int) -> dict[str, Path]:
    """By section: token ids, as the model's own training had them: one BOS at the beginning of a row, none within it."""
    written = {}
    for section, count in (("calibration", rows), ("evaluation", JUDGED), ("training", trained)):
        written[section] = folder / f"{section}.jsonl"
        drawn = token_rows(trained_model(model), RECIPES[model].language, SEEDS[section], count, LENGTH)
        written[section].write_text("".join(json.dumps({"ids": row}) + "\n" for row in drawn.tolist()))
    return written


def compress(folder: Path, model: str, data: dict[str, Path], rows: int, passes: Passes) -> Outcome:
    from kompressor_worker.job import load_job
    from kompressor_worker.progress import Progress
    from kompressor_worker.run import run

    with tempfile.TemporaryDirectory(dir=folder) as work:
        body = jobs.manifest(trained_model(model).as_uri(), (Path(work) / "out").as_uri(), passes)
        for section, count in (("calibration", rows), ("evaluation", JUDGED)):
            drawn = {"samples": count, "sequenceLength": LENGTH}
            body["spec"][section] = {"dataset": {"uri": data[section].as_uri(), "tokens": "ids"}, **drawn}
        began = time.monotonic()
        run(load_job(jobs.write(Path(work) / "job.json", body), {}), {}, Progress(), threading.Event())
        said = json.loads((Path(work) / "out" / "kompressor.json").read_text())["evaluation"]
        return Outcome(said["kl"], said["perplexityIncrease"], time.monotonic() - began)


def ways(asked: argparse.Namespace, training: Path) -> dict[str, tuple[Passes, int]]:
    """Passes, and the rows that go through them."""
    recover = {"recover": {"steps": asked.steps, "batchRows": asked.batch_rows}}
    how = {"sequenceLength": LENGTH, "batch": BATCH, "steps": asked.distil_steps, "learningRate": asked.learning_rate, "floor": 0}
    distil = {"dataset": {"uri": training.as_uri(), "tokens": "ids"}, "packing": False, **how}
    tuned, trained = asked.steps * asked.batch_rows, BATCH * asked.distil_steps
    taught = {**distil, "hiddenStates": {"weight": asked.hidden_weight}}
    return {
        "recover": ([recover], tuned),
        "distil": ([{"distil": taught}], trained),
        "logits": ([{"distil": distil}], trained),
        "labels": ([{"distil": {**distil, "divergence": {"labels": 1}}}], trained),
        "both": ([recover, {"distil": taught}], tuned + trained),
    }


def table(lines: Sequence[Sequence[str]]) -> str:
    head = ["case", "by", "KL", "then", "back", "perplexity", "then", "back", "rows x tokens", "seconds"]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama", choices=sorted(name for name in RECIPES if not name.endswith("_six")))
    parser.add_argument("--cases", nargs="*", help="default: all")
    parser.add_argument("--ways", nargs="*", default=["recover", "distil", "labels", "both"])
    parser.add_argument("--rows", type=int, default=512, help="calibration rows")
    parser.add_argument("--steps", type=int, default=200, help="of recover")
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--distil-steps", type=int, default=400, help="of 16 rows")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of trainings")
    parser.add_argument("--hidden-weight", type=float, default=1.0, help="of the loss on hidden states, beside that on logits")
    asked = parser.parse_args()
    found = cases(int(json.loads((trained_model(asked.model) / "config.json").read_text())["num_hidden_layers"]))
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        data = write_rows(Path(folder), asked.model, asked.rows, BATCH * asked.distil_steps)
        by = ways(asked, data["training"])
        for name in asked.cases or found:
            model = f"{asked.model}_six" if name == DEEPER else asked.model
            plain = compress(Path(folder), model, data, asked.rows, found[name])
            for way in asked.ways:
                passes, rows = by[way]
                made = compress(Path(folder), model, data, asked.rows, [*found[name], *passes])
                figures = [f"{plain.kl:.4f}", f"{made.kl:.4f}", f"{1 - made.kl / plain.kl:.0%}"]
                figures += [f"{plain.rise:+.2%}", f"{made.rise:+.2%}", f"{1 - made.rise / plain.rise:.0%}"]
                lines.append([name, way, *figures, f"{rows:,} x {LENGTH}", f"{made.seconds - plain.seconds:.0f}"])
                print(table(lines[-1:]).splitlines()[-1], flush=True)
    print(f"\n{table(lines)}")


if __name__ == "__main__":
    main()
